"""Kronecker factors against products built by loops from single samples, and against the exact
matrix where theory says that they are it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.parameters_oracle import brute_force
from support.parameters_small import blocks_of, difference, labels, measure
from support.parameters_zoo import NETWORKS, Network, Written
from torch import Tensor, nn

from fisherfast import parameters as fp

SAMPLES = 5

# Relative to the largest entry. Measured against the loops: at most 4e-16 and 2e-7.
EXACT = 1e-12
FLOAT32 = 1e-5

CONVOLUTIONS = ("strided", "grouped", "same", "reflect")
NAMES = ["linear", "shared linear", *(f"conv2d {way}" for way in CONVOLUTIONS), "conv3d"]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def kfac(model: nn.Module, x: Any, fisher_type: Any = "exact", **options: Any) -> Any:
    return measure("kfac", x, fisher_type, model=model, **options)


# --- the oracle: single samples ---


def seen_by(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, tuple[Any, Tensor, Tensor]]]:
    """(module, input, output) of each layer with weights for one sample alone, with the graph."""
    names, seen = {module: name for name, module in model.named_modules()}, {}

    def note(module: Any, given: Any, output: Tensor) -> None:
        if hasattr(module, "weight"):
            seen[names[module]] = module, given[0].detach(), output

    with nn.modules.module.register_module_forward_hook(note):
        return model(x[None])[0], seen


def rows_of(module: Any, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """a [T, D] and b [T, M] of each group of one sample: convolutions whose kernels have a single 1
    cut out the numbers that the weights multiply."""
    if isinstance(module, nn.Linear):
        return [(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))]
    alone, size = copy.copy(module), module.weight[0].numel()
    alone.groups = 1
    single = torch.eye(size, dtype=x.dtype).reshape(size, *module.weight.shape[1:])
    parts = zip(x.chunk(module.groups, 1), g.chunk(module.groups, 1), strict=True)
    return [
        (alone._conv_forward(a, single, None)[0].flatten(1).T, b[0].flatten(1).T) for a, b in parts
    ]


def columns_of(f: Tensor) -> list[Tensor]:
    """The root of diag(p) - p p^T, class by class: sqrt(p_c) (e_c - p)."""
    p = f.detach().softmax(0)
    return [p[c].sqrt() * (F.one_hot(torch.tensor(c), len(p)).to(p) - p) for c in range(len(p))]


def kronecker_by_loops(model: nn.Module, inputs: Tensor, sharing: str = "expand") -> Tensor:
    """The whole matrix [P, P] as the paper writes it."""
    factors: dict[tuple[str, int], list[Any]] = {}
    for x in inputs:
        f, seen = seen_by(model, x)
        for column in columns_of(f):
            outputs = [out for _, _, out in seen.values()]
            gradients = torch.autograd.grad(f, outputs, column, retain_graph=True)
            for (name, (module, given, _)), g in zip(seen.items(), gradients, strict=True):
                for group, (a, b) in enumerate(rows_of(module, given, g)):
                    if module.bias is not None:
                        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
                    if sharing == "reduce":
                        a, b = a.mean(0, keepdim=True), b.sum(0, keepdim=True)
                    sums = factors.setdefault((name, group), [0.0, 0.0])
                    sums[0] = sums[0] + a.T @ a / len(a) / len(f)  # the same for each column
                    sums[1] = sums[1] + b.T @ b
    layout, modules = fp.ParameterLayout.of(model), dict(model.named_modules())
    places = layout.unflatten(torch.arange(layout.size))
    dense = torch.zeros(layout.size, layout.size, dtype=torch.float64)
    for (name, group), (A, B) in factors.items():
        groups = getattr(modules[name], "groups", 1)
        where = places[f"{name}.weight"].flatten(1).chunk(groups)[group]
        if f"{name}.bias" in places:
            where = torch.cat([where, places[f"{name}.bias"].chunk(groups)[group][:, None]], 1)
        where = where.flatten()
        dense[where[:, None], where] = torch.kron(B, A) / len(inputs) ** 2
    return dense


# --- the factors ---


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_products_built_by_loops(
    name: str, sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong scale of positions or samples, a bias apart from its weights, patches in another
    order than the weights, groups mixed, padding or dilation ignored, products summed over
    batches; patches of only the first portion, where they do not fit into memory at once; sums in
    float32 over a whole batch."""
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(SAMPLES)
    truth = kronecker_by_loops(model, x, sharing)
    got = kfac(model, x, sharing=sharing, batch_size=2)
    assert (got.diagonal_names, got.sharing) == ((), sharing)
    assert difference(got.to_dense(), truth) < EXACT
    monkeypatch.setattr("fisherfast.parameters.layers.linear.PORTION_BYTES", 1)
    assert difference(kfac(model, x, sharing=sharing).to_dense(), truth) < EXACT
    single = kfac(NETWORKS[name].make(torch.float32), x.float(), sharing=sharing)
    assert difference(single.to_dense(), truth) < FLOAT32


@pytest.mark.parametrize("chosen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["conv2d grouped", "shared linear"])
def test_weights_or_biases_alone(name: str, chosen: str) -> None:
    """A 1 among the inputs without a bias, and a bias that is measured without weights."""
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs(SAMPLES)
    kept = torch.cat([torch.full((p.numel(),), chosen in k) for k, p in model.named_parameters()])
    truth = kronecker_by_loops(model, x)[kept][:, kept]
    assert difference(kfac(model, x, parameters=chosen).to_dense(), truth) < EXACT


@pytest.mark.parametrize(("fisher_type", "samples"), [("mc", 3), ("empirical", 1)])
def test_other_types_have_the_same_inputs(fisher_type: str, samples: int) -> None:
    """The factor of the inputs does not depend on labels: one that is summed once for each column
    of the root instead of once."""
    model, data = NETWORKS["shared linear"].make(), NETWORKS["shared linear"].inputs(SAMPLES)
    exact = kfac(model, data)
    other = kfac(model, (data, labels(SAMPLES)), fisher_type, samples=samples)
    for left, right in zip(exact.blocks, other.blocks, strict=True):
        assert difference(left.inputs, right.inputs) < EXACT
        assert not torch.equal(left.gradients, right.gradients)


# --- where it is the exact matrix ---

MEANS = Written(lambda m, h: h.mean(1) if h.dim() == 3 else h.flatten(2).mean(2))


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("build", "shape", "sharing"),
    [
        (deep_linear, (4,), "expand"),
        (deep_linear, (6, 4), "expand"),
        (lambda: nn.Sequential(deep_linear(), MEANS), (6, 4), "reduce"),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2, padding=1), MEANS), (2, 5, 6), "reduce"),
    ],
)
def test_deep_linear_networks_are_exact(build: Any, shape: tuple[int, ...], sharing: str) -> None:
    """Martens 2020, section 8; with several positions Eschenhagen et al. 2023, section 3: "expand"
    for outputs at each position, "reduce" for their mean. The two exchanged, a factor of T in
    either, or patches whose mean is taken over the wrong positions."""
    model, x = Network(build, shape).make(), Network(build, shape).inputs(7)
    got = kfac(model, x, likelihood=fp.Gaussian(4.0), sharing=sharing)
    truth = blocks_of(brute_force(model, "gaussian", x, variance=4.0), got.layout)
    assert difference(got.to_dense(), truth) < EXACT


# --- what has no Kronecker form ---


def test_other_layers_have_their_exact_diagonal() -> None:
    """Norms that are left out, and a repr that does not say that they are diagonal."""
    got = measure("kfac")
    assert isinstance(got, fp.KroneckerFisher)
    assert got.diagonal_names == ("3.weight", "3.bias")
    assert repr(got).endswith("7 samples; diagonal alone: 3.weight, 3.bias>")
    norm, dense = slice(16, 32), got.to_dense()
    assert torch.equal(dense[norm], measure("diag").to_dense()[norm])


REFUSED = {
    "called twice": "layer.weight",
    "tied head": "embedding.weight",
    "weights in an expression": "layer.weight",
    "windows mixed": "layers.0.weight",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_measured_or_refused(name: str) -> None:
    """A layer whose factors are of another shape than its parameters, a parameter that no part
    answers for, a diagonal that is not exact, the sum of two Kronecker products given as one, and a
    network that is refused without need."""
    model, x = NETWORKS[name].make(), NETWORKS[name].inputs()
    if name in REFUSED:
        text = f"by one call of one layer .*, got '{REFUSED[name]}', which is shared .* parameters="
        with pytest.raises(ValueError, match=text):
            kfac(model, x)
        if name == "called twice":  # the way out that the error names
            assert kfac(model, x, parameters="head").layout.names == ("head.weight", "head.bias")
        return
    exact = measure("diag", x, model=model).diag()
    got = kfac(model, x)
    assert bool((got.diag()[exact > 0] > 0).all())
    places = got.layout.slices()
    for own in got.diagonal_names:
        assert (got.diag() - exact)[places[own]].abs().max() <= EXACT * exact.max()
