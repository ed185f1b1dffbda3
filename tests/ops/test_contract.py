"""What holds for every op: it takes empty input and any strides, keeps float32 whatever precision
torch uses for matrix products, and works with torch.library and torch.compile."""

import numpy as np
import pytest
import torch
from support.op_cases import ONES, ZEROS
from support.op_empty import EMPTY, empty_call
from support.op_oracle import assert_right
from support.op_views import VIEWS, seen_through
from support.pairwise import DTYPES, pairwise

from fisherfast import _native, ops
from fisherfast.ops import selfcheck

CPU = torch.device("cpu")
OPS = list(selfcheck.calls(CPU, torch.float32))

needs_kernel = pytest.mark.skipif(
    _native.load() is None, reason="FISHERFAST_DISABLE_NATIVE=1 is set: there are no kernels"
)


@needs_kernel
@pytest.mark.parametrize("op", OPS)
def test_the_kernel_is_used(monkeypatch, op):
    """Catches plain torch that stands in for a kernel, right but slow."""
    called = []
    monkeypatch.setattr(_native, "call", lambda name, *_, **__: called.append(name))
    for call in selfcheck.calls(CPU, torch.float32)[op]:
        selfcheck.results_of(op, call)
        assert called.pop() == op.removesuffix("_")


@pytest.mark.parametrize(("op", "shapes"), EMPTY)
def test_empty_input(device, dtype, route, op, shapes):
    """Zeros where a sum is empty, not what happens to be in memory, in the shape that torch.library
    knows."""
    call = empty_call(op, shapes, dtype=dtype, device=device)
    got = selfcheck.results_of(op, call)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in call]
    for result, known in zip(got, selfcheck.results_of(op, meta), strict=True):
        assert (result.shape, result.dtype) == (known.shape, known.dtype)
        assert result.eq(5 if result.dtype == torch.int64 and shapes == ((5, 0),) else 0).all()


@pairwise(op=OPS, view=list(VIEWS), dtype=DTYPES)
def test_any_strides(device, dtype, op, view):
    """Catches a stride that is assumed, or taken from another argument, vector loads that need an
    aligned address, and an input that is changed."""
    for call in seen_through(view, op, selfcheck.calls(device, dtype)[op][0]):
        before = [a.clone() for a in call if isinstance(a, torch.Tensor)]
        assert_right(op, call)
        after = [a for a in call if isinstance(a, torch.Tensor)]
        assert all(map(torch.equal, after, before))


@needs_kernel
@pytest.mark.parametrize("flag", [False, True], ids=["plain", "centred, log"])
@pytest.mark.parametrize("inner", [1, 5, 40])
@pytest.mark.parametrize("op", ["dual_norm", "dual_softmax"])
def test_the_result_may_overwrite_the_input(monkeypatch, normal, dtype, op, inner, flag):
    """Catches a primal that is written before the last tangent has been computed."""
    kernel = _native.call
    vectors = normal(50, dtype=dtype), normal(50, dtype=dtype)
    others = (*vectors, 1e-5, inner, inner, flag) if op == "dual_norm" else (2, flag)
    for tangents in (0, 1, 5):
        x = normal(1 + tangents, 40, 50, *[inner] * (op == "dual_softmax"), dtype=dtype)
        (expected,) = selfcheck.results_of(op, (x, *others))
        with monkeypatch.context() as patch:
            patch.setattr(_native, "call", lambda *a, **k: kernel(*a, **k | {"y": k["x"]}))
            selfcheck.results_of(op, (x, *others))
        assert torch.equal(x, expected)


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["n", "C", "H", "W"])
@pytest.mark.parametrize("op", ["spatial_moments", "gradient_squares"])
def test_offsets_beyond_32_bits(op, dim):
    """Two elements 2^31 + 8 apart along one axis of x: catches an int for an offset or a stride.

    The memory between them is never touched, so it is never there (numpy allocates it lazily).
    """
    far = 2**31 + 8
    try:
        buffer = torch.from_numpy(np.zeros(far + 100, dtype=np.float32))
    except MemoryError:
        pytest.skip("8.6 GB of address space must be there for this test")
    shape, strides = [3, 3, 3, 3], [27, 9, 3, 1]
    shape[dim], strides[dim] = 2, far
    x, numbers = buffer.as_strided(shape, strides), torch.arange(54.0).reshape(shape)
    x.copy_(numbers - 20)
    others = (None,) if op == "spatial_moments" else (numbers % 5 - 2, ONES, ONES, ZEROS, ONES, 1)
    assert_right(op, (x, *others), bounds={op: {torch.float32: 0.0}})


@pytest.mark.parametrize("op", OPS)
def test_reduced_matmul_precision_does_not_reach_it(device, route, op):
    """Catches bfloat16 products, whose error would be about 1e-3."""
    calls = selfcheck.calls(device, torch.float32)[op]
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for call in calls:
            assert_right(op, call)
    finally:
        torch.set_float32_matmul_precision(former)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, route, op):
    """Catches a fake implementation of another shape, dtype or layout, and an argument that changes
    although the schema does not say so."""
    calls = selfcheck.calls(device, torch.float32)[op]
    utils = ["test_schema", "test_faketensor"]
    if route == "kernel":  # torch.compile, the slow one, sees the same graph on both routes
        utils.append("test_aot_dispatch_dynamic")
    for call in calls[:: max(len(calls) - 1, 1)]:  # the first and the last
        torch.library.opcheck(getattr(torch.ops.fisherfast, op).default, call, test_utils=utils)


# Shapes of the tensors, the other arguments by position and by name.
COMPILED = {
    "fisher_solve": ([(3, 3), (3, 2)], [], {}),
    "moments": ([(20, 3)], [], {}),
    "spatial_moments": ([(20, 3, 4, 5)], [], {}),
    "patch_moments": ([(3, 4, 5, 6)], [(2, 2)], {"stride": (2, 1)}),
    "lift_moments_": ([(2, 8), (2, 8, 8), (20, 3), (5, 3), (5,), (5,)], [], {}),
    "gradient_gram": ([(3, 5, 4), (3, 5, 6)], [], {}),
    "gradient_squares": ([(3, 4, 5, 6), (3, 6, 5, 6)], [(3, 3)], {"padding": (1, 1), "groups": 2}),
    "dual_activation": ([(3, 2, 4, 5)], ["elu", 1.0, 1.0, 1.0], {}),
    "in_place": ([(3, 2, 4, 5)], ["gelu"], {}),
    "dual_norm": ([(3, 4, 24), (4,), (4,)], [], {"eps": 1e-3, "groups": 2, "inner": 12}),
    "dual_softmax": ([(3, 4, 24)], [1], {"log": True}),
    "dual_pool": ([(3, 2, 4, 6, 7)], [[3, 2]], {"ceil_mode": True}),
}


def in_place(x, kind):
    return ops.dual_activation(x, kind, out=x)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles(normal, name):
    """In one graph. Catches a check that torch.compile cannot trace, and a lost mutation."""
    shapes, others, options = COMPILED[name]
    given = [normal(*shape) for shape in shapes]
    function = getattr(ops, name, in_place)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    runs = []
    for run in (function, compiled):
        tensors = [tensor.clone() for tensor in given]
        results = run(*tensors, *others, **options)
        runs.append(
            [*tensors, *([results] if isinstance(results, torch.Tensor) else results or [])]
        )
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
