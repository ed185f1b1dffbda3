"""Every wrong input of every op, with its whole message; nothing is changed by the call."""

import math

import pytest
import torch

from fisherfast import ops
from fisherfast.ops._dual_activation import KINDS

ONE, TWO, INT = torch.ones, torch.float64, torch.int64
IMAGE, BUFFER = ONE(2, 4, 3, 5), ONE(3, 4, 5, 2)


def activation(x, kind="relu", parameters=(), **options):
    return ops.dual_activation(x, kind, *parameters, **options)


# What each op accepts, by name.
VALID = {
    "fisher_solve": {"cov": torch.eye(3), "deriv": ONE(3, 2)},
    "fisher_solve_backward": {"grad_fisher": ONE(3, 2, 2), "solution": ONE(3, 5, 2)},
    "moments": {
        "x": ONE(4, 3), "group": torch.zeros(4, dtype=INT), "num_groups": 2, "pilot": ONE(3),
    },
    "spatial_moments": {"x": IMAGE, "pilot": IMAGE[0]},
    "patch_moments": {"x": IMAGE, "kernel": (2, 2)},
    "lift_moments_": {
        "z": ONE(5, 3), "weight": ONE(4, 3), "bias": ONE(4), "pilot": ONE(4),
        "sums": torch.zeros(4, 7, dtype=TWO), "cross": torch.zeros(2, 7, 7, dtype=TWO),
        "offsets": torch.tensor([0, 2, 2, 4, 5]),
    },
    "gradient_gram": {
        "a": ONE(2, 3, 4), "b": ONE(2, 5, 3, 6), "other_a": ONE(2, 3, 4), "other_b": ONE(2, 3, 6),
    },
    "gradient_squares": {"x": ONE(4, 6, 5, 7), "g": ONE(4, 9, 5, 7)},
    "dual_activation": {
        "x": BUFFER, "kind": "prelu", "scale": ONE(5), "shift": ONE(5), "slope": ONE(5),
        "out": 0 * BUFFER,
    },
    "dual_norm": {"x": ONE(3, 4, 6), "weight": ONE(6), "bias": ONE(6)},
    "dual_softmax": {"x": BUFFER},
    "dual_pool": {"x": ONE(3, 2, 4, 6, 7), "kernel": [2, 2]},
}  # fmt: skip
TENSORS = [
    (op, name)
    for op, given in VALID.items()
    for name, value in given.items()
    if isinstance(value, torch.Tensor) and value.dtype != INT
]


def run(op, arguments):
    return (activation if op == "dual_activation" else getattr(ops, op))(**arguments)


def refused(error, op, **changed):
    """The message for valid arguments of which some are changed; no tensor is changed."""
    arguments = VALID[op] | changed
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    tensors = [tensor.detach() for tensor in tensors if not tensor.is_meta]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(error) as caught:
        run(op, arguments)
    assert all(map(torch.equal, tensors, before))
    return str(caught.value)


@pytest.mark.parametrize("op", VALID)
def test_valid_arguments_are_accepted(op):
    """Catches a refusal, below, of something else; without gradients every tensor may have one."""
    arguments = {
        name: value.clone().requires_grad_(value.is_floating_point())
        if isinstance(value, torch.Tensor)
        else value
        for name, value in VALID[op].items()
    }
    with torch.no_grad():
        run(op, arguments)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_every_tensor(op, name):
    """Another type, a dtype other than that of the first or than real ones, and a gradient that
    would be lost."""
    given, first = VALID[op][name], next(iter(VALID[op]))
    wrong, message = given.double(), f"{name} must have the dtype of {first} (float32), got float64"
    if name == first:
        wrong, message = given.half(), f"{name} must be float32 or float64, got float16"
    elif name in ("sums", "cross"):
        wrong, message = given.float(), f"{name} must be float64, got float32"
    assert refused(TypeError, op, **{name: wrong}) == message
    message = f"{name} must be a torch.Tensor, got ndarray"
    assert refused(TypeError, op, **{name: given.numpy()}) == message
    if op != "fisher_solve":  # which has a backward
        assert refused(RuntimeError, op, **{name: given.clone().requires_grad_()}) == (
            f"{name} must not require grad, got requires_grad=True: {op} has no backward; "
            f"pass {name}.detach() or call it under torch.no_grad()"
        )


@pytest.mark.parametrize(
    ("op", "name", "first"),
    [("fisher_solve", "deriv", "cov"), ("moments", "pilot", "x"), ("lift_moments_", "bias", "z"),
     ("lift_moments_", "cross", "z"), ("lift_moments_", "offsets", "z"), ("moments", "group", "x"),
     ("gradient_gram", "b", "a"), ("dual_norm", "bias", "x"), ("dual_activation", "out", "x")],
)  # fmt: skip
def test_another_device(op, name, first):
    """Catches the address of another device that a kernel would read."""
    message = f"{name} must be on the device of {first} (cpu), got meta"
    assert refused(ValueError, op, **{name: VALID[op][name].to("meta")}) == message


SHAPE = "{} must have shape {}, got {}".format
NUMBERS = "{} must hold 2 numbers of at least {}, got {}".format
DIM = "dim must be a dimension of x but the first, 1 to 3, got {}".format
RISE = "offsets must rise from 0 to n = 5, got {}".format

# The op, what is changed, and the message of the ValueError.
WRONG = [
    ("fisher_solve", {"cov": ONE(3)}, SHAPE("cov", "[..., d, d]", [3])),
    ("fisher_solve", {"cov": ONE(2, 3)}, SHAPE("cov", "[..., d, d]", [2, 3])),
    ("fisher_solve", {"deriv": ONE(3)},
     SHAPE("deriv", "[..., d, P] with [..., d] = [3]", [3])),
    ("fisher_solve", {"cov": ONE(1, 3, 3), "deriv": ONE(1, 2, 2)},
     SHAPE("deriv", "[..., d, P] with [..., d] = [1, 3]", [1, 2, 2])),
    ("fisher_solve", {"ridge": -0.1}, "ridge must be finite and at least 0, got -0.1"),
    ("fisher_solve", {"ridge": math.nan}, "ridge must be finite and at least 0, got nan"),
    ("fisher_solve", {"ridge": math.inf}, "ridge must be finite and at least 0, got inf"),
    ("fisher_solve_backward", {"grad_fisher": ONE(3, 1, 2)},
     SHAPE("grad_fisher", "[..., P, P] = [3, 2, 2]", [3, 1, 2])),
    ("fisher_solve_backward", {"grad_fisher": ONE(2, 2, 2)},
     SHAPE("grad_fisher", "[..., P, P] = [3, 2, 2]", [2, 2, 2])),
    ("fisher_solve_backward", {"solution": ONE(2)}, SHAPE("solution", "[..., d, P]", [2])),
    ("fisher_solve_backward", {"ridge": -0.1}, "ridge must be finite and at least 0, got -0.1"),
    ("moments", {"x": ONE(1, 4, 3)}, SHAPE("x", "[N, d]", [1, 4, 3])),
    ("moments", {"num_groups": 0}, "num_groups must be at least 1, got 0"),
    ("moments", {"group": None}, "num_groups must be 1 when group is None, got 2"),
    ("moments", {"group": torch.zeros(2, dtype=INT)}, SHAPE("group", "[N] = [4]", [2])),
    ("moments", {"group": torch.full((4,), 2)}, "group must lie in [0, 2), got 2"),
    ("moments", {"group": torch.full((4,), -1)}, "group must lie in [0, 2), got -1"),
    ("moments", {"pilot": ONE(2)}, SHAPE("pilot", "[d] = [3]", [2])),
    ("spatial_moments", {"x": IMAGE[0]}, SHAPE("x", "[n, C, H, W]", [4, 3, 5])),
    ("spatial_moments", {"pilot": IMAGE[:1]},
     SHAPE("pilot", "[C, H, W] = [4, 3, 5]", [1, 4, 3, 5])),
    ("patch_moments", {"x": IMAGE[0]}, SHAPE("x", "[n, C, H, W]", [4, 3, 5])),
    ("patch_moments", {"kernel": (2,)}, NUMBERS("kernel", 1, [2])),
    ("patch_moments", {"kernel": (2, 0)}, NUMBERS("kernel", 1, [2, 0])),
    ("patch_moments", {"padding": (-1, 0)}, NUMBERS("padding", 0, [-1, 0])),
    ("patch_moments", {"groups": 3}, "channels of x must be a multiple of groups = 3, got 4"),
    ("patch_moments", {"kernel": (2, 4), "dilation": (1, 2)},
     "x must hold at least one window, got [3, 5] numbers"),
    ("lift_moments_", {"z": ONE(3)}, SHAPE("z", "[n, d]", [3])),
    ("lift_moments_", {"weight": ONE(4, 2)}, SHAPE("weight", "[k, d] with d = 3", [4, 2])),
    ("lift_moments_", {"weight": ONE(4)}, SHAPE("weight", "[k, d] with d = 3", [4])),
    ("lift_moments_", {"bias": ONE(3)}, SHAPE("bias", "[k] = [4]", [3])),
    ("lift_moments_", {"pilot": ONE(1, 4)}, SHAPE("pilot", "[k] = [4]", [1, 4])),
    ("lift_moments_", {"sums": ONE(4, 6, dtype=TWO)},
     SHAPE("sums", "[F, K] with K at least 7", [4, 6])),
    ("lift_moments_", {"sums": ONE(7, dtype=TWO)}, SHAPE("sums", "[F, K] with K = 7", [7])),
    ("lift_moments_", {"sums": ONE(0, 7, dtype=TWO)},
     SHAPE("sums", "[F, K] with F at least 1", [0, 7])),
    ("lift_moments_", {"cross": ONE(2, 6, 7, dtype=TWO)},
     SHAPE("cross", "[H, K, K] with K = 7", [2, 6, 7])),
    ("lift_moments_", {"cross": ONE(3, 7, 7, dtype=TWO)},
     SHAPE("cross", "[H, K, K] with H = 1 or 2", [3, 7, 7])),
    ("lift_moments_", {"cross": ONE(0, 7, 7, dtype=TWO)},
     SHAPE("cross", "[H, K, K] with H = 1 or 2", [0, 7, 7])),
    ("lift_moments_", {"cross": ONE(1, 7, 7, dtype=TWO).expand(2, 7, 7)},
     "cross must be contiguous, got strides [0, 7, 1]"),
    ("lift_moments_", {"sums": ONE(4, 14, dtype=TWO)[:, ::2]},
     "sums must be contiguous, got strides [14, 2]"),
    ("lift_moments_", {"slope": math.inf}, "slope must be finite, got inf"),
    ("lift_moments_", {"offsets": torch.tensor([0, 5])},
     SHAPE("offsets", "[F + 1] = [5]", [2])),
    ("lift_moments_", {"offsets": torch.tensor([1, 2, 2, 4, 5])}, RISE([1, 2, 2, 4, 5])),
    ("lift_moments_", {"offsets": torch.tensor([0, 2, 2, 4, 6])}, RISE([0, 2, 2, 4, 6])),
    ("lift_moments_", {"offsets": torch.tensor([0, 2, 1, 4, 5])}, RISE([0, 2, 1, 4, 5])),
    ("lift_moments_", {"start": -1}, "start must lie in [0, K] = [0, 7], got -1"),
    ("lift_moments_", {"start": 8}, "start must lie in [0, K] = [0, 7], got 8"),
    ("gradient_gram", {"other_b": None},
     "other_b must be given with the other of the two, got None"),
    ("gradient_gram", {"other_a": None},
     "other_a must be given with the other of the two, got None"),
    ("gradient_gram", {"a": ONE(3, 4)}, SHAPE("a", "[n, T, D]", [3, 4])),
    ("gradient_gram", {"b": ONE(2, 5, 2, 6)},
     SHAPE("b", "[n, C, T, M] or [n, T, M] with n = 2 and T = 3", [2, 5, 2, 6])),
    ("gradient_gram", {"other_b": ONE(1, 5, 3, 6)},
     SHAPE("other_b", "[n, C, T, M] or [n, T, M] with n = 2 and T = 3", [1, 5, 3, 6])),
    ("gradient_gram", {"other_a": ONE(2, 3, 3)}, "other_a must have D = 4, got [2, 3, 3]"),
    ("gradient_gram", {"other_b": ONE(2, 5, 3, 5)}, "other_b must have M = 6, got [2, 5, 3, 5]"),
    ("gradient_squares", {"x": ONE(6, 5, 7)}, SHAPE("x", "[n, C, H, W]", [6, 5, 7])),
    ("gradient_squares", {"g": ONE(9, 5, 7)}, SHAPE("g", "[n, M, Ho, Wo]", [9, 5, 7])),
    ("gradient_squares", {"g": ONE(3, 9, 5, 7)},
     SHAPE("g", "[n, M, Ho, Wo] = [4, 9, 5, 7]", [3, 9, 5, 7])),
    ("gradient_squares", {"padding": (1, 0)},
     SHAPE("g", "[n, M, Ho, Wo] = [4, 9, 7, 7]", [4, 9, 5, 7])),
    ("gradient_squares", {"stride": (1, 0)}, NUMBERS("stride", 1, [1, 0])),
    ("gradient_squares", {"dilation": (1, 1, 1)}, NUMBERS("dilation", 1, [1, 1, 1])),
    ("gradient_squares", {"kernel": (6, 1)},
     "x must hold at least one window, got [5, 7] numbers"),
    ("gradient_squares", {"groups": 0}, "groups must be at least 1, got 0"),
    ("gradient_squares", {"groups": 9}, "channels of x must be a multiple of groups = 9, got 6"),
    ("gradient_squares", {"groups": 2}, "channels of g must be a multiple of groups = 2, got 9"),
    ("dual_activation", {"x": torch.tensor(1.0)}, SHAPE("x", "[1 + P, ...]", [])),
    ("dual_activation", {"x": BUFFER[:0]}, SHAPE("x", "[1 + P, ...]", [0, 4, 5, 2])),
    ("dual_activation", {"kind": "swish"}, f"kind must be one of {', '.join(KINDS)}, got 'swish'"),
    ("dual_activation", {"kind": "elu", "parameters": [1.0]},
     "parameters must be (alpha, scale, input_scale) for elu, got 1 numbers"),
    ("dual_activation", {"parameters": [1.0]}, "parameters must be () for prelu, got 1 numbers"),
    ("dual_activation", {"kind": "leaky_relu", "parameters": [math.nan]},
     "parameters must be finite, got [nan]"),
    ("dual_activation", {"kind": "leaky_relu", "parameters": [math.inf]},
     "parameters must be finite, got [inf]"),
    ("dual_activation", {"slope": None},
     "slope must be given for prelu and for it alone, got kind 'prelu'"),
    ("dual_activation", {"kind": "relu"},
     "slope must be given for prelu and for it alone, got kind 'relu'"),
    ("dual_activation", {"channel_dim": 0}, "channel_dim must lie in [1, 4), got 0"),
    ("dual_activation", {"channel_dim": 4}, "channel_dim must lie in [1, 4), got 4"),
    ("dual_activation", {"scale": ONE(2)}, SHAPE("scale", "[C] = [5]", [2])),
    ("dual_activation", {"shift": ONE(1, 5)}, SHAPE("shift", "[C] = [5]", [1, 5])),
    ("dual_activation", {"slope": ONE(1)}, SHAPE("slope", "[C] = [5]", [1])),
    ("dual_activation", {"out": ONE(3, 4)}, SHAPE("out", "[1 + P, ...] = [3, 4, 5, 2]", [3, 4])),
    ("dual_activation", {"out": ONE(3, 4, 5, 1).expand(3, 4, 5, 2)},
     "out must not overlap itself, got strides [20, 5, 1, 0]"),
    ("dual_norm", {"x": ONE(4, 6)}, SHAPE("x", "[1 + P, rows, width]", [4, 6])),
    ("dual_norm", {"x": ONE(1, 3, 4, 6)}, SHAPE("x", "[1 + P, rows, width]", [1, 3, 4, 6])),
    ("dual_norm", {"x": ONE(0, 4, 6)}, SHAPE("x", "[1 + P, rows, width]", [0, 4, 6])),
    ("dual_norm", {"eps": -1.0}, "eps must not be negative, got -1.0"),
    ("dual_norm", {"eps": math.nan}, "eps must not be negative, got nan"),
    ("dual_norm", {"groups": 0}, "groups must be at least 1, got 0"),
    ("dual_norm", {"inner": 0}, "inner must be at least 1, got 0"),
    ("dual_norm", {"groups": 2, "inner": 5}, "inner must divide groups * width = 12, got 5"),
    ("dual_norm", {"weight": ONE(4)}, SHAPE("weight", "[groups * width / inner] = [6]", [4])),
    ("dual_norm", {"weight": None, "groups": 2, "inner": 3},
     SHAPE("bias", "[groups * width / inner] = [4]", [6])),
    ("dual_softmax", {"x": ONE(6)}, SHAPE("x", "[1 + P, ...]", [6])),
    ("dual_softmax", {"x": BUFFER[:0]}, SHAPE("x", "[1 + P, ...]", [0, 4, 5, 2])),
    ("dual_softmax", {"dim": 0}, DIM(0)),
    ("dual_softmax", {"dim": -4}, DIM(-4)),
    ("dual_softmax", {"dim": 4}, DIM(4)),
    ("dual_pool", {"x": ONE(6, 7), "kernel": [2]},
     SHAPE("x", "[1 + P, n, C, *spatial]", [6, 7])),
    ("dual_pool", {"x": ONE(0, 2, 4, 6, 7)},
     SHAPE("x", "[1 + P, n, C, *spatial]", [0, 2, 4, 6, 7])),
    ("dual_pool", {"x": ONE(3, 2, 4, 6, 7, 1, 1), "kernel": [2] * 4},
     "x must have one to three spatial dimensions, got [3, 2, 4, 6, 7, 1, 1]"),
    ("dual_pool", {"kernel": []}, NUMBERS("kernel", 1, [])),
    ("dual_pool", {"stride": [0, 1]}, NUMBERS("stride", 1, [0, 1])),
    ("dual_pool", {"kernel": [2, 3], "padding": [1, 2]},
     "padding must be at most half the kernel [2, 3], got [1, 2]"),
    ("dual_pool", {"kernel": [7, 2]}, "x must hold at least one window, got [6, 7] numbers"),
    ("dual_pool",
     {"x": ONE(3, 2, 4, 6, 1), "kernel": [1, 2], "padding": [0, 1], "dilation": [1, 2]},
     "dilation must be at most 1, the numbers of x along that dimension, where a window begins "
     "in the padding, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "changed", "message"), WRONG)
def test_wrong_values(op, changed, message):
    assert refused(ValueError, op, **changed) == message


def test_wrong_types():
    """Indices of another dtype, and parameters of an activation that are no numbers."""
    for op, name in (("moments", "group"), ("lift_moments_", "offsets")):
        wrong = VALID[op][name].int()
        assert refused(TypeError, op, **{name: wrong}) == f"{name} must be int64, got int32"
    for value, kind in (("0.1", "str"), (ONE(1), "Tensor")):
        message = refused(TypeError, "dual_activation", kind="leaky_relu", parameters=[value])
        assert message == f"parameters must be numbers, got {kind}"
