"""What every op keeps: right on each instruction set, the same bits for any number of threads,
float32 whatever torch's precision of products, and known to torch.library and torch.compile."""

import numpy as np
import pytest
import torch
from support.op_bounds import BOUNDS
from support.op_empty import EMPTY, empty_call
from support.op_views import VIEWS, seen_through
from support.pairwise import DTYPES, pairwise

from fisherfast import _native, ops
from fisherfast.ops import selfcheck
from fisherfast.ops.selfcheck import largest_error

CPU = torch.device("cpu")
OPS = list(selfcheck.calls(CPU, torch.float32))
ONES, ZEROS = [1, 1], [0, 0]

needs_kernel = pytest.mark.skipif(
    _native.load() is None, reason="FISHERFAST_DISABLE_NATIVE=1 is set: there are no kernels"
)


def solved(normal, count, dim, params, **kind):
    samples = normal(count, dim, 2 * dim + 3, **kind)
    return samples @ samples.mT, normal(count, dim, params, **kind), 2.0**-13, True, True


def added(normal, rows, dim, lifted, **kind):
    """The arguments of `lift_moments_`, with folds of several lengths, one of them empty."""
    size, device = dim + lifted, kind["device"]
    sums = torch.zeros(4, size, dtype=torch.float64, device=device)
    cross = torch.zeros(2, size, size, dtype=torch.float64, device=device)
    z, weight = normal(rows, dim, **kind), normal(lifted, dim, **kind) / dim**0.5
    offsets = torch.tensor([0, rows // 5, rows // 2, rows // 2, rows], device=device)
    vectors = (normal(lifted, **kind), normal(lifted, **kind))
    return sums, cross, z, weight, *vectors, offsets, 0.75, 0


def grouped(normal, rows, dim, **kind):
    group = torch.arange(rows, device=kind["device"]) % 3
    return normal(rows, dim, **kind), group, 3, normal(dim, **kind)


def factors(normal, n, columns, positions, inputs, outputs, **kind):
    b = normal(n, columns, positions, outputs, **kind)
    return normal(n, positions, inputs, **kind), b, None, None


def small_calls(normal, **kind):
    """Single numbers, and sizes around the vectors and panels of every instruction set."""
    return {
        "fisher_solve": lambda: [
            solved(normal, *size, **kind)
            for size in ((1, 1, 1), (17, 5, 2), (33, 16, 3), (9, 33, 1), (3, 130, 17))
        ],
        "moments": lambda: [
            grouped(normal, *size, **kind) for size in ((1, 1), (1030, 17), (333, 64))
        ],
        "lift_moments_": lambda: [
            added(normal, *size, **kind) for size in ((1, 1, 1), (517, 10, 63), (100, 33, 100))
        ],
        "spatial_moments": lambda: [
            (normal(*shape, **kind), normal(*shape[1:], **kind))
            for shape in ((1, 1, 1, 1), (130, 17, 3, 11), (40, 3, 4, 4))
        ],
        "patch_moments": lambda: [
            (normal(*shape, **kind), [3, 3], [stride, stride], ONES, ONES, groups)
            for shape, stride, groups in (
                ((1, 1, 3, 3), 1, 1), ((5, 17, 9, 21), 2, 1), ((3, 4, 9, 35), 1, 2),
            )
        ],
        "gradient_gram": lambda: [factors(normal, 1, 1, 1, 1, 1, **kind)],
        "gradient_squares": lambda: [
            (normal(*x, **kind), normal(x[0], m, *x[2:], **kind), [3, 1], ONES, [1, 0], ONES, 1)
            for x, m in (((1, 1, 1, 1), 1), ((70, 6, 5, 7), 34), ((3, 4, 20, 30), 150))
        ],
        "dual_norm": lambda: [
            (normal(6, 9, width, **kind), normal(c, **kind), normal(c, **kind), 0.125, 1,
             width // c, True)
            for width, c in ((2, 1), (19, 19), (700, 10))
        ],
        "dual_softmax": lambda: [
            (10 * normal(*shape, **kind), dim, log)
            for shape in ((1, 1, 1), (6, 19, 35), (10, 3, 130))
            for dim, log in ((1, False), (1, True), (2, False), (2, True))
        ],
        "dual_pool": lambda: [
            (normal(10, 2, 21, 7, 75, **kind), [3, 2], [stride, stride], ONES, [1, 2], False)
            for stride in (1, 2, 3)
        ],
    }  # fmt: skip


def large_calls(normal, **kind):
    """Work for three threads, on every way to share it."""
    return {
        "fisher_solve": lambda: [solved(normal, 301, 24, 2, **kind)],
        "fisher_solve_backward": lambda: [
            (normal(301, 3, 3, **kind), normal(301, 24, 3, **kind), 0.1),
        ],
        "moments": lambda: [grouped(normal, 20_001, 7, **kind), grouped(normal, 2500, 230, **kind)],
        "lift_moments_": lambda: [
            added(normal, 5001, 11, 70, **kind), (*added(normal, 40, 11, 70, **kind)[:-1], 30),
        ],
        "spatial_moments": lambda: [
            (order(normal(*shape, **kind)), None)
            for shape in ((600, 7, 5, 5), (3000, 17, 1, 1), (2, 3, 40, 40))
            for order in (torch.Tensor.contiguous, VIEWS["channels last"])
        ],
        "patch_moments": lambda: [
            (normal(*shape, **kind), [3, 3], ONES, ONES, ONES, groups)
            for shape, groups in (((9, 3, 40, 40), 1), ((4, 20, 12, 12), 1), ((5, 8, 30, 30), 8))
        ],
        "gradient_gram": lambda: [
            factors(normal, *size, **kind) for size in ((70, 2, 9, 60, 20), (3, 1, 400, 40, 30))
        ],
        "gradient_squares": lambda: [
            (normal(n, c, h, w, **kind), normal(n, m, h, w, **kind), [3, 3], ONES, ONES, ONES, g)
            for n, c, h, w, m, g in (
                (40, 3, 6, 7, 4, 1), (24, 31, 4, 5, 150, 1), (32, 19, 5, 6, 19, 19),
                (1600, 3, 3, 4, 5, 1),
            )
        ],
        "dual_norm": lambda: [
            (normal(*shape, **kind), normal(shape[-1], **kind), normal(shape[-1], **kind), 1e-5,
             1, 1, True)
            for shape in ((5, 700, 300), (3, 7, 50_000), (17, 10_000, 3))
        ],
        "dual_softmax": lambda: [
            (normal(*shape, **kind), dim, log)
            for shape in ((5, 700, 300), (3, 7, 50_000), (17, 90, 30, 35))
            for dim, log in ((-1, False), (-2, True))
        ],
        "dual_pool": lambda: [
            (order(normal(*shape, **kind)), [3, 3], [2, 2], ONES, ONES, False)
            for shape in ((5, 16, 8, 32, 32), (3, 300, 20, 7, 9))
            for order in (torch.Tensor.contiguous, VIEWS["channels last"])
        ],
    }  # fmt: skip


def bound(op, dtype):
    """Twice as much where plain torch runs dual_norm: its means are rounded to the dtype."""
    plain = op == "dual_norm" and not _native.serves(torch.empty(0))
    return BOUNDS[op][dtype] * (2 if plain else 1)


def assert_same_bits(with_threads, op, call):
    one = with_threads(1, lambda: selfcheck.results_of(op, call))
    for threads in (2, 3):
        got = with_threads(threads, lambda: selfcheck.results_of(op, call))
        for left, right in zip(got, one, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("op", OPS)
def test_right_on_every_instruction_set(machine, with_threads, normal, dtype, op):
    """Catches a kernel of one instruction set alone that is wrong, or that computes a number in a
    vector for one number of threads and by itself for another."""
    calls = selfcheck.calls(machine, dtype)[op]
    calls += small_calls(normal, dtype=dtype, device=machine).get(op, list)()
    assert largest_error(op, calls) <= bound(op, dtype)
    if _native.load() is not None:
        for call in calls:
            assert_same_bits(with_threads, op, call)


@needs_kernel
@pytest.mark.parametrize("op", OPS)
def test_the_kernel_is_used(monkeypatch, op):
    """Catches plain torch that stands in for a kernel, right but slow."""
    called = []
    monkeypatch.setattr(_native, "call", lambda name, *_, **__: called.append(name))
    for call in selfcheck.calls(CPU, torch.float32)[op]:
        selfcheck.results_of(op, call)
        assert called.pop() == op.removesuffix("_")


@needs_kernel
@pytest.mark.parametrize("op", [op for op in OPS if op != "dual_activation"])  # in its own file
def test_threads_change_no_bit(normal, dtype, with_threads, op):
    """Catches sums whose order follows from who computes them."""
    for call in large_calls(normal, dtype=dtype, device=CPU)[op]():
        assert_same_bits(with_threads, op, call)


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
        assert largest_error(op, [call]) <= bound(op, dtype)
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
    assert largest_error(op, [(x, *others)]) == 0


@pytest.mark.parametrize("op", OPS)
def test_reduced_matmul_precision_does_not_reach_it(device, route, op):
    """Catches bfloat16 products, whose error would be about 1e-3."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = largest_error(op, selfcheck.calls(device, torch.float32)[op])
    finally:
        torch.set_float32_matmul_precision(former)
    assert error <= bound(op, torch.float32)


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
