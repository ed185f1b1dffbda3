"""The threads of the CPU kernels, also in a forked child."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisherfast import _native, ops

pytestmark = pytest.mark.skipif(
    _native.load() is None, reason="FISHERFAST_DISABLE_NATIVE=1 is set: there are no kernels"
)

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
