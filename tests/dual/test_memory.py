"""Memory that dual forward passes use again: never that of a living tensor, never much."""

from __future__ import annotations

import threading

import pytest
import torch
from support.dual_oracle import Function
from torch import nn

import fisherfast as ff
from fisherfast.dual import memory

SMALL = 2**10
FLOATS = SMALL // 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Blocks of a kilobyte count as large; nothing is kept from or for other tests."""
    ff.dual.release_memory()
    monkeypatch.setattr(memory, "LARGE_BYTES", SMALL)
    monkeypatch.setattr(memory, "SMALL_BYTES", SMALL)
    yield
    ff.dual.release_memory()


def room(count: int) -> torch.Tensor:
    return memory.empty((count,), (1,), torch.float32, torch.device("cpu"))


def kept() -> int:
    return sum(block.nbytes() for block in memory._blocks)


def test_a_dead_block_is_used_again():
    """Catches memory that is never used again, which is all that this is for."""
    with memory.reusing():
        first = room(FLOATS)
        address = first.data_ptr()
        del first
        assert room(FLOATS).data_ptr() == address


def test_a_living_block_is_not():
    """Catches a result that is overwritten while somebody looks at it, by a view too."""
    with memory.reusing():
        block = room(4 * FLOATS)
        view = block.view(4, FLOATS)[2]
        view.fill_(7.0)
        del block
        others = [room(4 * FLOATS).fill_(1.0) for _ in range(3)]
        assert (view == 7.0).all()
        assert len({other.data_ptr() for other in others}) == len(others)


def test_what_is_kept_has_a_limit(monkeypatch):
    """Catches memory that grows from call to call, and memory of a user's result that is counted
    as free."""
    monkeypatch.setattr(memory, "KEPT_BYTES", 4 * SMALL)
    with memory.reusing():
        held = room(8 * FLOATS)
        others = [room(size * FLOATS) for size in (1, 2, 3, 5)]
        others.clear()
    assert kept() == 4 * SMALL  # the block of 3 and that of 1
    ff.dual.release_memory()
    assert kept() == 0
    assert held.fill_(1.0).sum() == 8 * FLOATS


def test_nothing_is_held_while_more_is_asked_for():
    """Catches a peak that is larger than what is in use: blocks too small are given back first."""
    with memory.reusing():
        for size in range(2, 10):
            held = room(size * FLOATS)
            assert kept() <= (2 * size - 1) * SMALL
        del held


def test_a_small_result_does_not_keep_a_large_block():
    """Catches a slice of a large activation that is returned with all of it behind."""
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), Function(lambda x: x[:, :, 0, 0]))
    y, dy = ff.jvp(model, torch.randn(3, 1, 12, 12), torch.randn(2, 3, 1, 12, 12))
    assert y.untyped_storage().nbytes() == 3 * y.nbytes
    assert dy.untyped_storage().nbytes() == 3 * y.nbytes


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 2, 3)
    return nn.Sequential(*layers).eval()


def test_results_stay_and_are_those_of_fresh_memory(monkeypatch):
    """Catches a result of one call that the next one overwrites, a slice that is left as it was
    found, and a layout that is not that of the input."""
    model = network()
    x, dx = torch.randn(3, 1, 12, 12), torch.randn(2, 3, 1, 12, 12)
    results = [ff.jvp(model, x, dx), *ff.propagate(model, x, dx).values()]
    before = [(activations.clone(), tangents.clone()) for activations, tangents in results]
    for _ in range(3):
        ff.jvp(model, torch.randn(3, 1, 12, 12), torch.randn(2, 3, 1, 12, 12))
    used = ff.jvp(model, x, dx)
    for pair, copies in zip(results, before, strict=True):
        assert all(map(torch.equal, pair, copies))
    monkeypatch.setattr(memory, "LARGE_BYTES", 2**40)
    for one, other in zip(used, ff.jvp(model, x, dx), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_threads_do_not_share_blocks():
    """Catches two threads that are given the same free block."""
    model = network()
    inputs = [(torch.randn(3, 1, 12, 12), torch.randn(2, 3, 1, 12, 12)) for _ in range(4)]
    truth = [ff.jvp(model, *pair)[1] for pair in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            _, dy = ff.jvp(model.__class__(*model), *inputs[index])
            if not torch.allclose(dy, truth[index], rtol=1e-5, atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_hook_may_look_at_what_waits():
    """Catches used memory that is taken for a tensor of the model, where a hook reads a batch norm
    that still waits for its activation."""
    model = network()
    seen: list[torch.Tensor] = []
    handle = model[1].register_forward_hook(lambda module, args, output: seen.append(output.stack))
    x, dx = torch.randn(3, 1, 12, 12), torch.randn(2, 3, 1, 12, 12)
    ff.jvp(model, x, dx)
    handle.remove()
    expected = model[:2](x)
    assert type(seen[0]) is torch.Tensor
    torch.testing.assert_close(seen[0][0], expected, rtol=1e-5, atol=1e-6)
