"""The CPU kernels in C++ under the sanitizers of the compiler, which must catch planted faults.

CMake builds the drivers of tests/native with FISHERFAST_SANITIZE. `make sanitize` runs the op tests
under AddressSanitizer as well: that needs another Python process, with libraries of its own.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from native.thread_cases import recorded

from fisherfast import _native

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ["baseline", "avx2", "avx512"]
LEVEL_IS_NOT_HERE = 77  # exit status of tests/native/race.cpp
# Python's own directory comes first: cmake and ninja may be installed there.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# ThreadSanitizer stops at the first race: a missing wait would be reported for an hour.
ENVIRONMENT = os.environ | {
    "PATH": PATH,
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1",
}
COMPILER = os.environ.get("CXX", "c++")


def run(*command: object) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)


def must_run(*command: object) -> None:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def run_driver(*command: object) -> subprocess.CompletedProcess:
    """Runs a driver, with fixed addresses where ThreadSanitizer, which needs some of them for
    itself, does not start otherwise."""
    done = run(*command)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        done = run("setarch", platform.machine(), "-R", *command)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(f"ThreadSanitizer does not run on this kernel: {done.stderr.strip()}")
    return done


def build_drivers(sanitizer: str, folder: Path, *drivers: str) -> Path:
    """The folder of the drivers, once they are built."""
    pybind11 = pytest.importorskip("pybind11", reason="CMakeLists.txt looks for pybind11")
    for tool in ("cmake", "ninja", COMPILER.split()[0]):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"{tool} must be installed to build the drivers")
    empty = folder / "empty.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    empty.write_text("int main() {}\n")
    linked = run(*COMPILER.split(), f"-fsanitize={sanitizer}", empty, "-o", folder / "empty")
    if linked.returncode != 0:
        pytest.skip(f"the compiler must link -fsanitize={sanitizer}, got {linked.stderr.strip()}")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "FISHERFAST_CUDA": "OFF",
        "FISHERFAST_SANITIZE": sanitizer,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    must_run("cmake", "-S", ROOT, "-B", folder, "-GNinja", *defined)
    must_run("cmake", "--build", folder, "--target", *drivers)
    return folder


@pytest.fixture(scope="module")
def thread_drivers() -> Path:
    """The drivers with all of csrc, built once and kept for the next run."""
    return build_drivers("thread", ROOT / "build" / "native", "threads", "race")


@pytest.fixture(scope="module")
def overrun(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """overrun(fault, extra): runs tests/native/overrun.cpp."""
    folder = build_drivers("address,undefined", tmp_path_factory.mktemp("native"), "overrun")
    return lambda *arguments: run_driver(folder / "overrun", *arguments)


@pytest.mark.slow
def test_threads_do_not_race_and_change_no_bit(thread_drivers, tmp_path):
    """Catches a missing wait between two phases of a team, a result that two threads write, a sum
    in the order in which threads come, state that two callers share."""
    cases = tmp_path / "cases"
    cases.write_bytes(recorded())
    done = run_driver(thread_drivers / "threads", cases)
    assert "ThreadSanitizer" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" cases, 0 differences\n")


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_planted_race_is_caught(thread_drivers, level):
    """In the kernels of every instruction set: catches copies compiled without the sanitizer."""
    own = run_driver(thread_drivers / "race", level, "own")
    if own.returncode == LEVEL_IS_NOT_HERE:
        pytest.skip(f"this machine has no {level}")
    assert own.returncode == 0, own.stderr
    shared = run_driver(thread_drivers / "race", level, "shared")
    assert shared.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in shared.stderr
    assert "csrc/ops/moments/lift_moments.simd.cpp" in shared.stderr


@pytest.mark.parametrize(
    ("fault", "harmless", "report"),
    [("heap", 0, "AddressSanitizer: heap-buffer-overflow"), ("sum", 1, "signed integer overflow")],
)
def test_a_planted_overrun_is_caught(overrun, fault, harmless, report):
    """Writes one number past scratch memory; adds one to the largest integer."""
    done = overrun(fault, harmless)
    assert done.returncode == 0, done.stderr
    done = overrun(fault, harmless + 1)
    assert done.returncode != 0
    assert report in done.stderr


@pytest.mark.skipif(_native.load() is None, reason="FISHERFAST_DISABLE_NATIVE=1 is set")
def test_the_installed_module_has_no_sanitizer():
    """Catches a sanitized module built over the one in use."""
    code = Path(_native.load().__file__).read_bytes()
    for name in (b"__asan_", b"__ubsan_", b"__tsan_"):
        assert name not in code


@pytest.mark.skipif(not (ROOT / "fisherfast").exists(), reason="setup.py needs the whole checkout")
@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        ("memory", [], "FISHERFAST_SANITIZE must be empty or address,undefined, got memory"),
        (
            "address,undefined", ["--inplace"],
            "FISHERFAST_SANITIZE must be empty for a build in place, see setup.py",
        ),
    ],
)  # fmt: skip
def test_setup_refuses_unknown_sanitizers(monkeypatch, tmp_path, choice, options, message):
    """An unknown sanitizer, and any over the module of the checkout."""
    monkeypatch.setitem(ENVIRONMENT, "FISHERFAST_SANITIZE", choice)
    places = ["--build-lib", tmp_path, "--build-temp", tmp_path]
    done = run(sys.executable, "setup.py", "-q", "build_ext", *places, *options)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(message), done.stderr
