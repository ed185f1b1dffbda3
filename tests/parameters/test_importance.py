"""Importance per parameter, unit and layer, against gates by brute force and against losses."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_small import labels, measure
from support.parameters_zoo import NETWORKS
from torch import Tensor, nn
from torch.nn.utils import prune

import fisherfast as ff
from fisherfast.parameters import Categorical, Gaussian

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # of torch, on copies

ROUNDING = 1e-10  # relative to the largest; 2e-15 measured


def close(got: Tensor, truth: Tensor) -> bool:
    return bool((got - truth).abs().max() <= ROUNDING * truth.abs().max().clamp_min(1e-12))


OWN = ("weight", "bias")
UNITS: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "linear": [("0", "0", OWN), ("2", "2", OWN)],
    **{name: [("0", "0", OWN)] for name in ("shared linear", "conv2d grouped", "conv3d")},
    **{name: [("0", "0", OWN)] for name in ("conv transpose", "embedding")},
    **{name: [("1", "1", OWN)] for name in ("batch norm", "group norm", "layer norm")},
    "windows": [("layers.0", "layers.0", OWN), ("layers.1", "layers.1", OWN)],
    "LSTM": [(f"rnn.{h}_l0", "rnn", (f"weight_{h}_l0", f"bias_{h}_l0")) for h in ("ih", "hh")],
    "called twice": [("layer", "layer", OWN)],
}
"""Label of some units, their layer, and the parameters that have one row for each."""


def members(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    """By layer and parameter, w where the entry of a unit is, zero elsewhere, [P] each."""
    named = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    places = torch.arange(sum(p.numel() for _, p in named)).split([p.numel() for _, p in named])
    found: dict[str, dict[str, list[Tensor]]] = {}
    every = torch.cat([p.flatten() for _, p in named])
    for (name, p), place in zip(named, places, strict=True):
        layer, _, attribute = name.rpartition(".")
        module = model.get_submodule(layer)
        rows = place.reshape(len(p) if p.dim() else 1, -1)
        if isinstance(module, nn.ConvTranspose2d) and attribute == "weight":
            groups = place.reshape(module.groups, -1, *p.shape[1:])  # inputs before outputs
            rows = groups.transpose(1, 2).flatten(0, 1).flatten(1)
        vectors = [torch.zeros_like(every).index_copy(0, row, every[row]) for row in rows]
        found.setdefault(layer, {})[attribute] = vectors
    return found


@pytest.mark.parametrize(
    ("name", "fisher_type"),
    [*((name, "exact") for name in NETWORKS), ("linear", "empirical"), ("embedding", "empirical")],
)
def test_parameters_units_and_layers(name, fisher_type):
    """Catches F |w|, F w and a forgotten half, squares taken before the sum over a unit's
    parameters, positions not summed inside of the sample, inputs of a transposed convolution taken
    for its outputs, a bias left out or not its own matrix's, the squared mean of a batch, and a
    layer that is measured twice or in parts: tied, called twice, frozen in part, with parameters
    that no rule answers for."""
    network = NETWORKS[name]
    model, x, y = network.make(), network.inputs(), labels(4)
    F = brute_force(model, "categorical", x, y if fisher_type == "empirical" else None)
    found = measure("diag", (x, y), fisher_type, model=model, batch_size=3)
    layer_importance, unit_importance = (found.importance(per=per) for per in ("layer", "unit"))
    entries, layers = found.importance(), members(model)
    w = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert close(torch.cat([v.flatten() for v in entries.values.values()]), F.diag() * w**2 / 2)
    assert close(torch.cat([v.flatten() for v in entries.fisher.values()]), F.diag())
    assert set(layer_importance) == set(layers)
    scale = max(float(each) for each in layer_importance.values.values())
    for layer, parts in layers.items():
        w = sum(itertools.chain(*parts.values()))
        assert abs(float(layer_importance[layer]) - float(w @ F @ w) / 2) <= ROUNDING * scale, layer
    for label, layer, attributes in UNITS.get(name, ()):
        present = [layers[layer][a] for a in attributes if a in layers[layer]]
        truth = torch.stack([w @ F @ w for w in map(sum, zip(*present, strict=True))])
        assert truth.max() > 1e-6
        assert close(unit_importance[label], truth / 2)
        assert close(unit_importance.fisher[label], truth)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("name", ["conv2d grouped", "batch norm"])
def test_only_chosen_parameters_count(name, part):
    """Catches a unit that is gated as a whole where only its weights or its bias are measured."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs()
    F = brute_force(model, "categorical", x)
    found = ff.parameters.fisher(model, Categorical(), x, parameters=f"{part}$")
    for layer, parts in members(model).items():
        truth = torch.stack([w @ F @ w / 2 for w in parts[part]])
        assert close(found.importance(per="unit")[layer], truth), layer


def test_it_is_the_rise_of_the_loss():
    """A least-squares fit: its loss is a parabola with no slope, so that importance is the rise
    itself, to rounding. Catches a wrong scale: per batch, per output, a variance left out."""
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    y, likelihood, model = x.square() + noise, Gaussian(variance=0.3), nn.Linear(5, 5).double()
    design = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    fit = torch.linalg.lstsq(design, y).solution.T  # weights, and the bias as a column
    model.load_state_dict({"weight": fit[:, :5], "bias": fit[:, 5]})

    def rise(*where: slice | int) -> float:
        without = fit.clone()
        without[where] = 0.0
        after, before = (-likelihood.log_prob(design @ w.T, y).mean() for w in (without, fit))
        return float(after - before)

    F = ff.parameters.fisher(model, likelihood, x)
    parameters, units, layers = (F.importance(per=p) for p in ("parameter", "unit", "layer"))
    assert float(parameters["weight"][1, 2]) == pytest.approx(rise(1, 2), rel=1e-9)
    assert float(units[""][1]) == pytest.approx(rise(1), rel=1e-9)
    assert float(layers[""]) == pytest.approx(rise(slice(None)), rel=1e-9)


def test_network_and_data_must_be_there_as_they_were():
    """Catches weights of another moment than F, and data that are used up."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs()
    F = ff.parameters.fisher(model, Categorical(), x)
    for matrix in (F.released(), ff.parameters.from_state_dict(F.state_dict())):
        with pytest.raises(ValueError, match=r"^F must have its network and data for this"):
            matrix.importance()
    with torch.no_grad():
        model[0].bias.add_(1)
    for per in ("parameter", "unit", "layer"):
        with pytest.raises(ValueError, match=r"as it was when F was measured, got '0.bias'"):
            F.importance(per=per)
    once = ff.parameters.fisher(model, Categorical(), iter([x]))
    once.importance()
    with pytest.raises(TypeError, match=r"^data must be readable more than once, got"):
        once.importance(per="unit")
    parts = [x[:1], x[1:2], x[2:]]
    growing = ff.parameters.fisher(model, Categorical(), parts)
    parts.append(x)
    with pytest.raises(ValueError, match=r"^data must be the same every time"):
        growing.importance(per="layer")


def test_bad_arguments():
    """Catches a silent default, and errors that do not say which argument is wrong."""
    F = ff.parameters.fisher(nn.Linear(4, 3), Categorical(), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"per must be one of .*, got 'channel'"):
        F.importance(per="channel")
    with pytest.raises(KeyError, match="name must be one of"):
        F.importance()["fc"]
    for fraction in (-0.1, 2, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], got"):
            F.importance().least(fraction)
    with pytest.raises(TypeError, match="fraction must be a number, got"):
        F.importance().least(True)


class WithoutBias(nn.Linear):
    """Whose bias is there, and never used."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def test_pruned_networks_and_unused_biases():
    """Catches units that come apart where pruning has renamed their weights, and units that count
    on all of their parameters at once: the importance is that of the same network with zeros
    written into it."""
    model, x = NETWORKS["linear"].make(), NETWORKS["linear"].inputs()
    model[2] = WithoutBias(5, 3).double()
    plain = copy.deepcopy(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[2], "weight", 1, n=2, dim=0)
    plain[0].weight.data.copy_(model[0].weight)
    plain[2] = nn.Linear(5, 3, bias=False).double()
    plain[2].weight.data.copy_(model[2].weight)
    for per in ("parameter", "unit", "layer"):
        expected = ff.parameters.fisher(plain, Categorical(), x).importance(per=per)
        found = ff.parameters.fisher(model, Categorical(), x).importance(per=per)
        assert {name.removesuffix("_orig") for name in found} == {*expected} | (
            {"2.bias"} if per == "parameter" else set()
        )
        for name in expected:
            assert close(found[f"{name}_orig" if name.endswith("weight") else name], expected[name])


def test_least_counts_over_the_whole_network():
    """Catches fractions per layer, a rounding down, and ties that take too many."""
    values = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 0.5, 9.0])}
    found = ff.parameters.Importance("unit", values, {}, 1, "exact")
    masks = found.least(0.4)
    assert masks["a"].tolist() == [False, True]  # the first of two equal ones
    assert masks["b"].tolist() == [False, True, False]
    sums = [sum(int(mask.sum()) for mask in found.least(f).values()) for f in (0, 0.3, 1)]
    assert sums == [0, 2, 5]


def test_table_json_and_figure():
    """Catches a table without its unit, one that hides where the numbers come from, numbers that
    JSON refuses, sums of the wrong layers, and zeros on a logarithm."""
    model, data = NETWORKS["linear"].make(), (NETWORKS["linear"].inputs(), labels(4))
    model[0].weight.data[0] = model[0].bias.data[0] = 0.0  # a unit without importance
    F = ff.parameters.fisher(model, Categorical(), data, fisher_type="empirical")
    found = F.importance(per="unit")
    lines, sums = repr(found).splitlines(), [float(each.sum()) for each in found.values.values()]
    assert lines[0] == "importance per unit in nats (4 samples, empirical)"
    assert lines[2].split()[:2] == ["0", str(len(found["0"]))]
    assert float(lines[2].split()[2]) == pytest.approx(sums[0], rel=5e-3)
    assert json.loads(json.dumps(found.to_dict()))["values"]["0"] == found["0"].tolist()
    pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib")
    left, right = found.plot()
    assert [bar.get_width() for bar in left.patches] == pytest.approx(sums)
    assert [label.get_text() for label in left.get_yticklabels()] == list(found)
    every, whole = torch.cat(list(found.values.values())).sort().values, right.lines[-1]
    assert list(whole.get_ydata()) == pytest.approx(every[1:].tolist())
    assert list(whole.get_xdata()[[0, -1]]) == pytest.approx([2 / len(every), 1.0])
    left.figure.canvas.draw()
