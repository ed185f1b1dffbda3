"""Which kernels run: those of an instruction set, chosen when fisherfast is imported, on the
threads of torch, also in a forked child."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisherfast import _native, ops

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "FISHERFAST_SIMD"
LEVELS = ["baseline", "avx2", "avx512"]
# What the processor must have at least, as Linux names it.
FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}}

pytestmark = pytest.mark.skipif(
    _native.load() is None,
    reason="FISHERFAST_DISABLE_NATIVE=1 is set: there are no kernels to choose from",
)


@pytest.fixture
def available():
    """The instruction sets of this machine; the one in use is restored."""
    module, info = _native.load(), _native.build_info()
    yield info["simd_available"]
    module.use_simd(info["simd"])


# --- the instruction set -------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the flags there")
def test_available_levels_are_those_of_the_machine(available):
    """The best last. Catches a list of what was compiled instead: an illegal instruction elsewhere;
    and a build without the fast kernels, on a machine that has them."""
    assert available == ["baseline", *(level for level in LEVELS[1:] if level in available)]
    text = Path("/proc/cpuinfo").read_text()
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    for level in available[1:]:
        assert FLAGS[level] <= flags, level
    if platform.machine() in ("x86_64", "AMD64") and FLAGS["avx2"] <= flags:
        assert "avx2" in available


@pytest.mark.parametrize("level", LEVELS)
def test_the_variable_chooses(monkeypatch, available, level):
    """Catches a variable that is read and not obeyed, or obeyed where it cannot be."""
    if level not in available:
        pytest.skip(f"this machine has no {level}")
    monkeypatch.setenv(VARIABLE, level)
    _native.load()
    assert _native.build_info()["simd"] == level
    assert _native.build_info()["simd_available"] == available


@pytest.mark.parametrize("level", [*LEVELS, "avx1024", "AVX2 ", "sse2", "0", "best"])
def test_other_levels_are_an_error(monkeypatch, available, level):
    """One that the machine lacks, or an unknown one, not at the first op: catches a crash by an
    illegal instruction, and a silent fall-back. The message names the value and the choices."""
    if level in available:
        pytest.skip(f"this machine has {level}")
    monkeypatch.setenv(VARIABLE, level)
    with pytest.raises(RuntimeError, match=f"{VARIABLE} must ") as caught:
        _native.load()
    for name in (level, *available):
        assert name in str(caught.value)


IMPORT = """
import os
os.environ.pop("FISHERFAST_SIMD", None)
from fisherfast import _native
from fisherfast.ops import selfcheck
best = _native.build_info()["simd_available"][-1]
os.environ["FISHERFAST_SIMD"] = "baseline"
assert selfcheck.run_selfcheck().passed
assert _native.build_info()["simd"] == best
"""


def test_the_best_one_is_the_default():
    """A variable that is set after the import does not count."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], env=environment, check=True)


# --- threads -------------------------------------------------------------------------------------

FORK = """
import os, signal, torch
from fisherfast import _native, ops
torch.set_num_threads(2)
x = torch.randn(200_000, 40)
expected = ops.moments(x)
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for workers it does not have ends here
    same = all(torch.equal(a, b) for a, b in zip(ops.moments(x), expected))
    own = _native.build_info()["threads"] == "started for each call"
    os._exit(0 if same and own else 3)
assert os.waitpid(child, 0)[1] == 0
assert all(torch.equal(a, b) for a, b in zip(ops.moments(x), expected))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_child_has_threads_of_its_own():
    """Catches a child that waits for the OpenMP workers of its parent for ever."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=120)


def test_settings_of_torch_stay(with_threads):
    """Catches an op that changes the number of threads of the pool it borrows."""
    x = torch.randn(50_000, 40)
    for threads in (1, 2, 3):
        with_threads(threads, lambda: ops.moments(x))
        assert torch.get_num_threads() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is looked for on Linux alone")
def test_the_pool_of_torch_is_used():
    """Catches a second pool next to that of torch, whose workers spin on the same cores."""
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("torch has no libgomp here")
    assert _native.build_info()["threads"] == "of torch (libgomp)"
