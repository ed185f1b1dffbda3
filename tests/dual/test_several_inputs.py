"""`jvp` and `propagate` of several inputs, and the errors of wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.several_inputs import (
    DX,
    KEEP,
    STEP,
    Camera,
    N,
    Reader,
    ReaderByHand,
    as_floats,
    drawn,
    join,
    measured,
    named,
    seeded,
    stream,
    tokens,
    words,
)
from torch import Tensor

import fisherfast as ff


def test_jvp_and_propagate_of_several_inputs():
    """Catches tangents of the wrong entry, a None that is refused or takes those of another entry,
    and integers that are made dual."""
    reader, by_hand = seeded(Reader).double(), seeded(ReaderByHand).double()
    dose, ids, mask = words(0)
    dx = torch.stack([torch.ones(N), torch.randn(N)]).double()
    x, whole = tokens(dose.double(), ids, mask), as_floats(dose, ids, mask).double()
    side = torch.cat([dx[..., None], torch.zeros(2, N, 10, dtype=dx.dtype)], 2)
    for given in ({"dose": dx}, {"dose": dx, "ids": None, "scale": None}):
        y, dy = ff.jvp(reader, x, given)
        assert torch.equal(y, ff.jvp(by_hand, whole, side)[0])
        assert torch.equal(dy, ff.jvp(by_hand, whole, side)[1])
    seen, expected = ff.propagate(reader, x, {"dose": dx}), ff.propagate(by_hand, whole, side)
    for name in ("embed", "output"):
        assert all(map(torch.equal, seen[name], expected[name]))
    assert torch.equal(seen["input"][1], dx)
    still = ff.propagate(seeded(Camera), drawn(), (None, DX[1].movedim(1, 0)))["input"]
    assert torch.equal(still[0], join(*drawn()))
    assert not still[1][..., :9].any()
    assert (still[1][..., 9:] == -2).all()
    report = ff.dual.coverage(reader, x)
    assert report.share == 1


BAD = {
    "x list": (lambda: ff.jvp(Camera(), [*drawn()], None), TypeError, "x must be a torch.Tensor,"),
    "a tensor": (lambda: ff.jvp(Camera(), drawn(), DX[0]), TypeError, "dx must be a tuple as x"),
    "too few": (lambda: ff.jvp(Camera(), drawn(), DX[:1]), ValueError, "dx must have the entries"),
    "none": (lambda: ff.jvp(Camera(), drawn(), (None, None)), ValueError, "dx must hold tangents"),
    "counts": (
        lambda: ff.jvp(Camera(), drawn(), (DX[0].movedim(1, 0), torch.zeros(2, N, 2))),
        ValueError,
        "dx must hold P tangents of each entry",
    ),
    "shape": (lambda: ff.jvp(Camera(), drawn(), DX), ValueError, r"dx\[0\] must have shape"),
    "integers": (
        lambda: ff.jvp(Reader(), tokens(*words(0)), {"ids": words(0)[1][None]}),
        TypeError,
        r"dx\['ids'\] must be None",
    ),
    "keys": (
        lambda: measured(Camera(), ff.FiniteDifference(*streams(named, KEEP), STEP)),
        ValueError,
        r"plus must have the same entries .* got \(\[1, 3, 3\], \[2\]\) in batch 0 after",
    ),
    "a changed entry": (
        lambda: measured(Camera(), ff.FiniteDifference(*streams(KEEP, wider), STEP)),
        ValueError,
        r"plus must have .* got \(\[1, 3, 3\], \[4\]\) in batch 0 after \(\[1, 3, 3\], \[2\]\)",
    ),
}


def wider(image: Tensor, time: Tensor) -> Any:
    return image, torch.cat([time, time], 1)


def streams(*packs: Callable[..., Any]) -> list[Any]:
    return [stream(pack(*drawn())) for pack in packs]


@pytest.mark.parametrize("case", BAD)
def test_wrong_inputs_are_refused(case):
    """Catches torch's own words about arguments, and derivatives that are put to other entries."""
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=f"^{message}"):
        call()
