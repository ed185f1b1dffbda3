#!/usr/bin/env bash
# What `make sanitize` runs, with the Python of the virtual environment first on PATH: the op tests
# on a module with AddressSanitizer and UndefinedBehaviorSanitizer, then the drivers in C++.
# The module is in its own tree, build/sanitize/tree, with copies of all that the tests import.
set -euo pipefail
cd "$(dirname "$0")/../.."
tree=$PWD/build/sanitize/tree

rm -rf "$tree"
FISHERFAST_SANITIZE=address,undefined FISHERFAST_CUDA=OFF \
  python setup.py -q build --build-base build/sanitize --build-lib "$tree"
cp -r tests pyproject.toml "$tree"

# Python itself has no sanitizer: their libraries must be there before it, and that of C++ with
# them, whose exceptions they follow. Python and torch leak by design. A fault ends in abort(), at
# which pytest shows the test, and --capture=sys leaves the report on the terminal.
sanitized() {
  local libraries
  libraries=$(ldd "$tree"/fisherfast/_C.*so |
    awk '/lib(asan|ubsan|stdc\+\+|clang_rt\.asan.*)\./ { print $3 }' | paste -sd:)
  (cd "$tree" && LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
    UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 OMP_NUM_THREADS=1 \
    PYTHONPATH=$tree:$tree/tests/native python "$@")
}
op_tests() {
  sanitized -m pytest -q --capture=sys -p sanitized -p no:cacheprovider -m "not slow" \
    -k "not torch and not far" --numprocesses auto --dist worksteal "$@"
}

sanitized tests/native/sanitized.py
op_tests tests/ops
levels=$(sanitized -c 'from fisherfast import _native
print(*_native.build_info()["simd_available"][:-1])') # the last one is the default
for level in $levels; do
  FISHERFAST_SIMD=$level op_tests tests/ops --ignore tests/ops/test_dispatch.py
done

python -m pytest -q -p no:cacheprovider tests/native/test_native.py
