"""Networks that call torch.autograd inside, that are scripted, and that map layers with vmap.

They are measured, or the error names the layer and the way out.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.networks_zoo import WIDTH, Written, measure, samples, seeded, two_conditions, untouched
from torch import Tensor, nn

import fisherfast as ff

PAIRED = {"dtheta": 0.2, "paired": True}


def _energy() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))


def _force(m: Any, x: Tensor) -> Tensor:
    x.requires_grad_()
    return -torch.autograd.grad(m.energy(x).sum(), x, create_graph=True)[0]


def _force_that_enables_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return _force(m, x.detach())


def _force_by_formula(m: Any, x: Tensor) -> Tensor:
    slope = 1 - m.energy[0](x).tanh().square()
    return -(slope * m.energy[2].weight) @ m.energy[0].weight


def force_field(force: Any) -> nn.Module:
    """A layer, the force of an energy, a readout."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(WIDTH, WIDTH), Written(force, energy=_energy()), nn.Linear(WIDTH, 2)
        )
    )


@pytest.mark.parametrize("force", [_force, _force_that_enables_gradients])
def test_force_field_is_measured_from_pairs(force):
    """Catches a force field that only runs where graphs are recorded and is refused, another J than
    that of its force by formula, and a later measurement of a monitor that forgets it."""
    x = samples()[0]
    data = ff.FiniteDifference(x, x + 0.2, **PAIRED)
    expected = measure(force_field(_force_by_formula), data)
    model = force_field(force)
    with untouched(model):
        flow = measure(model, data)
        assert torch.is_grad_enabled()
        for name in ("0", "1", "output"):
            assert flow[name].value == pytest.approx(expected[name].value, rel=1e-3)
        monitor = ff.FisherMonitor(model, data, max_features=16)
        for _ in range(3):
            record = monitor.step()
        assert record is not None
        assert record.flow["output"].value == pytest.approx(expected["output"].value, rel=1e-3)


FORCE = (
    "operation torch.autograd.grad in layer '1' must have a derivative, got none: no graph is"
    " recorded here; use FiniteDifference(..., paired=True), Score or Labelled, which need no"
    " derivative"
)


@pytest.mark.parametrize("force", [_force, _force_that_enables_gradients])
def test_force_field_has_no_tangents(force):
    """Catches "element 0 of tensors does not require grad", which says neither where nor what to
    do."""
    model = force_field(force)
    x, dx = torch.randn(300, WIDTH), torch.ones(1, 300, WIDTH)
    calls = (
        lambda: ff.jvp(model, x, dx),
        lambda: ff.propagate(model, x, dx),
        lambda: measure(model, ff.Pathwise(x, dx[0])),
    )
    for call in calls:
        with untouched(model), pytest.raises(ff.dual.DerivativeError) as raised:
            call()
        assert str(raised.value) == FORCE
    report = ff.dual.coverage(model, x)
    assert list(report.failures) == ["torch.autograd.grad"]
    assert report.layers["torch.autograd.grad"] == ["1"]


UNSEEN = (
    "layer {} must run in the forward pass, got none: it never ran, or returned no floating"
    " tensor with one row per sample (a layer inside torch.func.vmap sees one sample, one inside"
    " torch.jit.script is not seen: name the layer around it, or use the module that was scripted)"
)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("whole", [True, False])
def test_scripted_network(whole):
    """Catches "register_forward_pre_hook is not supported", a scripted layer that is not measured,
    wrong tangents, hooks that stay, and an error that does not say why a layer is missing."""
    written = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), _energy()))
    inside = nn.Sequential(written[0], torch.jit.script(written[1]))
    model = torch.jit.script(written) if whole else inside
    data = two_conditions()
    flow, expected = measure(model, data), measure(written, data)
    assert flow.names == (["input", "output"] if whole else ["input", "0", "output"])
    assert not any(module._forward_hooks for module in model.modules())
    for name in flow.names:
        assert flow[name].value == pytest.approx(expected[name].value, rel=1e-5)
    x, dx = torch.randn(5, WIDTH), torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(ff.jvp(model, x, dx), ff.jvp(written, x, dx))
    with pytest.raises(ValueError, match=f"^{re.escape(UNSEEN.format(repr('1.0')))}$"):
        measure(model, data, layers=["1.0"])


def test_layers_inside_vmap():
    """Catches activations of one sample that are taken for a batch, wrong tangents, and an error
    that does not say why the layer is missing."""
    written = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), _energy()))
    parts = {"first": written[0], "net": written[1]}
    model = Written(lambda m, x: torch.func.vmap(m.net)(m.first(x)), **parts)
    data = two_conditions()
    flow = measure(model, data)
    assert flow.names == ["input", "first", "output"]
    assert flow["output"].value == pytest.approx(measure(written, data)["output"].value, rel=1e-5)
    x, dx = torch.randn(5, WIDTH), torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(ff.jvp(model, x, dx), ff.jvp(written, x, dx))
    with pytest.raises(ValueError, match=f"^{re.escape(UNSEEN.format(repr('net.0')))}$"):
        measure(model, data, layers=["net.0"])
