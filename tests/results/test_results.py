"""What a measurement returns: indexing, tables, fractions, bounds, and files that come back."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks_zoo import DTHETA, functional, measure, mlp, seeded, two_conditions
from support.training_histories import layer as layer_of
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift

FORMATS = (".json", ".npz")
SAMPLES = 4000  # J of the input is far enough from 0 to divide by


@pytest.fixture(scope="module")
def flow() -> ff.FisherFlow:
    """One parameter."""
    return measure(seeded(mlp), two_conditions(SAMPLES))


@pytest.fixture(scope="module")
def pair() -> ff.FisherFlow:
    """Two parameters, independent of each other."""
    problem = GaussianShift(torch.eye(2).repeat_interleave(3, 0))
    return measure(seeded(mlp), problem.finite_difference([0.0, 0.0], DTHETA, 2 * SAMPLES, seed=1))


@pytest.fixture(scope="module")
def silent() -> ff.FisherFlow:
    """The last two layers never vary."""

    def build() -> nn.Module:
        model = functional(torch.relu)
        with torch.no_grad():
            model.fc1.bias.fill_(-1e6)
        return model

    return measure(seeded(build))


def matrix(*rows: float) -> torch.Tensor:
    """A square float64 matrix from its entries."""
    size = math.isqrt(len(rows))
    return torch.tensor(rows, dtype=torch.float64).view(size, size)


def with_layers(flow: ff.FisherFlow, **matrices: torch.Tensor) -> ff.FisherFlow:
    """The flow with other J: layer name to matrix."""
    layers = tuple(
        dataclasses.replace(layer, J=matrices.get(layer.name, layer.J)) for layer in flow
    )
    return dataclasses.replace(flow, layers=layers)


# --- finding layers ---


def test_indexing(flow):
    """Catches an alias that is a copy, an order that is alphabetic, and numbers as indices."""
    assert flow.names == [layer.name for layer in flow] == ["input", "0", "1", "output"]
    assert len(flow) == 4
    assert flow["output"] is flow["2"]
    assert flow["2"].aliases == ("2",)
    assert "output" in flow
    assert "2" in flow
    for missing in ("fc9", "", 0, -1, None, ("0",), slice(0, 1)):
        assert missing not in flow
        with pytest.raises(KeyError) as caught:
            flow[missing]
        text = f"layer must be one of {[*flow.names, '2']}, got {missing!r}"
        assert caught.value.args == (text,)


def test_numbers_of_one_parameter(flow, pair):
    """Catches `value` of a matrix that is silently its first entry, and results that a user changes
    by accident."""
    layer = flow["0"]
    assert layer.value == float(layer) == layer.J.item()
    assert flow.parameters == layer.parameters == 1
    assert pair.parameters == pair["0"].parameters == 2
    for number in (float, lambda layer: layer.value):
        with pytest.raises(
            ValueError, match=r"^value needs exactly one parameter, got 2: use \.J$"
        ):
            number(pair["0"])
    for frozen, name in ((layer, "J"), (flow, "layers")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, ())


def test_equality_and_hash(flow):
    """Catches "Boolean value of Tensor is ambiguous" from a generated method; and times or
    addresses in files: results can be compared by their bytes."""
    again = measure(seeded(mlp), two_conditions(SAMPLES))
    assert again.to_dict() == flow.to_dict()
    for one, other in ((flow, again), (flow["0"], again["0"])):
        assert isinstance(one == other, bool)
        assert one == one
    assert flow["0"] != flow["1"]
    assert flow != "flow"
    assert flow["0"] in list(flow)


# --- words ---


def test_table(flow, pair):
    """Catches a column or row that is missing, and numbers that are not those of the layer."""
    names = "layer", "shape", "dim", "J", "+-", "lower", "J / J_input", "features", "status"
    for result in (flow, pair):
        header, *rows = result.table()
        assert tuple(header) == names
        assert [row[0] for row in rows] == ["input", "0", "1", "output = 2"]
        assert {len(row) for row in rows} == {len(header)}
        assert rows[0][6].startswith("1.000 ")
        numbers = [float(cell) for cell in rows[0][3].split(",")]
        assert numbers == pytest.approx(result["input"].J.diagonal().tolist(), rel=1e-3)


def test_printed_table(flow, pair, silent):
    """Catches columns that do not line up, units that are not said, a page of tensors at the
    prompt, and a note that is not shown."""
    lines = str(flow).splitlines()
    assert lines[0].split() == " ".join(flow.table()[0]).split()
    for column in ("shape", "features", "status"):  # columns of text start below their header
        start = lines[0].index(column)
        assert all(line[start - 1] == " " and line[start] != " " for line in lines[2:6])
    assert "J per unit of θ²; dtheta 0.2; 8000 samples" in lines
    assert "diagonal of J shown" in str(pair)
    assert all(len(line) <= 120 for line in lines)
    assert repr(flow) == str(flow)
    assert len(repr(flow["0"])) < 300
    assert re.search(
        r"^note: 3 layers \(fc1, fc1/relu, output\): all 2 to 5 .*constant",
        str(silent),
        re.MULTILINE,
    )


def test_html_is_escaped():
    """Catches names that break the page: module names may hold any character."""
    model = nn.Module()
    hostile = "<script>alert('&')</script>"
    model.add_module(hostile, nn.Linear(6, 2))
    model.forward = lambda x: torch.tanh(getattr(model, hostile)(x))
    html = measure(model)._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<tr>") == html.count("</tr>") == 4
    assert html.startswith("<")


# --- fractions and bounds ---


def test_fractions(flow, pair):
    """tr(J_input^-1 J) / P. Catches J over the layer before, or over the largest, the ratio of
    traces or of determinants, and the error of J_input beside a ratio that is 1 whatever it is."""
    for result in (flow, pair):
        fractions, errors = result.fractions(), result.fraction_errors()
        assert list(fractions) == list(errors) == result.names
        assert fractions["input"] == pytest.approx(1, abs=1e-12)
        assert errors["input"] == pytest.approx(0, abs=1e-12)
        for layer in result:
            solved = torch.linalg.solve(result["input"].J, layer.J)
            expected = solved.trace().item() / result.parameters
            assert fractions[layer.name] == pytest.approx(expected, rel=1e-9)


def test_no_fraction_of_an_input_without_information(flow, pair):
    """J_input = 0.02 +- 0.04 and J_output = 6.35 were printed as -545 +- 4164. Catches a division
    by zero, and an error of the solver: two parameters may be one."""
    noisy = layer_of("input", matrix(0.02), stderr=0.04)
    noisy = ff.FisherFlow((noisy, layer_of("output", matrix(6.35), stderr=0.3)), {})
    note = "note: J of input is within 3 errors of zero: no ratio to it"
    assert str(noisy).count(note) == 1
    assert "nan" not in str(noisy)
    assert noisy._repr_html_()
    assert [row[6] for row in noisy.table()[1:]] == ["-", "-"]
    odd = [(flow, (0.0,)), (flow, (-1.0,)), (pair, (1.0, 1.0, 1.0, 1.0))]
    for result in (noisy, *(with_layers(result, input=matrix(*J)) for result, J in odd)):
        for numbers in (result.fractions(), result.fraction_errors()):
            assert list(numbers) == result.names
            assert all(math.isnan(number) for number in numbers.values())
        assert str(result)


@pytest.mark.parametrize(
    ("J", "bound"),
    [
        ((4.0,), (0.5,)),
        ((4.0, 0.0, 0.0, 25.0), (0.5, 0.2)),
        ((2.0, 1.0, 1.0, 2.0), (math.sqrt(2 / 3), math.sqrt(2 / 3))),
        ((4.0, 0.0, 0.0, -1.0), (math.inf, math.inf)),
        ((1.0, 1.0, 1.0, 1.0), (math.inf, math.inf)),
        ((4e-20, 0.0, 0.0, 25e20), (0.5e10, 0.2e-10)),
    ],
)
def test_cramer_rao_bound(flow, J, bound):
    """sqrt(diag J^-1), in the unit of theta. Catches 1 / J_ii, a variance, and NaN of a bad J.

    The last case: parameters in metres and in nanometres are both known.
    """
    crlb = dataclasses.replace(flow["0"], J=matrix(*J)).crlb
    assert crlb.dtype == torch.float64
    torch.testing.assert_close(crlb, torch.tensor(bound, dtype=torch.float64))


def test_dim_and_finite_step(flow):
    """Catches dtheta sqrt(J) without the half, and NaN of a negative J."""
    layer = flow["0"]
    assert layer.dim == 4
    expected = DTHETA * math.sqrt(layer.value) / 2
    assert layer.finite_step.tolist() == pytest.approx([expected])
    negative = dataclasses.replace(layer, J=matrix(-1.0)).finite_step
    assert negative.shape == (1,)
    assert not negative.isnan().any()


# --- tightened ---


def chain(flow: ff.FisherFlow, **matrices: torch.Tensor) -> dict[str, torch.Tensor]:
    """J of each layer after `tightened`."""
    return {layer.name: layer.J for layer in with_layers(flow, **matrices).tightened()}


def test_tightened_takes_the_best_later_layer(flow):
    """Catches the next layer instead of the best, and a chain that is used backwards."""
    values = (30.0, 10.0, 40.0, 20.0)
    tight = chain(flow, **{n: matrix(value) for n, value in zip(flow.names, values, strict=True)})
    assert [tight[name].item() for name in flow.names] == [40, 40, 40, 20]


def test_tightened_in_every_direction(pair):
    """Catches a later matrix that is taken for one larger entry: it must be larger as a matrix."""
    two, one = matrix(2, 0, 0, 2), matrix(1, 0, 0, 1)
    partly = matrix(3, 0, 0, 0.5)  # not larger in the second direction
    larger = matrix(1.5, 0.4, 0.4, 1.5)  # than "0" in every direction
    tight = chain(pair, **{"input": two, "0": one, "1": partly, "output": larger})
    assert torch.equal(tight["input"], two)
    assert torch.equal(tight["0"], larger)
    assert torch.equal(tight["1"], partly)


def test_tightened_says_so_and_keeps_errors_with_values(flow):
    """Catches a J of one layer beside the error of another, a silent replacement, and values that
    climb from layer to layer."""
    raised = with_layers(flow, input=matrix(-10.0))
    tight = raised.tightened()
    source = max(raised["input"].descendants, key=lambda name: raised[name].value)
    layer = tight["input"]
    assert layer.value == raised[source].value
    assert torch.equal(layer.stderr, raised[source].stderr)
    assert torch.equal(layer.replicates, raised[source].replicates)
    assert layer.status == raised[source].status
    assert any(source in note for note in layer.notes)
    assert torch.equal(raised["input"].J, matrix(-10.0))
    assert [layer.value for layer in tight.tightened()] == [layer.value for layer in tight]


def test_the_largest_of_equal_layers_is_no_gain(flow):
    """Eight layers of J = 4 with errors of 0.3 of their own, 100 times: the mean after `tightened`
    is 4 within 4 errors and the 2 % of choices by chance (each at most 1 higher). Catches the
    largest of them, which is 4.4 in the mean; a layer that has 1 less is still found."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layer{i}" for i in range(8)]
    folds, error, truth = 16, 0.3, 4.0

    def noisy(name: str, J: float, later: list[str]) -> ff.LayerFisher:
        shift, wobble = torch.randn(1, generator=generator), torch.randn(folds, generator=generator)
        scale = error / math.sqrt(folds - 1)
        value = matrix(J + error * float(shift))
        return dataclasses.replace(
            flow["input"],
            name=name,
            J=value,
            stderr=matrix(error),
            error_covariance=matrix(error**2),
            replicates=value + scale * wobble.double()[:, None, None],
            descendants=tuple(later),
        )

    def first(J: float) -> float:
        layers = [noisy(n, J if i == 0 else truth, names[i + 1 :]) for i, n in enumerate(names)]
        return dataclasses.replace(flow, layers=tuple(layers)).tightened()[names[0]].value

    equal = torch.tensor([first(truth) for _ in range(100)])
    assert float(equal.mean()) == pytest.approx(truth, abs=4 * error / math.sqrt(100) + 0.02)
    assert sum(first(truth - 2.5) > truth - 1 for _ in range(10)) == 10


# --- files ---


def assert_same(one: ff.FisherFlow, other: ff.FisherFlow) -> None:
    """All fields of both, numbers to the last bit."""
    assert one.names == other.names
    assert one.settings == other.settings
    assert one.version == other.version
    for first, second in zip(one, other, strict=True):
        for field in dataclasses.fields(first):
            old, new = getattr(first, field.name), getattr(second, field.name)
            assert type(old) is type(new), field.name
            if isinstance(old, torch.Tensor):
                assert old.dtype == new.dtype, field.name
                assert old.shape == new.shape, field.name
                assert torch.equal(old.nan_to_num(-7), new.nan_to_num(-7)), field.name
            else:
                assert old == new, field.name


@pytest.fixture(scope="module")
def odd(flow) -> ff.FisherFlow:
    """NaN and infinity, which JSON has no words for, 0.1 + 0.2, -0.0, subnormals, and umlauts."""
    odd = dataclasses.replace(
        flow["0"],
        J=matrix(0.1 + 0.2),
        stderr=matrix(5e-324),
        lower=matrix(-0.0),
        lower_stderr=matrix(math.nan),
        naive=matrix(math.inf),
        effective_dim=math.inf,
        aliases=("ö.<b>",),
        notes=('ü "quoted" \n', "é"),
    )
    return dataclasses.replace(flow, layers=(flow["input"], odd))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("which", ["flow", "pair", "silent", "odd"])
def test_files_come_back_to_the_last_bit(which, suffix, tmp_path, request):
    """Catches rounded numbers, lists for tuples, layers without a curve that do not load, and
    attributes that cannot be pickled: results travel between processes; tensors, numpy numbers,
    tuples and NaN in what shall be JSON, and a flow that changes when its dict is edited."""
    result = request.getfixturevalue(which)
    assert_same(pickle.loads(pickle.dumps(result)), result)
    path = tmp_path / f"flow{suffix}"
    result.save(str(path))
    back = ff.FisherFlow.load(path)
    assert_same(back, result)
    if which == "odd":
        assert math.copysign(1, back["0"].lower.item()) == -1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    content = result.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert_same(ff.FisherFlow.from_dict(content), result)
    content["settings"]["seed"] = 77
    content["layers"].clear()
    assert result.settings["seed"] == 0


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def archive(flow: object) -> bytes:
    """An .npz file."""
    file = io.BytesIO()
    np.savez(file, flow=flow)
    return file.getvalue()


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_and_foreign_files(flow, suffix, tmp_path):
    """Catches EOFError, BadZipFile, KeyError, RecursionError and UnicodeDecodeError: ValueError
    names the file; half a flow, a checksum that is not looked at, other people's .npz files, and
    `allow_pickle=True`: a file from elsewhere must not run code."""
    path, target = tmp_path / f"flow{suffix}", tmp_path / "exploded"
    flow.save(path)
    whole, bomb = path.read_bytes(), Bomb(target)
    half = len(whole) // 2
    contents = [whole[: int(keep * len(whole))] for keep in (0.0, 0.01, 0.5, 0.99)]
    contents += [b"garbage" * 10, b"{}", pickle.dumps(bomb)]
    if suffix == ".json":
        contents += [b"[1, 2]", b"null", b"3", b"\xff\xfe\x00", b"PK\x03\x04", b"[" * 100_000]
    else:
        contents += [whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1 :], b"\x93NUMPY"]
        contents += [archive(np.array(a)) for a in ([0.0] * 3, 3.5, np.uint8([[1]]), bomb)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"flow\{suffix}"):
            ff.FisherFlow.load(path)
    assert not target.exists()


def test_paths_that_are_refused(flow, tmp_path):
    """Catches a file in a format that its name does not say, ValueError for a file that is not
    there, and folders that are made silently."""
    for name in ("flow.npy", "flow.json.gz", ".npz"):
        text = f"^{re.escape('path must end in .json or .npz')}, got '{re.escape(name)}'$"
        for call in (flow.save, ff.FisherFlow.load):
            with pytest.raises(ValueError, match=text):
                call(tmp_path / name)
    for suffix in FORMATS:
        with pytest.raises(FileNotFoundError):
            ff.FisherFlow.load(tmp_path / f"none{suffix}")
        with pytest.raises(FileNotFoundError):
            flow.save(tmp_path / "none" / f"flow{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", FORMATS)
def test_failed_save_keeps_the_old_file(flow, suffix, tmp_path):
    """Catches a good file that is emptied before the new content is known to be fine."""
    path = tmp_path / f"flow{suffix}"
    flow.save(path)
    before = path.read_bytes()
    broken = dataclasses.replace(flow, settings={"object": object()})
    with pytest.raises((TypeError, ValueError)):
        broken.save(path)
    assert path.read_bytes() == before
