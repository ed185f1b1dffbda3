"""Importance per parameter, unit and layer, against gates by brute force and against losses."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from support.networks_zoo import seeded
from support.parameters_oracle import brute_force, moments_of_trace
from support.parameters_small import dense_network, inputs
from support.parameters_zoo import NETWORKS
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.parameters import Categorical, Gaussian

ROUNDING = 1e-10  # relative to the largest; 2e-15 measured

GATED = {
    "linear": {"0": -1, "2": -1},
    "shared linear": {"0": -1},
    "conv2d strided": {"0": 1},
    "conv2d grouped": {"0": 1},
    "conv2d dilated": {"0": 1},
    "conv1d": {"0": 1},
    "conv3d": {"0": 1},
    "conv transpose": {"0": 1},
    "conv transpose grouped": {"0": 1},
    "batch norm 1d": {"1": -1},
    "batch norm 2d": {"1": 1},
    "layer norm": {"1": -1},
    "group norm": {"1": 1},
    "RMS norm": {"1": -1},
    "windows": {"layers.0": -1, "layers.1": -1, "head": -1},
}
"""Layers whose units are gated, and the axis of the units in the layer's output."""


class Gated(nn.Module):
    """A network with a gate, at 1, on each unit of one layer's output."""

    def __init__(self, model: nn.Module, layer: str, axis: int, units: int) -> None:
        super().__init__()
        self.model = model
        self.gates = nn.Parameter(torch.ones(units, dtype=torch.float64))
        self.axis = axis
        model.get_submodule(layer).register_forward_hook(self._gate)

    def _gate(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        shape = [1] * output.dim()
        shape[self.axis] = -1
        return output * self.gates.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def close(got: Tensor, truth: Tensor) -> bool:
    return bool((got - truth).abs().max() <= ROUNDING * truth.abs().max().clamp_min(1e-12))


CASES = [(name, layer, axis) for name, layers in GATED.items() for layer, axis in layers.items()]


@pytest.mark.parametrize(("name", "layer", "axis"), CASES)
@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
def test_units_and_layers_are_gates_on_outputs(name, layer, axis, fisher_type):
    """Catches squares taken before the sum over a unit's parameters, positions not summed inside of
    the sample, inputs of a transposed convolution taken for its outputs, a bias left out."""
    network = NETWORKS[name]
    x = network.inputs()
    y = network.labels() if fisher_type == "empirical" else None
    data = (x, network.labels())
    found = {
        per: ff.parameters.fisher(
            network.make(), Categorical(), data, fisher_type=fisher_type
        ).importance(per=per)
        for per in ("unit", "layer")
    }
    gated = Gated(network.make(), layer, axis, len(found["unit"][layer]))
    truth = brute_force(gated, "categorical", x, y, chosen=lambda name: name == "gates")
    assert truth.trace() > 1e-6
    assert close(found["unit"][layer], truth.diagonal() / 2)
    error = found["layer"][layer] - truth.sum() / 2  # 0 in front of a norm, but for rounding
    assert abs(float(error)) <= ROUNDING * float(truth.abs().max())
    assert close(found["unit"].fisher[layer], truth.diagonal())


def members(model: nn.Module) -> dict[str, dict[str, list[Tensor]]]:
    """By layer and parameter, w where the entry of a leading index is, zero elsewhere, [P] each."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    size = sum(p.numel() for _, p in named)
    found: dict[str, dict[str, list[Tensor]]] = {}
    start = 0
    for name, p in named:
        rows = p.detach().reshape(len(p) if p.dim() else 1, -1)
        vectors = []
        for u, row in enumerate(rows):
            vector = torch.zeros(size, dtype=torch.float64)
            where = start + u * rows.shape[1]
            vector[where : where + rows.shape[1]] = row
            vectors.append(vector)
        layer, _, attribute = name.rpartition(".")
        found.setdefault(layer, {})[attribute] = vectors
        start += p.numel()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_every_network(name):
    """Catches a layer that is measured twice or in parts: tied, called twice, frozen in part, with
    parameters that no rule answers for."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs()
    F = brute_force(network.make(), "categorical", x)
    found = ff.parameters.fisher(model, Categorical(), x).importance(per="layer")
    layers = members(network.make())
    assert set(found) == set(layers)
    scale = max(float(each) for each in found.values.values())
    for layer, parts in layers.items():
        w = sum(itertools.chain(*parts.values()))
        assert abs(float(found[layer]) - float(w @ F @ w) / 2) <= ROUNDING * scale, layer


PAIRS = {
    "embedding": [("0", "0", ["weight"])],
    "embedding padded": [("0", "0", ["weight"])],
    "LSTM": [("rnn.ih_l0", "rnn", ["weight_ih_l0", "bias_ih_l0"])],
    "GRU": [("rnn.hh_l0", "rnn", ["weight_hh_l0", "bias_hh_l0"])],
    "called twice": [("layer", "layer", ["weight", "bias"])],
}
"""Units that are not those of one output: label, layer, parameters."""


@pytest.mark.parametrize(
    ("name", "label", "layer", "attributes"), [(n, *p) for n, ps in PAIRS.items() for p in ps]
)
def test_units_of_other_layers(name, label, layer, attributes):
    """Catches rows of an embedding or a recurrent matrix that are summed over the wrong axis, and a
    bias that is not its own matrix's."""
    network = NETWORKS[name]
    F = brute_force(network.make(), "categorical", network.inputs())
    found = ff.parameters.fisher(network.make(), Categorical(), network.inputs()).importance(
        per="unit"
    )[label]
    parts = members(network.make())[layer]
    units = [sum(rows) for rows in zip(*(parts[a] for a in attributes), strict=True)]
    truth = torch.stack([w @ F @ w / 2 for w in units])
    assert truth.max() > 1e-6
    assert close(found, truth)


@pytest.mark.parametrize("name", ["linear", "conv2d grouped", "layer norm", "called twice"])
def test_parameters(name):
    """Catches F |w|, F w and a forgotten half."""
    network = NETWORKS[name]
    F = brute_force(network.make(), "categorical", network.inputs())
    found = ff.parameters.fisher(network.make(), Categorical(), network.inputs()).importance()
    model = network.make()
    w = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert close(torch.cat([v.flatten() for v in found.values.values()]), F.diagonal() * w**2 / 2)
    assert close(torch.cat([v.flatten() for v in found.fisher.values()]), F.diagonal())


def test_it_is_the_rise_of_the_loss():
    """A least-squares fit: its loss is a parabola with no slope, so that importance is the rise
    itself, to rounding. Catches a wrong scale: per batch, per output, a variance left out."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y += torch.randn(40, 3, generator=generator, dtype=torch.float64)
    likelihood = Gaussian(variance=0.3)
    model = nn.Linear(5, 3).double()
    design = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, y).solution
    with torch.no_grad():
        model.weight.copy_(solution[:5].T)
        model.bias.copy_(solution[5])
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def rise(**masks: Tensor) -> float:
        before = -likelihood.log_prob(model(x), y).mean()
        for name, mask in masks.items():
            getattr(model, name)[mask] = 0.0
        after = -likelihood.log_prob(model(x), y).mean()
        for name, value in kept.items():
            getattr(model, name).copy_(value)
        return float(after - before)

    one = torch.zeros(3, 5, dtype=torch.bool)
    one[1, 2] = True
    row = torch.tensor([False, True, False])
    every = torch.ones(3, dtype=torch.bool)
    found = {
        per: ff.parameters.fisher(model, likelihood, x).importance(per=per)
        for per in ("parameter", "unit", "layer")
    }
    assert float(found["parameter"]["weight"][1, 2]) == pytest.approx(rise(weight=one), rel=1e-9)
    assert float(found["unit"][""][1]) == pytest.approx(rise(weight=row, bias=row), rel=1e-9)
    assert float(found["layer"][""]) == pytest.approx(rise(weight=every, bias=every), rel=1e-9)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear", "conv2d grouped", "batch norm 2d"])
def test_only_chosen_parameters_count(name, part):
    """Catches a unit that is gated as a whole where only its weights or its bias are measured."""
    network = NETWORKS[name]
    F = brute_force(network.make(), "categorical", network.inputs())
    found = ff.parameters.fisher(
        network.make(), Categorical(), network.inputs(), parameters=rf"{part}$"
    ).importance(per="unit")
    for layer, parts in members(network.make()).items():
        truth = torch.stack([w @ F @ w / 2 for w in parts[part]])
        assert close(found[layer], truth), layer


@pytest.mark.parametrize("per", ["unit", "layer"])
def test_batch_size_does_not_matter(per):
    """Catches the squared mean of a batch, which falls with its size, and outputs kept from the
    batch before."""
    network = NETWORKS["conv2d strided"]
    x = network.inputs(7)
    whole, parts = (
        ff.parameters.fisher(network.make(), Categorical(), x, batch_size=size).importance(per=per)
        for size in (7, 3)
    )
    for name in whole:
        assert close(parts[name], whole[name])


def test_monte_carlo():
    """False alarms 6e-5 (4 standard errors, from the exact variance of labels drawn); catches
    labels that are not the model's, and samples that are summed in place of averaged."""
    network = NETWORKS["linear"]
    x, samples = network.inputs(16), 400
    gated = Gated(network.make(), "0", -1, 1).requires_grad_(False)
    gated.gates.requires_grad_(True)
    mean, variance = moments_of_trace(gated, "categorical", x)
    found = ff.parameters.fisher(
        network.make(), Categorical(), x, fisher_type="mc", samples=samples, seed=5
    ).importance(per="layer")
    assert found.fisher_type == "mc"
    error = math.sqrt(variance / samples)
    assert error < 0.1 * mean
    assert abs(float(found.fisher["0"]) - mean) < 4 * error


@pytest.mark.parametrize("structure", ["diag", "block", "kfac", "full", "gram", "streamed"])
def test_every_structure(structure):
    """Catches a diagonal that is read in another order."""
    network = NETWORKS["conv2d strided"]
    model = network.make()
    F = ff.parameters.fisher(model, Categorical(), network.inputs(), structure=structure)
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = F.importance()
    assert close(torch.cat([v.flatten() for v in found.values.values()]), F.diag() * w**2 / 2)


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


def test_a_gate_on_a_layer_by_divergence():
    """KL(p || p with a layer times 1 + e) = e^2 fisher / 2: catches another unit of `fisher`."""
    model, x, gate = dense_network(5), inputs(7)[:, 0, :4], 1e-4
    found = ff.parameters.fisher(model, Categorical(), x).importance(per="layer")
    log_p = model(x).log_softmax(1).detach()
    for name in found.values:
        gated = {
            k: w * (1 + gate) if k.startswith(name) else w for k, w in model.named_parameters()
        }
        log_q = torch.func.functional_call(model, gated, x).log_softmax(1)
        divergence = float((log_p.exp() * (log_p - log_q.detach())).sum(1).mean())
        assert divergence / gate**2 == pytest.approx(float(found.fisher[name]) / 2, rel=1e-3)


@pytest.mark.parametrize("per", ["parameter", "unit", "layer"])
def test_scale_that_two_layers_share(per):
    """ReLU(2 w_1 x) w_2 / 2 is the same network: importance does not change, though F does."""
    one, other = (
        seeded(
            lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
        ).eval()
        for _ in range(2)
    )
    with torch.no_grad():
        for w in other[0].parameters():
            w.mul_(2)
        other[2].weight.div_(2)
    x = inputs(7)[:, 0, :4]
    before, after = (
        ff.parameters.fisher(m, Categorical(), x).importance(per=per) for m in (one, other)
    )
    for name in before.values:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-15)
    if per == "parameter":
        assert float(after.fisher["0.bias"].sum() / before.fisher["0.bias"].sum()) < 0.3  # 1/4


def test_bad_arguments():
    """Catches a silent default."""
    model, x = nn.Linear(4, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"per must be one of .*, got 'channel'"):
        ff.parameters.fisher(model, Categorical(), x).importance(per="channel")
    for fraction in (-0.1, 2, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], got"):
            ff.parameters.fisher(model, Categorical(), x).importance().least(fraction)
    with pytest.raises(KeyError, match="name must be one of"):
        ff.parameters.fisher(model, Categorical(), x).importance()["fc"]
    with pytest.raises(ValueError, match="at least one sample"):
        ff.parameters.fisher(model, Categorical(), torch.ones(0, 4)).importance(per="unit")
    with pytest.raises(ValueError, match="fisher_type must be one of"):
        ff.parameters.fisher(model, Categorical(), x, fisher_type="true").importance(per="layer")
    noisy = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(ValueError, match="eval"):
        ff.parameters.fisher(noisy, Categorical(), torch.ones(6, 4)).importance(per="unit")


@pytest.mark.parametrize("per", ["unit", "layer"])
def test_the_model_stays_as_it_is(per):
    """Catches hooks left behind, gradients and a mode that change."""
    model = NETWORKS["batch norm 2d"].make()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    ff.parameters.fisher(model, Categorical(), NETWORKS["batch norm 2d"].inputs()).importance(
        per=per
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("per", ["parameter", "unit", "layer"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_the_least_important(per, fraction):
    """Catches masks of each layer by itself, of the most important, or of another number."""
    network = NETWORKS["conv2d strided"]
    F = ff.parameters.fisher(network.make(), Categorical(), network.inputs())
    found = F.importance(per=per)
    masks = found.least(fraction)
    assert list(masks) == list(found.values)
    assert all(mask.dtype == torch.bool for mask in masks.values())
    chosen = torch.cat([found[name][mask] for name, mask in masks.items()])
    left = torch.cat([found[name][~mask] for name, mask in masks.items()])
    assert len(chosen) == round(fraction * (len(chosen) + len(left)))
    if len(chosen) and len(left):
        assert float(chosen.max()) <= float(left.min())


def test_least_counts_over_the_whole_network():
    """Catches fractions per layer, a rounding down, and ties that take too many."""
    found = ff.parameters.Importance(
        "unit",
        {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 0.5, 9.0])},
        {},
        1,
        "exact",
    )
    masks = found.least(0.4)
    assert masks["a"].tolist() == [False, True]  # the first of two equal ones
    assert masks["b"].tolist() == [False, True, False]
    assert sum(int(mask.sum()) for mask in found.least(0.3).values()) == 2
    assert not any(mask.any() for mask in found.least(0).values())
    assert all(mask.all() for mask in found.least(1).values())


def test_table_and_json():
    """Catches a table without its unit, one that hides where the numbers come from, and numbers
    that JSON refuses."""
    network = NETWORKS["linear"]
    data = (network.inputs(), network.labels())
    found = ff.parameters.fisher(
        network.make(), Categorical(), data, fisher_type="empirical"
    ).importance(per="unit")
    lines = repr(found).splitlines()
    assert lines[0] == "importance per unit in nats (4 samples, empirical)"
    assert lines[2].split()[:2] == ["0", str(len(found["0"]))]
    assert float(lines[2].split()[2]) == pytest.approx(float(found["0"].sum()), rel=5e-3)
    loaded = json.loads(json.dumps(found.to_dict()))
    assert loaded["values"]["0"] == found["0"].tolist()
    assert len(found) == len(list(found)) == 2
    assert "0" in found


def test_figure():
    """Catches sums of the wrong layers, zeros on a logarithm, and lines that are not the data."""
    pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib")
    network = NETWORKS["linear"]
    model = network.make()
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0  # a unit without importance
    found = ff.parameters.fisher(model, Categorical(), network.inputs()).importance(per="unit")
    left, right = found.plot()
    widths = [bar.get_width() for bar in left.patches]
    assert widths == pytest.approx([float(value.sum()) for value in found.values.values()])
    assert [label.get_text() for label in left.get_yticklabels()] == list(found)
    whole = right.lines[-1]
    every = torch.cat([value for value in found.values.values()]).sort().values
    assert list(whole.get_ydata()) == pytest.approx(every[1:].tolist())
    assert whole.get_xdata()[-1] == 1.0
    assert whole.get_xdata()[0] == pytest.approx(2 / len(every))
    left.figure.canvas.draw()
    again = (
        ff.parameters.fisher(model, Categorical(), network.inputs())
        .importance(per="layer")
        .plot((left, right))
    )
    assert again == (left, right)
