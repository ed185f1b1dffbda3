"""Printed monitors, records and maps: the exact text of chosen numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from support.training_histories import by_errors, layer, number

import fisherfast as ff
from fisherfast.results.information_map import InformationMap
from fisherfast.training.record import EpochRecord


def record(epoch: int, *, output: float, hidden: float = 3.0) -> EpochRecord:
    """J of 4 at the input; a branch that nothing has to pass loses all of it."""
    way = (("input", 4.0, ("fc", "output")), ("branch", 0.0, ()), ("fc", hidden, ("output",)))
    layers = [
        replace(layer(name, number(J), stderr=0.04, lifted=0.0), descendants=later, cut=bool(later))
        for name, J, later in way
    ]
    layers.append(layer("output", number(output), stderr=0.04, lifted=0.0))
    return EpochRecord(
        epoch=epoch,
        flow=ff.FisherFlow(tuple(layers)),
        train_mse=(0.3,),
        val_mse=None,
        input_J=number(4.0),
        notes=("mean square errors must be finite",),
    )


def monitor(history: list[EpochRecord]) -> ff.FisherMonitor:
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    made = ff.FisherMonitor(torch.nn.Linear(1, 1), ff.Pathwise(x, torch.ones_like(x)))
    made.history += history
    return made


def test_a_record():
    """Catches a loss in a branch, or one that is not the largest."""
    assert str(record(3, output=2.8)) == (
        "epoch  J_output / J_input  most lost in  train mse / bound  val mse / bound\n"
        "---------------------------------------------------------------------------\n"
        "    3      0.700 +- 0.012  fc (0.250)                1.200                -\n"
        "layer     shape      J     +-     J / J_input  status\n"
        "---------------------------------------------------------\n"
        "input     1      4.000  0.040  1.000 +- 0.000  unresolved\n"
        "  branch  1      0.000  0.040  0.000 +- 0.010  unresolved\n"
        "fc        1      3.000  0.040  0.750 +- 0.013  unresolved\n"
        "output    1      2.800  0.040  0.700 +- 0.012  unresolved\n"
        "note: mean square errors must be finite"
    )
    assert repr(record(3, output=2.8)) == "EpochRecord(epoch=3, transmission=0.700 +- 0.012)"
    assert "<td>fc (0.250)</td>" in record(3, output=2.8)._repr_html_()


def test_what_is_not_known_is_a_dash():
    """Catches NaN in the table, and noise that is called a loss: 0.002 +- 0.014."""
    (unmeasured,) = by_errors([0.25], J=math.nan)
    assert str(unmeasured).splitlines()[2].split() == ["0", *"----"]
    assert repr(unmeasured) == "EpochRecord(epoch=0, transmission=-)"
    assert str(record(0, hidden=3.99, output=3.98)).splitlines()[2].split()[4] == "-"


def test_a_monitor():
    """Catches a monitor that prints its address, and one whose long history fills the screen."""
    assert repr(monitor([])) == "FisherMonitor of Linear: 0 epochs, 0 measured"
    history = [record(0, output=2.0), *by_errors([0.25], first=1)]
    assert str(monitor(history)) == (
        "FisherMonitor of Linear [1]: 2 epochs, 1 measured\n"
        "epoch  J_output / J_input  most lost in  train mse / bound  val mse / bound\n"
        "---------------------------------------------------------------------------\n"
        "    0      0.500 +- 0.011  fc (0.250)                1.200                -\n"
        "    1                   -  -                         1.000                -"
    )
    assert "<td>0.500 +- 0.011</td>" in monitor(history)._repr_html_()
    rows = repr(monitor(by_errors([0.25] * 30))).splitlines()[3:]
    assert [row.split()[0] for row in rows] == ["0", "...", *map(str, range(20, 30))]


def test_a_map():
    """Catches positions in another order, the error of another one, and NaN that hides the rest."""
    J = torch.tensor([[1.0, 2.0, math.nan], [0.5, 7.0, 3.0]], dtype=torch.float64)
    both = torch.diag_embed(torch.stack([J, torch.full_like(J, math.nan)], -1))
    printed = InformationMap("conv3", both, both / 10)
    assert str(printed) == (
        "parameter    min  median    max     +-  at\n"
        "----------------------------------------------\n"
        "θ[0]       0.500   2.000  7.000  0.700  [1, 1]\n"
        "θ[1]           -       -      -      -  -\n"
        "map of conv3, [2, 3] positions; J per unit of θ²"
    )
    assert "<td>[1, 1]</td>" in printed._repr_html_()


def test_measured_maps_are_named():
    """Catches the name of another layer, also from a file."""
    x = torch.randn(200, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.ReLU(), torch.nn.Flatten())
    options = {"max_features": 4, "settings": ff.Settings(maps=True)}
    flow = ff.fisher_flow(model, ff.Pathwise(x, torch.ones_like(x)), **options)
    for found in (flow, ff.FisherFlow.from_dict(flow.to_dict())):
        assert [found.map(name).name for name in ("input", "0")] == ["input", "0"]
