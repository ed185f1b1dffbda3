"""The CUDA kernels of lift_moments, run on the host, against sums in float64."""

import pytest
import torch
from support.closeness import assert_close
from support.op_bounds import BOUNDS
from support.pairwise import DTYPES, pairwise

from fisherfast import ops
from fisherfast.ops import _lift

# Errors relative to the largest result, float32 and float64. Measured: 2.4e-7 and 2.3e-15.
TOLERANCE = BOUNDS["lift_moments_"]
SLOPE = 0.75  # the same number in float32 and float64


def draw(normal, dtype, rows, dim, lifted, folds, halves):
    """z, weight, bias, pilot of the dtype, and what sums and cross hold before the call."""
    shapes = {"z": (rows, dim), "weight": (lifted, dim), "bias": (lifted,), "pilot": (lifted,)}
    size = dim + lifted
    before = {"sums": normal(folds, size), "cross": normal(halves, size, size)}
    return {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()} | before


def segments(rows, folds):
    """Offsets [F + 1] of segments of rows of many lengths, the fourth of them empty."""
    weight = torch.tensor([0.0 if s == 3 else 1.0 + s % 3 for s in range(folds)])
    ends = (weight.cumsum(0) / weight.sum() * rows).round().long()
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends])


def lift_moments(kernels, inputs, start=0, **settings):
    """Sums [F, K] and cross [H, K, K] after the call."""
    inputs = {"offsets": segments(len(inputs["z"]), len(inputs["sums"]))} | inputs
    inputs |= {name: inputs[name].clone() for name in ("sums", "cross")}
    with kernels.serving(**settings):
        ops.lift_moments_(**inputs, slope=SLOPE, start=start)
    return inputs["sums"], inputs["cross"]


def truth_of(inputs, start=0):
    """What has to be added, in float64: zero in the columns, rows and triangle left alone."""
    z, weight, bias, pilot = (inputs[name].double() for name in ("z", "weight", "bias", "pilot"))
    lifted = torch.nn.functional.leaky_relu(z @ weight.mT + bias, SLOPE) - pilot
    features = torch.cat([z, lifted], 1)
    folds = len(inputs["sums"])
    order = torch.tensor([*range(0, folds, 2), *range(1, folds, 2)])
    row = order.repeat_interleave(inputs.get("offsets", segments(len(z), folds)).diff())
    sums, cross = torch.zeros_like(inputs["sums"]), torch.zeros_like(inputs["cross"])
    size = features.shape[1]  # the accumulators may have room for more
    for g in range(len(sums)):
        sums[g, :size] = features[row == g].sum(0)
    for h in range(len(cross)):
        half = features[row % len(cross) == h]
        cross[h, :size, :size] = (half.mT @ half).tril()
    sums[:, :start] = 0
    cross[:, :start] = 0
    return sums, cross


def assert_matches(got, inputs, start=0):
    for name, result, expected in zip(("sums", "cross"), got, truth_of(inputs, start), strict=True):
        added = result - inputs[name]
        assert torch.equal(added == 0, expected == 0)  # what is left alone keeps its bits
        assert_close(added, expected, TOLERANCE[inputs["z"].dtype])


SHAPES = [(1, 1, 1), (3, 2, 5), (600, 7, 30), (40, 70, 62), (65, 5, 140)]  # n d k


@pairwise(shape=SHAPES, parts=[(1, 1), (16, 2), (5, 2)], dtype=DTYPES)
def test_matches_the_definition(kernels, normal, dtype, shape, parts):
    inputs = draw(normal, dtype, *shape, *parts)
    assert_matches(lift_moments(kernels, inputs), inputs)


@pytest.mark.parametrize("start", [1, 6, 64, 71, 100])
def test_only_new_features_are_added(kernels, normal, dtype, start):
    inputs = draw(normal, dtype, 50, 6, 94, 4, 2)
    assert_matches(lift_moments(kernels, inputs, start), inputs, start)


def test_room_for_more_features_is_left_alone(kernels, normal, dtype):
    inputs = draw(normal, dtype, 50, 6, 30, 4, 2)
    inputs |= {"sums": normal(4, 41), "cross": normal(2, 41, 41)}
    assert_matches(lift_moments(kernels, inputs, 3), inputs, 3)


@pytest.mark.parametrize(
    ("dtype", "offsets"), [(torch.float32, None), (torch.float64, [0, 8200, 8205, 8269])]
)
def test_several_chunks_of_rows(kernels, normal, dtype, offsets):
    """More rows than the workspace holds at a time: segments and halves go on in the second chunk,
    or begin and end in one."""
    inputs = draw(normal, dtype, 8192 + 77, 2, 3, 3, 2)
    if offsets is not None:
        inputs["offsets"] = torch.tensor(offsets)
    assert_matches(lift_moments(kernels, inputs), inputs)


@pytest.mark.parametrize("offsets", [[0, 0, 30], [0, 30, 30], [-5, 40, 90], [0, 90, -7]])
def test_wrong_offsets_read_no_row_outside(kernels, normal, dtype, monkeypatch, offsets):
    """They are not checked on the device: the sanitizer sees a row that is not there."""
    monkeypatch.setattr(_lift, "_check_segments", lambda offsets, rows: None)
    inputs = draw(normal, dtype, 30, 4, 9, 2, 2)
    got = lift_moments(kernels, inputs | {"offsets": torch.tensor(offsets)})
    assert all(bool(result.isfinite().all()) for result in got)


@pytest.mark.parametrize(("rows", "dim", "lifted"), [(0, 3, 2), (4, 0, 3), (4, 3, 0), (4, 0, 0)])
def test_empty_input(kernels, normal, dtype, rows, dim, lifted):
    inputs = draw(normal, dtype, rows, dim, lifted, 2, 1)
    assert_matches(lift_moments(kernels, inputs), inputs)


def test_a_nan_stays_in_its_feature_fold_and_half(kernels, normal, dtype):
    inputs = draw(normal, dtype, 20, 3, 4, 4, 2)
    inputs["weight"][:, 1] = 0
    inputs["bias"][2] = float("nan")  # feature 5
    inputs["offsets"] = torch.tensor([0, 5, 9, 13, 20])
    sums, cross = lift_moments(kernels, inputs)
    assert sums.isnan().nonzero().tolist() == [[g, 5] for g in range(4)]
    assert cross[0].isnan().nonzero().tolist() == [*([5, j] for j in range(6)), [6, 5]]
