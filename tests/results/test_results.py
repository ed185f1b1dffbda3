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
from support.networks_zoo import (
    DTHETA,
    Functional,
    measure,
    mlp,
    samples,
    seeded,
    two_conditions,
)
from support.training_histories import layer as layer_of
from torch import nn

import fisherfast as ff

FORMATS = (".json", ".npz")
SAMPLES = 4000  # J of the input is far enough from 0 to divide by
PAIR_SAMPLES = 8000


@pytest.fixture(scope="module")
def flow() -> ff.FisherFlow:
    """One parameter."""
    return measure(seeded(mlp), two_conditions(SAMPLES))


@pytest.fixture(scope="module")
def pair() -> ff.FisherFlow:
    """Two parameters, independent of each other."""
    minus, plus = samples(2 * PAIR_SAMPLES)
    conditions = []
    for condition, sign in ((minus, -1), (plus, 1)):
        one, two = condition.split(PAIR_SAMPLES)
        one, two = one.clone(), two.clone()
        one[:, 3:] -= sign * 0.1  # theta_1 moves the first three, theta_2 the others
        two[:, :3] -= sign * 0.1
        conditions.append([one, two])
    return measure(seeded(mlp), ff.FiniteDifference(*conditions, DTHETA))


@pytest.fixture(scope="module")
def silent() -> ff.FisherFlow:
    """The last two layers never vary."""

    def build() -> nn.Module:
        model = Functional(torch.relu)
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
    assert flow.names == ["input", "0", "1", "output"]
    assert [layer.name for layer in flow] == flow.names
    assert len(flow) == 4
    assert flow["output"] is flow["2"]
    assert flow["2"].aliases == ("2",)
    assert "output" in flow
    assert "2" in flow
    for missing in ("fc9", "", 0, -1, None, ("0",), slice(0, 1)):
        assert missing not in flow
        text = f"layer must be one of {[*flow.names, '2']}, got {missing!r}"
        with pytest.raises(KeyError) as caught:
            flow[missing]
        assert caught.value.args == (text,)


def test_numbers_of_one_parameter(flow, pair):
    """Catches `value` of a matrix that is silently its first entry."""
    layer = flow["0"]
    assert layer.value == float(layer) == layer.J.item()
    assert flow.parameters == layer.parameters == 1
    assert pair.parameters == pair["0"].parameters == 2
    text = "value needs exactly one parameter, got 2: use .J"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        _ = pair["0"].value
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        float(pair["0"])


def test_results_are_immutable(flow):
    """Catches results that a user changes by accident."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        flow["0"].J = torch.zeros(1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        flow.layers = ()


def test_equality_and_hash(flow):
    """Catches "Boolean value of Tensor is ambiguous" from a generated method; and times or
    addresses in files: results can be compared by their bytes."""
    again = measure(seeded(mlp), two_conditions(SAMPLES))
    assert again.to_dict() == flow.to_dict()
    for one, other in ((flow, again), (flow["0"], again["0"])):
        assert isinstance(one == other, bool)
        assert isinstance(one != other, bool)
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


def test_printed_table(flow, pair):
    """Catches columns that do not line up, units that are not said, and a page of tensors at the
    prompt."""
    lines = str(flow).splitlines()
    assert lines[0].split() == " ".join(flow.table()[0]).split()
    for column in ("shape", "features", "status"):  # columns of text start below their header
        start = lines[0].index(column)
        assert all(line[start - 1] == " " and line[start] != " " for line in lines[2:6])
    assert "J per unit of theta squared; dtheta 0.2; 8000 samples" in lines
    assert "diagonal of J shown" in str(pair)
    assert all(len(line) <= 120 for line in lines)
    assert repr(flow) == str(flow)
    assert len(repr(flow["0"])) < 300


def test_notes_are_printed(silent):
    """Catches a note that is not shown."""
    assert re.search(r"^note: fc1/relu: .*constant", str(silent), re.MULTILINE)


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


def test_no_fraction_of_an_input_that_cannot_be_told_from_zero():
    """J_input = 0.02 +- 0.04 and J_output = 6.35 were printed as -545 +- 4164."""
    flow = ff.FisherFlow(
        (
            layer_of("input", matrix(0.02), stderr=0.04),
            layer_of("output", matrix(6.35), stderr=0.3),
        ),
        {},
    )
    for numbers in (flow.fractions(), flow.fraction_errors()):
        assert all(math.isnan(number) for number in numbers.values())
    assert [row[6] for row in flow.table()[1:]] == ["-", "-"]
    note = "note: J of input is within 3 errors of zero: no ratio to it"
    assert str(flow).count(note) == 1
    assert "nan" not in str(flow)


def test_fractions_of_an_input_without_information(flow, pair):
    """Catches a division by zero, and an error of the solver: two parameters may be one."""
    for result, J in ((flow, (0.0,)), (flow, (-1.0,)), (pair, (1.0, 1.0, 1.0, 1.0))):
        odd = with_layers(result, input=matrix(*J))
        assert all(math.isnan(fraction) for fraction in odd.fractions().values())
        assert len(odd.fraction_errors()) == 4
        assert str(odd)
        assert odd._repr_html_()


@pytest.mark.parametrize(
    ("J", "bound"),
    [
        ((4.0,), (0.5,)),
        ((0.0,), (math.inf,)),
        ((-1.0,), (math.inf,)),
        ((4.0, 0.0, 0.0, 25.0), (0.5, 0.2)),
        ((2.0, 1.0, 1.0, 2.0), (math.sqrt(2 / 3), math.sqrt(2 / 3))),
        ((4.0, 0.0, 0.0, -1.0), (math.inf, math.inf)),
        ((1.0, 1.0, 1.0, 1.0), (math.inf, math.inf)),
        ((0.0, 0.0, 0.0, 0.0), (math.inf, math.inf)),
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
    names = dict(zip(flow.names, (30.0, 10.0, 40.0, 20.0), strict=True))
    tight = chain(flow, **{name: matrix(value) for name, value in names.items()})
    assert [tight[name].item() for name in flow.names] == [40, 40, 40, 20]


def test_tightened_in_every_direction(pair):
    """Catches a later matrix that is taken for one larger entry: it must be larger as a matrix."""
    tight = chain(
        pair,
        **{
            "input": matrix(2, 0, 0, 2),
            "0": matrix(1, 0, 0, 1),
            "1": matrix(3, 0, 0, 0.5),  # not larger in the second direction
            "output": matrix(1.5, 0.4, 0.4, 1.5),  # larger than "0" in every direction
        },
    )
    assert torch.equal(tight["input"], matrix(2, 0, 0, 2))
    assert torch.equal(tight["0"], matrix(1.5, 0.4, 0.4, 1.5))
    assert torch.equal(tight["1"], matrix(3, 0, 0, 0.5))


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


@pytest.mark.parametrize(
    ("which", "suffix"), [("flow", ".json"), ("pair", ".npz"), ("silent", ".json")]
)
def test_files_come_back_to_the_last_bit(which, suffix, tmp_path, request):
    """Catches rounded numbers, lists for tuples, layers without a curve that do not load, and
    attributes that cannot be pickled: results travel between processes."""
    result = request.getfixturevalue(which)
    assert_same(pickle.loads(pickle.dumps(result)), result)
    path = tmp_path / f"flow{suffix}"
    result.save(str(path))
    assert_same(ff.FisherFlow.load(path), result)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_odd_numbers_survive(flow, suffix, tmp_path):
    """Catches NaN and infinity, which JSON has no words for, 0.1 + 0.2, -0.0, subnormals, and
    umlauts."""
    odd = dataclasses.replace(flow["0"], J=matrix(0.1 + 0.2), stderr=matrix(5e-324))
    odd = dataclasses.replace(odd, lower=matrix(-0.0), lower_stderr=matrix(math.nan))
    odd = dataclasses.replace(
        odd, naive=matrix(math.inf), effective_dim=math.inf, aliases=("ö.<b>",)
    )
    odd = dataclasses.replace(odd, notes=('ü "quoted" \n', "é"))
    result = dataclasses.replace(flow, layers=(flow["input"], odd))
    path = tmp_path / f"flow{suffix}"
    result.save(path)
    back = ff.FisherFlow.load(path)
    assert_same(back, result)
    assert math.copysign(1, back["0"].lower.item()) == -1
    assert math.isinf(back["0"].naive.item())


def test_dict_is_plain(flow, pair, silent):
    """Catches tensors, numpy numbers, tuples and NaN in what shall be JSON, and a flow that changes
    when its dict is edited."""
    for result in (flow, pair, silent):
        content = result.to_dict()
        assert json.loads(json.dumps(content, allow_nan=False)) == content
        assert_same(ff.FisherFlow.from_dict(content), result)
        content["settings"]["seed"] = 77
        content["layers"].clear()
        assert result.settings["seed"] == 0


DAMAGES = {
    "no layers": lambda content: content.pop("layers"),
    "layers no list": lambda content: content.update(layers=3),
    "no J": lambda content: content["layers"][1].pop("J"),
    "J text": lambda content: content["layers"][1].update(J="many"),
    "J of other size": lambda content: content["layers"][1].update(J=[[1.0, 0.0], [0.0, 1.0]]),
    "ragged J": lambda content: content["layers"][1].update(J=[[1.0, 2.0], [3.0]]),
    "short curve": lambda content: content["layers"][1]["curve_J"].pop(),
    "format": lambda content: content.update(format="other"),
    "version": lambda content: content.update(format_version=2),
    "no version": lambda content: content.pop("format_version"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_content(flow, how, tmp_path):
    """Catches a flow that loads and fails later, a newer file that is read as if it were an old
    one, and errors without the file's name."""
    content = flow.to_dict()
    DAMAGES[how](content)
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(content))
    text = "format_version must be 1, got " if "version" in how else "content must be "
    with pytest.raises(ValueError, match=rf"flow\.json: {text}"):
        ff.FisherFlow.load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_truncated_files(flow, suffix, tmp_path):
    """Catches EOFError, BadZipFile, half a flow and a checksum that is not looked at: ValueError
    names the file."""
    path = tmp_path / f"flow{suffix}"
    flow.save(path)
    whole = path.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1 :]
    cut = [whole[: int(keep * len(whole))] for keep in (0.0, 0.01, 0.5, 0.99)]
    text = r"flow\.\w+ must hold a saved flow, got a damaged or foreign file"
    for content in cut if suffix == ".json" else [*cut, flipped]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            ff.FisherFlow.load(path)


def archive(**arrays: np.ndarray) -> bytes:
    """An .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'{"a": 1}'),
        ("a.json", b"[1, 2]"),
        ("a.json", b"null"),
        ("a.json", b"3"),
        ("a.json", b"\xff\xfe\x00"),
        ("a.json", b"PK\x03\x04"),
        ("a.json", b"[" * 100_000),
        ("a.npz", b"{}"),
        ("a.npz", b"garbage" * 10),
        ("a.npz", b"\x93NUMPY"),
        ("a.npz", archive(data=np.zeros(3))),
        ("a.npz", archive(flow=np.zeros(3))),
        ("a.npz", archive(flow=np.zeros((2, 2), dtype=np.uint8))),
        ("a.npz", archive(flow=np.array(3.5))),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else value,
)
def test_foreign_files(name, content, tmp_path):
    """Catches KeyError, RecursionError and UnicodeDecodeError, which do not name the file, and
    other people's .npz files."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        ff.FisherFlow.load(path)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(self.target),)

    def __init__(self, target: Path) -> None:
        self.target = str(target)


@pytest.mark.parametrize("form", ["inside .npz", ".npz", ".json"])
def test_nothing_is_unpickled(form, tmp_path):
    """Catches `allow_pickle=True`: a file from elsewhere must not run code."""
    target = tmp_path / "exploded"
    path = tmp_path / f"a.{form[-4:].strip('.')}"
    if form == "inside .npz":
        np.savez(path, flow=np.array([Bomb(target)], dtype=object))
    else:
        path.write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(ValueError, match=re.escape(path.name)):
        ff.FisherFlow.load(path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["flow.npy", "flow.json.gz", ".npz"])
def test_other_suffixes(flow, name, tmp_path):
    """Catches a file in a format that its name does not say."""
    text = f"path must end in .json or .npz, got '{name}'"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        flow.save(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ff.FisherFlow.load(tmp_path / name)


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_files(flow, suffix, tmp_path):
    """Catches ValueError for a file that is not there, and folders that are made silently."""
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
