"""dual_activation against closed forms, its float64 reference, PyTorch's derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.op_cases import channels_last
from support.op_oracle import assert_right, truth_of

from fisherfast import _native, ops
from fisherfast.ops import reference_dual

# PyTorch's forward mode loads decompositions, once, through a function that it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

# The function in PyTorch, its kind and parameters here, and the points where it has kinks.
CASES = {
    "identity": (lambda z: z * 1, "identity", (), ()),
    "relu": (F.relu, "relu", (), (0.0,)),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.25), "leaky_relu", (0.25,), (0.0,)),
    "hardtanh": (lambda z: F.hardtanh(z, -0.5, 2.0), "hardtanh", (-0.5, 2.0), (-0.5, 2.0)),
    "relu6": (F.relu6, "hardtanh", (0.0, 6.0), (0.0, 6.0)),
    "elu": (lambda z: F.elu(z, 1.5), "elu", (1.5, 1.0, 1.0), (0.0,)),
    "selu": (F.selu, "elu", (SELU_ALPHA, SELU_SCALE, 1.0), (0.0,)),
    "celu": (lambda z: F.celu(z, 2.0), "elu", (2.0, 1.0, 0.5), (0.0,)),
    "gelu": (F.gelu, "gelu", (), ()),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh", (), ()),
    "silu": (F.silu, "silu", (), ()),
    "mish": (F.mish, "mish", (), ()),
    "softplus": (F.softplus, "softplus", (1.0, 20.0), (20.0,)),
    "softplus, sharp": (lambda z: F.softplus(z, 4.0, 8.0), "softplus", (4.0, 8.0), (2.0,)),
    "sigmoid": (torch.sigmoid, "sigmoid", (), ()),
    "tanh": (torch.tanh, "tanh", (), ()),
    "hardswish": (F.hardswish, "hardswish", (), (-3.0, 3.0)),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid", (), (-3.0, 3.0)),
}

# PyTorch rounds 1/6, the slope of hardsigmoid, to float32 in float64 too.
SLOPE_ROUNDING = {"hardsigmoid": 4e-8}

# Results of this size leave the caches: the kernel then writes past them.
BEYOND_THE_CACHES = 17 * 2**20


needs_kernel = pytest.mark.skipif(
    _native.load() is None, reason="FISHERFAST_DISABLE_NATIVE=1 is set: there is no kernel"
)


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_reference_has_the_values_and_derivatives_of_pytorch(normal, case):
    """Catches a wrong formula in what everything else is compared with. PyTorch's own GELU loses
    digits in the tail, where it subtracts one from one (4e-15 measured): hence the absolute part.
    """
    function, kind, parameters, _ = CASES[case]
    z, v = 4 * normal(3000), normal(2, 3000)
    got = reference_dual.dual_activation(torch.cat([z[None], v]), kind, parameters)
    for tangent, result in zip(v, got[1:], strict=True):
        value, derivative = torch.func.jvp(function, (z,), (tangent,))
        torch.testing.assert_close(got[0], value, rtol=1e-14, atol=1e-14)
        rounding = max(SLOPE_ROUNDING.get(case, 0), 1e-14)
        torch.testing.assert_close(result, derivative, rtol=rounding, atol=1e-14)


# --- the closed forms, to forty digits -----------------------------------------------------------

# Error of a value and of a slope, in units of the spacing of the dtype at the result. Measured: at
# most 2.7. Where terms of the slope cancel, at its zero, the unit is that of the larger term.
ULPS = 4
# A denormal factor has fewer digits: so many of its last one, times the other factors of a slope.
DENORMAL_UNITS = 1000


def exact_forms(mp):
    """f and f' in the numbers of mpmath, by kind; the parameters are those of CASES."""

    def logistic(z):
        return 1 / (1 + mp.exp(-z))

    def gelu(z):
        below = mp.erfc(-z / mp.sqrt(2)) / 2
        return z * below, below + z * mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)

    def gelu_tanh(z):
        u = mp.sqrt(8 / mp.pi) * (z + mp.mpf("0.044715") * z**3)
        inner = mp.sqrt(8 / mp.pi) * (1 + 3 * mp.mpf("0.044715") * z * z)
        return z * logistic(u), logistic(u) * (1 + z * logistic(-u) * inner)

    def mish(z):
        soft = mp.log1p(mp.exp(z))
        return z * mp.tanh(soft), mp.tanh(soft) + z * logistic(z) * mp.sech(soft) ** 2

    def elu(z):
        return (z, mp.mpf(1)) if z > 0 else (mp.mpf("1.5") * mp.expm1(z), mp.mpf("1.5") * mp.exp(z))

    return {
        "elu": elu,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "silu": lambda z: (z * logistic(z), logistic(z) * (1 + z * logistic(-z))),
        "mish": mish,
        "softplus": lambda z: (mp.log1p(mp.exp(z)), logistic(z)),
        "sigmoid": lambda z: (logistic(z), logistic(z) * logistic(-z)),
        "tanh": lambda z: (mp.tanh(z), mp.sech(z) ** 2),
    }


def accuracy_points(dtype):
    """Small, middling and large numbers; up to where softplus becomes linear."""
    small = torch.logspace(-30, -1, 30, dtype=torch.float64)
    middle = torch.linspace(-12.3, 12.1, 150, dtype=torch.float64)
    large = torch.linspace(-80.7, 19.9, 40, dtype=torch.float64)
    return torch.cat([small, -small, middle, large]).to(dtype)


@needs_kernel
@pytest.mark.parametrize("case", ["elu", "gelu", "gelu_tanh", "silu", "mish", "softplus", "sigmoid",
                                  "tanh"])  # fmt: skip
def test_right_to_a_few_units_in_the_last_place(machine, dtype, case):
    """Catches cancellation: tanh and elu near 0, gelu and sigmoid in the tail."""
    mp = pytest.importorskip("mpmath", reason="mpmath comes with torch, but not here").mp
    _, kind, parameters, _ = CASES[case]
    z = accuracy_points(dtype)
    x = torch.stack([z, torch.ones_like(z)]).to(machine)
    got = ops.dual_activation(x, kind, *parameters).cpu()
    limits, function = torch.finfo(dtype), exact_forms(mp)[case]
    with mp.workdps(40):
        for point, value, slope in zip(z.tolist(), *got.tolist(), strict=True):
            exact_value, exact_slope = function(mp.mpf(point))
            units = ULPS
            if case == "gelu_tanh":  # the rounding of u multiplies exp(u) by |u|
                units *= 1 + 1.6 * abs(point) + 0.08 * abs(point) ** 3
            two_terms = case in ("gelu", "gelu_tanh", "silu", "mish")
            term = abs(exact_value / point) if two_terms else 0
            smallest = DENORMAL_UNITS * limits.tiny * limits.eps
            bound = units * limits.eps
            assert abs(value - exact_value) <= bound * abs(exact_value) + smallest, point
            assert abs(slope - exact_slope) <= bound * (abs(exact_slope) + 2 * term) + smallest, (
                point
            )


# --- kinks and special numbers -------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3]])
def test_the_derivative_at_a_kink_is_that_of_pytorch(machine, dtype, case):
    """Catches < for <=, by reverse mode and by forward mode, in vectors and in the rest."""
    function, kind, parameters, kinks = CASES[case]
    middle = torch.tensor([*kinks, -0.0], dtype=dtype)
    up, down = torch.full_like(middle, math.inf), torch.full_like(middle, -math.inf)
    neighbours = [torch.nextafter(middle, up), torch.nextafter(middle, down)]
    z = torch.cat([middle, *neighbours]).repeat(19).to(machine)
    got = ops.dual_activation(torch.stack([z, torch.ones_like(z)]), kind, *parameters)
    value, derivative = torch.func.jvp(function, (z,), (torch.ones_like(z),))
    primal = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(primal).sum(), primal)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[0], value, rtol=rounding, atol=rounding)
    rounding = max(SLOPE_ROUNDING.get(case, 0), rounding)
    torch.testing.assert_close(got[1], derivative, rtol=rounding, atol=0)
    torch.testing.assert_close(got[1], gradient, rtol=rounding, atol=0)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_derivative_of_prelu_at_zero_is_that_of_the_backward_pass(machine, dtype, zero):
    """PyTorch's two modes differ there: its backward pass takes the slope below zero, its forward
    mode one. Here as in the backward pass, which is also that of leaky_relu in both modes."""
    z = torch.full((23,), zero, dtype=dtype, device=machine)
    slope = torch.tensor([0.25], dtype=dtype, device=machine)
    primal = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.prelu(primal, slope).sum(), primal)
    x = torch.stack([z, torch.ones_like(z)])[:, None]
    got = ops.dual_activation(x, "prelu", slope=slope, channel_dim=1)
    assert torch.equal(got[1, 0], gradient)
    assert torch.equal(got[0, 0], z)


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0]


@pytest.mark.parametrize("case", CASES)
def test_nan_and_infinity_give_what_pytorch_gives(machine, case):
    """As its vectors on the CPU do: for the numbers left over after the last vector its slopes at
    NaN differ (1 for hardtanh, elu and hardswish). In float64, as the vectors of its float32
    GELU make NaN of infinity. Catches a NaN that is swallowed by a comparison."""
    function, kind, parameters, _ = CASES[case]
    z = torch.tensor(SPECIAL, dtype=torch.float64).repeat(32)
    x = torch.stack([z, torch.ones_like(z)]).to(machine)
    got = ops.dual_activation(x, kind, *parameters).cpu()
    primal = z.clone().requires_grad_()
    value = function(primal)
    (gradient,) = torch.autograd.grad(value.sum(), primal)
    torch.testing.assert_close(got[0], value.detach(), rtol=1e-15, atol=1e-15, equal_nan=True)
    rounding = max(SLOPE_ROUNDING.get(case, 0), 1e-15)
    torch.testing.assert_close(got[1], gradient, rtol=rounding, atol=1e-15, equal_nan=True)


EXTREME = {
    torch.float32: [1e30, -1e30, 1e-44, -1e-44, 1e-38, -87.0, -88.5, -100.0, 88.5, 89.0, -104.0],
    torch.float64: [1e300, -1e300, 5e-324, -1e-310, -708.0, -740.0, -744.9, 709.7, 711.0, -746.0],
}


@needs_kernel
@pytest.mark.parametrize("case", CASES)
def test_overflow_and_denormal_numbers(machine, dtype, case):
    """Each number by itself, to the last denormal one. Catches infinity times 0, and an exp whose
    power of two leaves the range of the exponent."""
    _, kind, parameters, _ = CASES[case]
    points = [*EXTREME[dtype], *SPECIAL]
    if dtype == torch.float64 and case in ("sigmoid", "silu", "mish"):
        # PyTorch's sigmoid is 0 below -709.8, where it is still a number, and there is no truth
        points = [z for z in points if not 709 < abs(z) < 1000]
    z = torch.tensor(points, dtype=dtype, device=machine).repeat(17)
    x = torch.stack([z, torch.ones_like(z)])
    got = ops.dual_activation(x, kind, *parameters)
    (truth,) = truth_of("dual_activation", (x, kind, parameters))
    limits = torch.finfo(dtype)
    smallest = DENORMAL_UNITS * limits.tiny * limits.eps
    # 100: softplus with beta rounds the argument of exp
    close = {"rtol": 100 * limits.eps, "atol": smallest, "equal_nan": True}
    torch.testing.assert_close(got.double(), truth, **close)


@pytest.mark.parametrize("input_scale", [-2.0, -0.5, 0.0, 3.0])
def test_elu_with_any_input_scale(machine, dtype, normal, input_scale):
    """Catches an exp that is only right below zero: this one grows."""
    z = torch.cat([10 * normal(500), torch.tensor([-20.0, -29.5])])
    x = torch.stack([z, torch.ones_like(z)]).to(machine, dtype)
    got = ops.dual_activation(x, "elu", 0.75, 2.0, input_scale)
    (truth,) = truth_of("dual_activation", (x, "elu", (0.75, 2.0, input_scale)))
    rounding = 40 * torch.finfo(dtype).eps  # of the argument of exp, up to 60
    torch.testing.assert_close(got.double(), truth, rtol=rounding, atol=rounding)


# --- layouts -------------------------------------------------------------------------------------

SHAPES = [
    (1,), (17, 3, 5, 2, 2), (2, 3, 70, 1), (3, 1, 5, 1025), (3, 0, 4), (1, 0), (2, 31, 2, 3, 11),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_shapes(machine, dtype, normal, case):
    """P from 0 to 16, no number, one, odd ones, blocks that are not whole."""
    _, kind, parameters, _ = CASES[case]
    for shape in SHAPES:
        x = 3 * normal(*shape, dtype=dtype, device=machine)
        assert_right("dual_activation", (x, kind, list(parameters), None, None, None, 1))


@pytest.mark.parametrize("dims", [(2, -1), (2, 1), (1, -1)])
def test_the_result_has_the_layout_of_the_input(device, dtype, route, normal, dims):
    """Channels last, channels first, samples last. Catches a y in another layout."""
    x = normal(4, 3, 7, 5, 6, dtype=dtype, device=device)
    x = x.movedim(*dims).contiguous().movedim(*reversed(dims))
    assert ops.dual_activation(x, "relu").stride() == x.stride()


# --- the kernel itself ---------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("offset", [0, 1, 5, 16])
def test_nothing_is_written_outside_the_result(machine, dtype, normal, offset):
    """Catches the vector store that begins before y or ends after a slice, and the streaming store
    to an address that is not a boundary."""
    gap, streamed = 40, BEYOND_THE_CACHES // (3 * dtype.itemsize)
    for size in (*range(1, 20), 63, 64, 65, 1023, 1030, streamed):
        x = normal(3, size, dtype=dtype, device=machine)
        memory = torch.full((3 * (size + gap) + offset,), 7.0, dtype=dtype, device=machine)
        slices = memory[offset:].view(3, size + gap)
        ops.dual_activation(x, "elu", 1.0, 1.0, 1.0, out=slices[:, :size])
        assert torch.equal(slices[:, :size], ops.dual_activation(x, "elu", 1.0, 1.0, 1.0)), size
        assert slices[:, size:].eq(7).all(), size
        assert memory[:offset].eq(7).all(), size


# --- a given result ------------------------------------------------------------------------------

LAYOUTS = {
    "dense": lambda x: x,
    "permuted": lambda x: x.transpose(2, 3),
    "channels last": channels_last,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "beyond the caches": lambda x: x.repeat(1, 1, 1, BEYOND_THE_CACHES // 3000),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_given_result(device, dtype, route, normal, layout):
    """Catches a value that is overwritten before it is read, a result in the order of another
    layout or not written to the end, and numbers next to the buffer that change."""
    x = LAYOUTS[layout](normal(3, 2, 5, 14, dtype=dtype, device=device))
    channels = x.shape[2]
    options = {name: normal(channels, dtype=dtype, device=device) for name in ("scale", "shift")}
    expected = ops.dual_activation(x, "gelu", **options)
    other = torch.full_like(x.movedim(1, -1), math.nan).contiguous().movedim(-1, 1)
    between = x.as_strided(x.shape, x.stride(), 1).clone() if layout == "strided" else None
    for out in (other, x):
        assert ops.dual_activation(x, "gelu", **options, out=out) is out
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    if layout == "strided":
        assert torch.equal(x.as_strided(x.shape, x.stride(), 1), between)


def test_an_end_at_infinity_cuts_nothing(dtype, route, normal):
    """`nn.Hardtanh(0, inf)` is a ReLU. Catches a network that is refused for it."""
    x = normal(3, 40, dtype=dtype)
    got = ops.dual_activation(x, "hardtanh", 0.0, math.inf)
    assert torch.equal(got, ops.dual_activation(x, "relu"))
