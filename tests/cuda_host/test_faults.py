"""The harness itself: a planted fault of each kind is caught, and the sound kernels pass."""

import pytest
import torch
from cuda_host import harness

KINDS = ["neighbours", "shuffled"]


def run(kernels, op, x):
    y = torch.empty(len(x))
    kernels.call(op, x, x=x, y=y, rows=len(x))
    return y


@pytest.mark.parametrize("op", KINDS)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_sound_kernels_pass(kernels, normal, op, rows):
    x = normal(rows, dtype=torch.float32)
    before = torch.cat([torch.zeros(1), x[:-1]])
    before[::64] = 0  # a block reads its own numbers alone
    assert torch.equal(run(kernels, op, x), x + before)


def test_a_missing_barrier_changes_the_result(kernels, normal):
    with pytest.raises(harness.OrderError, match="y must be the same in order"):
        run(kernels, "missing_barrier", normal(100, dtype=torch.float32))


@pytest.mark.parametrize(
    ("op", "report"),
    [
        ("global_read_outside", "AddressSanitizer: heap-buffer-overflow"),
        ("shared_write_outside", "AddressSanitizer: heap-buffer-overflow"),
        ("divergent_barrier", "must bring all threads of block .* to the same barrier"),
        ("wrong_mask", "must bring all threads of block .* with mask ffffffff"),
        ("too_much_shared", "must succeed, got invalid argument"),
    ],
)
def test_errors_are_reported(kernels, normal, op, report):
    x = normal(100, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=report) as caught:
        run(kernels, op, x)
    assert "_kernel" in str(caught.value)  # the kernel is named


def test_shared_memory_starts_as_nan(kernels, normal):
    x = normal(100, dtype=torch.float32)
    y = run(kernels, "unset_shared", x)
    assert y.isnan().nonzero().flatten().tolist() == [32, 96]
