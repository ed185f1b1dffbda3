"""What the documentation promises of a Fisher matrix, whatever its structure: its methods are those
of one matrix, take vectors in every form, and cost what is said."""

from __future__ import annotations

import copy
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from support.networks_zoo import seeded
from support.pairwise import pairwise
from support.parameters_oracle import brute_force
from support.parameters_small import (
    CATEGORICAL,
    ROUNDING,
    STRUCTURES,
    difference,
    inputs,
    labels,
    measure,
    network,
    rows,
)
from support.parameters_zoo import NETWORKS, Network, convolution2d, linear
from torch import nn

from fisherfast import parameters as fp

GAUSSIAN = fp.Gaussian()


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], fp.ParameterFisher]:
    """Singular ones of 7 samples and 59 parameters, regular ones of 60 samples and 35."""
    few = Network(lambda: linear(bias=False), (4,))
    many = {"model": few.make(), "data": few.inputs(60), "likelihood": GAUSSIAN}
    matrices = {(s, "singular"): measure(s) for s in STRUCTURES}
    for s in STRUCTURES:
        matrices[s, "regular"] = measure(s, **many, **({"rank": 50} if s == "lowrank" else {}))
    return matrices


# --- one matrix ---


@pytest.mark.parametrize("case", ["singular", "regular"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_methods_are_those_of_one_matrix(found: dict, structure: str, case: str) -> None:
    """A method of some structure that speaks of another matrix than its `to_dense`; damping by its
    root for each Kronecker factor, relative to the trace, or times n."""
    matrix = found[structure, case]
    dense = matrix.to_dense()
    size = matrix.layout.size
    assert matrix.shape == (size, size) == tuple(dense.shape)
    assert dense.dtype == matrix.diag().dtype == matrix.eigenvalues().dtype == torch.float64
    assert difference(dense, dense.T) < ROUNDING
    assert difference(matrix.diag(), dense.diag()) < ROUNDING
    assert isinstance(matrix.trace(), float)
    assert matrix.trace() == pytest.approx(float(dense.trace()), rel=ROUNDING)
    values, all_values = matrix.eigenvalues(), torch.linalg.eigvalsh(dense)
    assert float(all_values[0]) > -ROUNDING * float(all_values[-1])
    assert bool((values.diff() >= 0).all())
    assert difference(values, all_values[-len(values) :]) < ROUNDING
    assert bool((values >= 0).all())
    assert float(all_values[: -len(values)].abs().sum()) < ROUNDING * float(values[-1])
    probe = torch.linspace(-1, 2, 2 * size, dtype=torch.float64).reshape(size, 2)
    assert difference(matrix @ probe, dense @ probe) < ROUNDING
    for damping in (1e-4, 0.3, 50.0, *([0.0] if case == "regular" else [])):
        damped = dense + damping * torch.eye(size, dtype=torch.float64)
        expected = torch.linalg.solve(damped, probe)
        assert difference(matrix.solve(probe, damping=damping), expected) < 1e-9  # condition 1e5
        logdet = matrix.logdet(damping=damping)
        assert isinstance(logdet, float)
        assert logdet == pytest.approx(float(torch.logdet(damped)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_singular(structure: str, dtype: torch.dtype) -> None:
    """A factorisation that rounding let pass: with softmax outputs, adding the same to all logits'
    biases changes nothing, however many samples there are, and a weight of an input that is always
    zero has no information."""
    network = Network(linear, (4,))
    x = network.inputs(80)
    x[:, 1] = 0
    for data in (x, x[:2]):  # more rows than parameters, and fewer
        matrix = measure(structure, data.to(dtype), model=network.make(dtype))
        v = torch.ones(matrix.layout.size)
        with pytest.raises(ValueError, match=r"damping must be positive, got 0: .*pass damping="):
            matrix.solve(v)
        assert matrix.logdet() == -math.inf
        assert matrix.solve(v, damping=1e-2).isfinite().all()
        assert matrix.logdet(damping=1e-2) > -math.inf
        assert matrix.eigenvalues()[0] >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["full", "gram"])
def test_damping_near_rounding(structure: str, dtype: torch.dtype) -> None:
    """A solution of rounding errors; and a test for singular matrices that takes small numbers for
    zero: an eigenvalue of 1e-10 is far from the rounding of float64 and from the square of that of
    float32."""
    with pytest.raises(ValueError, match=r"damping must be .* rounding.* got 1e-18"):
        measure(structure).solve(torch.ones(59), damping=1e-18)
    model, x = nn.Linear(2, 1, bias=False, dtype=dtype), rows(30)[:, :2].clone()
    x[:, 1] *= 1e-5
    matrix = measure(structure, x, model=model, likelihood=GAUSSIAN)
    v = torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.solve(v), v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_matrix_of_zero(structure: str) -> None:
    """Inputs that say nothing of the weights (all zero, as after dead units): F is zero, no error,
    and `solve` needs damping. For low rank, no direction is left."""
    model, x = nn.Linear(4, 3, bias=False).double(), torch.zeros(5, 4)
    matrix = measure(structure, x, model=model)
    probe = torch.linspace(-1, 1, 12, dtype=torch.float64)
    for each in (matrix, fp.from_state_dict(matrix.state_dict())):
        assert (each.trace(), each.logdet()) == (0, -math.inf)
        assert not any(zero.any() for zero in (each.eigenvalues(), each.diag(), each.to_dense()))
        assert difference(each.solve(probe, damping=0.25), 4 * probe) < ROUNDING
        assert each.logdet(damping=0.25) == pytest.approx(12 * math.log(0.25))
        with pytest.raises(ValueError, match="damping must be positive, got 0"):
            each.solve(probe)
    with pytest.raises(ValueError, match=r"^F must not be zero, got a largest eigenvalue of 0"):
        matrix.spectrum()
    with pytest.raises(ValueError, match=r"^the Fisher matrix must have a positive trace, got 0"):
        matrix.effective_dimension(1000)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_state_is_all_of_it(found: dict, structure: str) -> None:
    """A state that leaves something out, or needs more than plain numbers to be read; results that
    are views of what the matrix keeps, which a user's in-place step would change; a name that lets
    the second moment of the training gradients pass for the Fisher matrix."""
    matrix = found[structure, "singular"]
    file = io.BytesIO()
    torch.save(matrix.state_dict(), file)
    file.seek(0)
    back = fp.from_state_dict(torch.load(file, weights_only=True))
    assert type(back) is type(matrix)
    assert repr(back) == repr(matrix)
    assert back.samples == 7
    for view in (back.diag(), back.to_dense(), back.eigenvalues()):
        view.fill_(-1.0)
    probe = torch.linspace(0, 1, matrix.layout.size, dtype=torch.float64)
    assert torch.equal(back.to_dense(), matrix.to_dense())
    assert torch.equal(back.diag(), matrix.diag())
    assert torch.equal(back.eigenvalues(), matrix.eigenvalues())
    assert torch.equal(back.solve(probe, damping=0.1), matrix.solve(probe, damping=0.1))
    for name in ("fisher_type", "name", "layout", "missing_trace", "error_bound", "sharing"):
        assert getattr(back, name, None) == getattr(matrix, name, None)
    empirical = measure(structure, (inputs(5), labels(5)), "empirical")
    for text in (empirical.name, repr(empirical)):
        assert "not the Fisher matrix" in text
    assert "not the Fisher matrix" not in matrix.name


# --- vectors ---


@pytest.mark.parametrize("action", ["product", "solve"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_vectors_come_back_as_they_went_in(found: dict, structure: str, action: str) -> None:
    """Names mixed up, columns taken for rows, a product that writes into the vector given or stays
    in float32, strides that are assumed, and a derivative that is not that of the dense matrix."""
    matrix, named = found[structure, "singular"], dict(network().named_parameters())
    probe = matrix.layout.flatten(named).detach()
    kept, columns = probe.clone(), torch.stack([probe, probe.flip(0), probe**2]).T  # strided

    def f(v: Any) -> Any:
        return matrix @ v if action == "product" else matrix.solve(v, damping=0.2)

    expected, several, by_name = f(probe), f(columns), f(named)
    assert (expected.shape, several.shape) == (probe.shape, columns.shape)
    assert difference(several, torch.stack([f(column) for column in columns.T], 1)) < ROUNDING
    assert {name: part.shape for name, part in by_name.items()} == {
        name: w.shape for name, w in named.items()
    }
    for each in (by_name, f(dict(reversed(list(named.items()))))):
        assert torch.equal(matrix.layout.flatten(each), expected)
    single, none = f(probe.float()), f(columns[:, :0].float())
    assert single.dtype == none.dtype == torch.float64
    assert difference(single, f(probe.float().double())) < ROUNDING
    assert none.shape == (len(probe), 0)
    parabola = 0.5 * (probe @ matrix.layout.flatten(by_name))
    gradient = torch.autograd.grad(parabola, list(named.values()))
    assert difference(torch.cat([g.flatten() for g in gradient]), 0.5 * expected) < ROUNDING
    by_function = torch.func.grad(lambda v: 0.5 * v @ f(v))(probe)
    assert difference(by_function, expected) < ROUNDING
    assert torch.equal(probe, kept)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_wrong_vectors_and_dampings(found: dict, structure: str) -> None:
    """A complex vector whose imaginary part is dropped, names that are missing, other shapes;
    damping that makes the matrix indefinite, or is not a number."""
    matrix = found[structure, "singular"]
    size, names = matrix.layout.size, matrix.layout.names
    wrong: list[tuple[Any, type[Exception], str]] = [
        (torch.ones(size, dtype=torch.complex64), TypeError, r"vector must be real, got torch\.co"),
        ([1.0] * size, TypeError, "vector must be a tensor or a mapping"),
        (torch.ones(size - 1), ValueError, "vector must have shape"),
        (torch.ones(1, size), ValueError, "vector must have shape"),
        ({names[0]: torch.ones(4, 1, 3)}, ValueError, r"tensors must hold .*'0\.bias'"),
        ({name: [0.0] for name in names}, TypeError, "0.weight must be a tensor"),
        ({name: torch.ones(1) for name in names}, ValueError, r"shape \[4, 1, 3\], got \[1\]"),
    ]
    for vector, error, message in wrong:
        for method in (matrix.__matmul__, partial(matrix.solve, damping=1.0)):
            with pytest.raises(error, match=message):
                method(vector)
    dampings: list[Any] = [-1e-3, math.nan, math.inf, "1", None, True, torch.ones(2), 1j]
    for damping in dampings:
        number = isinstance(damping, float)
        text = "must be finite and at least 0, got" if number else "must be a number, got"
        for method in (partial(matrix.solve, torch.ones(size)), matrix.logdet):
            with pytest.raises(ValueError if number else TypeError, match=f"damping {text}"):
                method(damping=damping)


@pytest.mark.parametrize("structure", ["diag", "block", "full", "gram"])
def test_a_choice_of_parameters_is_a_part_of_the_matrix(structure: str) -> None:
    """Parameters left out that still count, or a part of the wrong place; three ways to choose."""
    names = ["0.bias", "4.weight"]
    whole = measure("full")
    slices = whole.layout.slices()
    where = torch.cat([torch.arange(slices[n].start, slices[n].stop) for n in names])
    ways: list[Any] = [names[::-1], r"0\.bias|4\.weight", lambda name: name in names]
    for way in ways:
        matrix = measure(structure, parameters=way)
        assert matrix.layout.names == tuple(names)
        assert difference(matrix.diag(), whole.diag()[where]) < ROUNDING
    if structure in ("full", "gram"):
        assert difference(matrix.to_dense(), whole.to_dense()[where][:, where]) < ROUNDING
    with pytest.raises(ValueError, match=r"vector must have P = 28 entries, got shape \[27\]"):
        matrix.layout.unflatten(torch.ones(27))


def test_f_is_the_curvature_of_the_divergence() -> None:
    """KL(p_w || p_(w + dw)) = 1/2 dw^T F dw + O(dw^3), in nats per sample: the whole scale of F."""
    model, x, matrix = network(), inputs(7), measure("gram")
    generator = torch.Generator().manual_seed(5)
    step = 1e-4 * torch.randn(matrix.layout.size, generator=generator, dtype=torch.float64)
    log_p = model(x).log_softmax(1).detach()
    steps = matrix.layout.unflatten(step)
    moved = {name: w.detach() + steps[name] for name, w in model.named_parameters()}
    log_q = torch.func.functional_call(model, moved, x).log_softmax(1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    predicted = 0.5 * float(step @ (matrix @ step))
    assert divergence == pytest.approx(predicted, rel=1e-2)  # third order: measured 2e-4


# --- samples and networks at the edge of what is allowed ---

HALF_ROUNDING = {torch.float16: 0.003, torch.bfloat16: 0.02}
"""Of the trace of a small network in half precision; measured: 2e-4 and 1.3e-3."""


@pairwise(structure=STRUCTURES, dtype=list(HALF_ROUNDING), image=[False, True])
def test_half_precision(structure: str, dtype: torch.dtype, image: bool) -> None:
    """Kernels that do not read half precision, and sums in it."""
    small = Network(convolution2d, (2, 6, 5)) if image else Network(linear, (4,))
    half, x = small.make().to(dtype), small.inputs(5).to(dtype)
    found = measure(structure, x, model=half).trace()
    expected = measure(structure, x.double(), model=copy.deepcopy(half).double()).trace()
    assert found == pytest.approx(expected, rel=HALF_ROUNDING[dtype])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_sample_and_one_output(structure: str) -> None:
    """Dimensions of size 1 that are squeezed away. One sample's "kfac" is exact for one output."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)).double())
    truth = brute_force(model, "gaussian", rows(1)).diag()
    for net in (model, nn.Sequential(model, nn.Flatten(0))):
        found = measure(structure, rows(1), model=net, likelihood=GAUSSIAN)
        torch.testing.assert_close(found.diag(), truth)


def test_a_parameter_that_is_one_number() -> None:
    """It has a place, a name and a shape [] like any other."""
    model, x = NETWORKS["expression"].make(), NETWORKS["expression"].inputs(5)
    named = {name: w.detach() for name, w in model.named_parameters()}
    for structure in STRUCTURES:
        matrix = measure(structure, x, model=model)
        product = (matrix @ named)["gate"]
        assert product.shape == matrix.spectrum().direction(0)["gate"].shape == ()
        flat = matrix @ matrix.layout.flatten(named)
        assert float(flat[matrix.layout.slices()["gate"]]) == float(product)
    ewc = fp.ElasticWeightConsolidation(1.0)
    ewc.consolidate(model, CATEGORICAL, x)
    with torch.no_grad():
        model.gate.mul_(2)
    assert ewc.penalty(model).item() > 0
    assert next(iter(fp.score(model, CATEGORICAL, x, labels(5))))["gate"].shape == (5,)


@pytest.mark.parametrize("structure", ["block", "full", "gram", "lowrank"])
def test_budget(structure: str) -> None:
    """A bound that is not the bytes of the matrices, or that comes after they were allocated: 43
    parameters in blocks of 25 and 18, 3 copies of 8 rows or 8 directions."""
    small, calls = Network(linear, (4,)), []
    model, x = small.make(), small.inputs()
    model.register_forward_hook(lambda *_: calls.append(1))
    factors = 4 * (4 + 5) + 8 * (5 + 3)  # x and g of both layers
    numbers = {
        "block": 25**2 + 18**2,
        "full": 43**2,
        "gram": 3 * 8**2 + factors,
        "lowrank": 3 * 8 * 43 + factors,
    }
    needed = 8 * numbers[structure]
    measure(structure, x, model=model, memory_budget=needed)
    if structure in ("block", "full"):
        measure(structure, x, model=model, memory_budget=None)
    calls.clear()
    with pytest.raises(MemoryError, match=r"memory_budget (= |must be at least).*(budget|takes )"):
        measure(structure, x, model=model, memory_budget=needed - 1)
    assert bool(calls) == (structure in ("gram", "lowrank"))
