"""lift against its float64 reference, by hand, and on every bad input."""

import math

import pytest
import torch
from support.closeness import assert_close

from fisherfast import ops
from fisherfast.ops import reference

# Errors relative to the largest result. Measured: 1e-7 and 4e-15.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-14}
SLOPE = 0.75  # the same number in float32 and float64


def assert_matches(got, truth, dtype):
    for result, expected in zip(got, truth, strict=True):
        assert_close(result, expected, TOLERANCE[dtype])


@pytest.fixture
def inputs(normal, device, dtype):
    def draw(rows, dim):
        kind = {"dtype": dtype, "device": device}
        return normal(rows, dim, **kind), normal(dim, **kind), normal(dim, **kind)

    return draw


def test_by_hand(device, dtype):
    kind = {"dtype": dtype, "device": device}
    features, sums = ops.lift(
        torch.tensor([[-1.0, 2.0], [3.0, -5.0], [0.0, 1.0]], **kind),
        torch.tensor([0.0, 1.0], **kind),
        torch.tensor([1.0, 0.5], **kind),
        slope=0.5,
        num_groups=2,
        first=1,
    )
    assert features.tolist() == [[-1.5, 2.5], [2.0, -2.5], [-1.0, 1.5]]
    assert sums.tolist() == [[2.0, -2.5], [-2.5, 4.0]]  # rows 0 and 2 are dealt to fold 1
    assert features.dtype == dtype
    assert sums.dtype == torch.float64


@pytest.mark.parametrize(("groups", "first"), [(1, 0), (2, 1), (16, 1_000_003)])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (2, 3), (100, 33), (5001, 40), (3, 700)])
def test_matches_the_reference(inputs, dtype, rows, dim, groups, first):
    projected, bias, pilot = inputs(rows, dim)
    got = ops.lift(projected, bias, pilot, slope=SLOPE, num_groups=groups, first=first)
    doubles = (projected.double(), bias.double(), pilot.double())
    assert_matches(got, reference.lift(*doubles, SLOPE, groups, first), dtype)


@pytest.mark.parametrize("slope", [0.0, 1.0, -1.0, 3.0])
def test_any_finite_slope(inputs, dtype, slope):
    projected, bias, pilot = inputs(50, 4)
    doubles = (projected.double(), bias.double(), pilot.double())
    got = ops.lift(projected, bias, pilot, slope=slope)
    assert_matches(got, reference.lift(*doubles, slope), dtype)


def test_batches_deal_samples_as_one_call_does(inputs, dtype):
    projected, bias, pilot = inputs(1000, 5)
    features, sums = ops.lift(projected, bias, pilot, num_groups=7)
    parts = [
        ops.lift(projected[i : i + 300], bias, pilot, num_groups=7, first=i)
        for i in range(0, 1000, 300)
    ]
    assert torch.equal(torch.cat([part[0] for part in parts]), features)
    torch.testing.assert_close(sum(part[1] for part in parts), sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "expanded"])
def test_strided_input(inputs, view):
    base, vector, _ = inputs(40, 40)
    projected = {
        "rows": base[::3],
        "columns": base[:, 5:25],
        "transposed": base.T,
        "expanded": base[:1].expand(9, 40),
    }[view]
    k = projected.shape[1]
    bias, pilot = vector.expand(3, 40).T[:k, 0], base[:k, 3]
    got = ops.lift(projected, bias, pilot, num_groups=2)
    truth = ops.lift(projected.contiguous(), bias.contiguous(), pilot.contiguous(), num_groups=2)
    for left, right in zip(got, truth, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("rows", "dim"), [(0, 3), (4, 0), (0, 0)])
def test_empty_input(inputs, rows, dim):
    features, sums = ops.lift(*inputs(rows, dim), num_groups=2)
    assert features.shape == (rows, dim)
    assert sums.shape == (2, dim)
    assert sums.eq(0).all()


def test_a_nan_stays_in_its_column_and_fold(inputs):
    projected, bias, pilot = inputs(10, 3)
    projected[3, 1] = math.nan
    features, sums = ops.lift(projected, bias, pilot, num_groups=2)
    assert features.isnan().sum() == 1
    assert sums.isnan().nonzero().tolist() == [[1, 1]]


def test_threads_change_no_bit(normal, dtype, with_threads):
    projected, bias, pilot = (normal(*shape, dtype=dtype) for shape in ((9001, 11), (11,), (11,)))
    one = with_threads(1, lambda: ops.lift(projected, bias, pilot, num_groups=4))
    for threads in (2, 3):
        got = with_threads(threads, lambda: ops.lift(projected, bias, pilot, num_groups=4))
        for left, right in zip(got, one, strict=True):
            assert torch.equal(left, right)


P, B = torch.ones(4, 3), torch.ones(3)
WRONG = {
    "half": ((P.half(), B, B), {}, TypeError, "projected must be float32 or float64, got float16"),
    "int": ((P.int(), B, B), {}, TypeError, "projected must be float32 or float64, got int32"),
    "vector": ((B, B, B), {}, ValueError, "projected must have shape [n, k], got [3]"),
    "bias dtype": (
        (P, B.double(), B), {}, TypeError,
        "bias must have the dtype of projected (float32), got float64",
    ),
    "bias shape": ((P, B[:2], B), {}, ValueError, "bias must have shape [k] = [3], got [2]"),
    "pilot shape": ((P, B, B[None]), {}, ValueError, "pilot must have shape [k] = [3], got [1, 3]"),
    "slope": ((P, B, B), {"slope": math.inf}, ValueError, "slope must be finite, got inf"),
    "groups": ((P, B, B), {"num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
    "first": ((P, B, B), {"first": -1}, ValueError, "first must be at least 0, got -1"),
    "grad": (
        (P, B.clone().requires_grad_(), B), {}, RuntimeError,
        "bias must not require grad, got requires_grad=True: lift has no backward; "
        "pass bias.detach() or call it under torch.no_grad()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        ops.lift(*arguments, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(("rows", "dim", "groups", "first"), [(5, 3, 2, 7), (0, 3, 1, 0)])
def test_opcheck(inputs, rows, dim, groups, first):
    op = torch.ops.fisherfast.lift.default
    torch.library.opcheck(op, (*inputs(rows, dim), 0.7, groups, first))


def test_compiles(normal):
    arguments = (normal(20, 3), normal(3), normal(3))
    compiled = torch.compile(ops.lift, backend="aot_eager", fullgraph=True)
    for left, right in zip(compiled(*arguments), ops.lift(*arguments), strict=True):
        assert torch.equal(left, right)
