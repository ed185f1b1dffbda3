"""Sources of samples: every kind gives the same J; every bad one says what is wrong with it."""

from __future__ import annotations

import math
import re
import weakref

import numpy as np
import pytest
import torch
from support.networks_zoo import DTHETA, WIDTH, measure, mlp, samples, seeded, untouched
from support.pairwise import pairwise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff

BATCH = 70  # does not divide the 400 samples: the last batch is smaller
KINDS = (
    "a tensor, an array, a tuple or dict of these, a Dataset, a DataLoader, an iterable of batches"
    " or a function that returns one"
)
EMPTY = (
    "must yield at least one sample, got an empty source (an iterator can be read once only: "
    "pass a function that returns a new one)"
)
REAL = "must have a floating dtype, got "
FLOATING = "; convert with .float(), or split complex numbers into real and imaginary part"


class Items(TensorDataset):
    """Samples by index, not in a tuple."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index)[0]


SOURCES = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "tensor with gradients": lambda x: x.clone().requires_grad_(),
    "TensorDataset": TensorDataset,
    "Dataset": Items,
    "DataLoader": lambda x: DataLoader(TensorDataset(x), batch_size=BATCH),
    "DataLoader of tensors": lambda x: DataLoader(Items(x), batch_size=BATCH),
    "function returning a list": lambda x: lambda: list(x.split(BATCH)),
    "generator function": lambda x: lambda: (part for part in x.split(BATCH)),
    "arrays from a generator": lambda x: lambda: (part.numpy() for part in x.split(BATCH)),
    "tuples from a generator": lambda x: lambda: ((part,) for part in x.split(BATCH)),
    "function returning a tensor": lambda x: lambda: x,
    "batches without samples": lambda x: lambda: [x[:0], x[:200], x[:0], x[200:], x[:0]],
    "one-shot iterator": lambda x: iter(x.split(BATCH)),
}


def with_one(source: object, name: str, other: object) -> ff.FiniteDifference:
    """Data whose condition `name` is the source, and whose other condition is fine."""
    return ff.FiniteDifference(*((source, other) if name == "minus" else (other, source)), DTHETA)


def message(text: str) -> str:
    """A pattern that matches exactly this text."""
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize(
    ("kind", "paired"), [(kind, index % 2 == 0) for index, kind in enumerate(SOURCES)]
)
def test_every_kind_of_source_gives_the_same_information(kind, paired):
    """Catches a lost last batch, a sample that is dealt differently, a lift that is fixed by the
    batches of a source, an empty batch that ends in NaN, and the seed that every pass over a
    DataLoader draws from the user's random stream.

    Raw J of float64 samples; the batches differ, the sums are the same to 1e-12 (seen: 1e-14). The
    correlation of pairs is a mean over lifted features too, which follow the pilot (seen: 1e-7).
    """
    tolerance = 1e-5 if paired else 1e-12
    minus, plus = (x.double() for x in samples())
    model = seeded(mlp).double()
    reference = measure(model, ff.FiniteDifference(minus, plus, DTHETA, paired=paired))
    make = SOURCES[kind]
    data = ff.FiniteDifference(make(minus), make(plus), DTHETA, paired=paired)
    with untouched(model):
        flow = measure(model, data, settings=ff.Settings(batch_size=BATCH))
    for layer, expected in zip(flow, reference, strict=True):
        assert layer.samples == expected.samples == 800
        torch.testing.assert_close(layer.linear, expected.linear, rtol=tolerance, atol=tolerance)
        assert layer.linear > 0
    lifted, expected = flow["input"].curve_J, reference["input"].curve_J
    torch.testing.assert_close(lifted, expected, rtol=1e-5 if paired else 1e-9, atol=1e-9)


def test_conditions_may_be_of_different_kinds_and_lengths():
    """Catches a length of one condition that is used for the other."""
    minus, plus = samples()
    info = ff.fisher_information(
        ff.FiniteDifference(minus[:300], lambda: plus.split(BATCH), DTHETA), max_features=16
    )
    assert info.samples == 700
    assert info.value == pytest.approx(WIDTH, abs=4 * info.stderr.item())


def test_several_parameters_from_lists():
    """Catches parameters or steps in a wrong order. Within 4 sigma of J = shift^2 / step^2."""
    steps = [0.2, 0.05]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2000, 3, generator=generator)
    x[:2, :, 0] += torch.tensor([[-0.1], [0.1]])
    x[2:, :, 1] += torch.tensor([[-0.1], [0.1]])
    data = ff.FiniteDifference([x[0], x[2].numpy()], [x[1], lambda: [x[3]]], steps)
    assert (data.parameters, data.conditions) == (2, 4)
    names = [data.condition_name(condition) for condition in range(4)]
    assert names == ["minus[0]", "plus[0]", "minus[1]", "plus[1]"]
    assert [data.samples(c) for c in range(4)] == [2000, 2000, 2000, None]
    info = ff.fisher_information(data, max_features=16)
    assert info.dtheta == tuple(steps)
    truth = torch.tensor([[1.0, 0.0], [0.0, 16.0]], dtype=torch.float64)
    assert info.J.shape == info.stderr.shape == info.lower.shape == (2, 2)
    assert ((info.linear - truth).abs() < 4 * info.linear_stderr).all()


def test_contrast_is_the_full_step():
    """Catches weights that are 2 / dtheta, and a step that must be a Python float."""
    x = torch.zeros(4, 2)
    weights = ff.FiniteDifference([x, x], [x, x], [0.1, 0.5]).contrast()
    expected = torch.tensor([[-10, 0], [10, 0], [0, -2], [0, 2]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    for step in (torch.tensor(0.25), np.float32(0.25), np.array([0.25]), [0.25], (0.25,)):
        assert ff.FiniteDifference(x, x, step).contrast()[1, 0] == 4


def test_batches_cut_tensors_and_keep_those_of_loaders():
    """Catches a lost remainder, reordered samples and rebatched loaders."""
    minus, plus = samples(20)
    data = ff.FiniteDifference(minus, lambda: ((part,) for part in plus.split(6)), DTHETA)
    assert [len(batch) for batch in data.read(0, 8)] == [8, 8, 4]
    assert [len(batch) for batch in data.read(1, 8)] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([batch.x for batch in data.read(0, 8)]), minus)
    assert torch.equal(torch.cat([batch.x for batch in data.read(1, 8)]), plus)


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


CHANGES = {
    "read only": read_only,
    "reversed": lambda x: x[:, ::-1],
    "other byte order": lambda x: x.astype(">f4"),
    "half": lambda x: x.astype("float16"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_arrays_of_any_layout(change):
    """Catches arrays handed to torch as they are: its warning about memory-mapped data, its errors
    about negative strides and foreign byte order; and arrays that the measurement writes to."""
    minus, plus = samples()
    arrays = [CHANGES[change](x.numpy().copy()) for x in (minus, plus)]
    before = [array.copy() for array in arrays]
    info = ff.fisher_information(ff.FiniteDifference(*arrays, DTHETA), max_features=16)
    expected = ff.fisher_information(ff.FiniteDifference(minus, plus, DTHETA), max_features=16)
    torch.testing.assert_close(info.linear, expected.linear, rtol=1e-2, atol=0)
    assert all((array == copy).all() for array, copy in zip(arrays, before, strict=True))


X, Y = samples(64)
POSITIVE = "dtheta must be positive and finite, got "
SHAPES = "all conditions must have samples of the same shape, got [(5,), (6,)]"
NUMBER = "dtheta must be a number or a sequence of numbers, got "
STEPS = "dtheta must hold one step or one per parameter (1), got "
ENTRY = (
    "must be a tensor or array [n, ...] or a constant (a number, a string, None), got {}; a"
    " Dataset, DataLoader or stream of several inputs yields tuples or dicts itself"
)
NOTHING = "minus must hold tensors or arrays [n, ...], got constants"
ROWS = (
    "minus['b'] must have 64 rows as minus['a'] has, got 5: one per sample; what all samples share"
    " belongs into the model, or is repeated with .expand(n, ...)"
)
SHUFFLED = DataLoader(TensorDataset(X), batch_size=8, shuffle=True)
SPARSE = "minus must be dense, got torch.sparse_coo; convert with .to_dense()"
PAIRED = "paired conditions must have the same number of samples, got [63, 64]"
ORDER = "minus must keep its order when paired, got a shuffled DataLoader"
COUNTS = "plus must hold as many conditions as minus, got 1 and 2"
WRONG = {
    **{f"step {s}": (X, Y, s, POSITIVE + str(s)) for s in (0, -1, -0.0, math.nan, math.inf)},
    "second step": ([X, X], [Y, Y], [0.1, -0.1], POSITIVE + "[0.1, -0.1]"),
    **{f"{len(s)} steps": (X, Y, s, f"{STEPS}{len(s)}") for s in ([], [0.1, 0.2])},
    **{f"step {s!r}": (X, Y, s, f"{NUMBER}{s!r}") for s in (True, "0.1", None, [0.1, "x"], 1j)},
    "lengths": ([X, X], [Y], [0.1, 0.1], COUNTS),
    "no list": ([], [], [], "minus must hold at least one condition, got an empty list"),
    "second shape": ([X, X], [Y, Y[:, :5]], DTHETA, SHAPES),
    "pairs": (X, Y[1:], DTHETA, PAIRED),
    "order": (SHUFFLED, SHUFFLED, DTHETA, ORDER),
    "a dict and a tensor": ({"x": X}, Y, DTHETA, f"{SHAPES[:-12]}{{'x': [6]}} and [6]"),
    "a dict and a tuple": ({"x": X}, (Y, Y), DTHETA, f"{SHAPES[:-12]}{{'x': [6]}} and ([6], [6])"),
    "a tuple of loaders": ((X, [Y]), (X, Y), DTHETA, f"minus[1] {ENTRY.format('list')}"),
    "rows": ({"a": X, "b": X[:5]}, {"a": X, "b": X}, DTHETA, ROWS),
    "constants": (
        (3, None),
        Y,
        DTHETA,
        "minus must hold tensors or arrays [n, ...], got constants",
    ),
    "complex entry": ((X, X + 0j), Y, DTHETA, f"minus[1] {REAL}torch.complex64{FLOATING}"),
    **{
        f"{source!r}": (source, Y, DTHETA, f"minus must be {KINDS}, got {type(source).__name__}")
        for source in ("data.npz", b"data", 3, None)
    },
    "sparse": (X.to_sparse(), Y, DTHETA, SPARSE),
    "a number": (X[0, 0], Y, DTHETA, "minus must have shape [n, ...], got a single number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_are_refused(case):
    """Catches an infinite or negative J, conditions left out by zip, pairs torn apart, True read as
    1, (image, exposure) read as two parameters, and the letters of a file name taken for batches.
    """
    minus, plus, step, text = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message(text)):
        ff.FiniteDifference(minus, plus, step, paired=case in ("pairs", "order"))


PAIRS = "^paired conditions must yield .*got "
STREAMS = {
    "shapes": (lambda x, y: (x[:, :5].split(BATCH), y.split(BATCH)), r"must have .*\(5,\).*\(6,\)"),
    "one batch": (lambda x, y: ([x[:, :5]], [y]), r"must have .*shape.*\(5,\).*\(6,\)"),
    "within": (
        lambda x, y: ([x, x[:, :5]], [y]),
        r"^layer 'input' must have the same shape for all samples, got \(5,\) after \(6,\)$",
    ),
    "pairs": (lambda x, y: (x.split(BATCH), y[:-BATCH].split(BATCH)), PAIRS),
    "pairs but one": (lambda x, y: (x.split(BATCH), y[:-1].split(BATCH)), PAIRS),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_must_fit(case):
    """Catches torch's own words about sizes, moments that mix samples of different shapes, and
    pairs of streams that end when the first one does."""
    make, text = STREAMS[case]
    minus, plus = make(*samples())
    data = ff.FiniteDifference(lambda: minus, lambda: plus, DTHETA, paired=case.startswith("pairs"))
    model = nn.Identity()
    with untouched(model), pytest.raises(ValueError, match=text):
        measure(model, data)


@pairwise(
    name=["minus", "plus"],
    convert=["int", "bool", "complex"],
    kind=["tensor", "array", "DataLoader", "generator function"],
)
def test_dtype_must_be_floating(kind, convert, name):
    """Catches integers that overflow, masks, and complex numbers whose imaginary part is lost."""
    x, y = samples(64)
    bad = {"int": x.int(), "bool": x > 0, "complex": torch.complex(x, x)}[convert]
    dtype = str(bad.dtype).removeprefix("torch." if kind == "array" else "")
    source = SOURCES[kind](bad)
    model = nn.Identity()
    text = re.escape(f"{name} {REAL}{dtype}{FLOATING}")
    if convert != "complex":
        text = "^plus must be floating or integers as the first batch is, torch.* got torch.*float"
    with untouched(model), pytest.raises(TypeError, match=text):
        measure(model, with_one(source, name, y))


@pytest.mark.parametrize("kind", ["tensor", "array", "DataLoader", "one-shot iterator", "none"])
def test_empty_sources(kind):
    """Catches a division by zero, or a J of 0, from a source without samples."""
    model = seeded(mlp)
    for name in ("minus", "plus"):
        empty = (lambda: []) if kind == "none" else SOURCES[kind](X[:0])
        with untouched(model), pytest.raises(ValueError, match=message(f"{name} {EMPTY}")):
            measure(model, with_one(empty, name, Y))


def test_second_measurements():
    """Catches one-shot data that yield nothing the second time and say nothing, and a function
    whose first iterator is kept."""
    x, y = samples()
    data = ff.FiniteDifference(lambda: iter([x]), lambda: iter([y]), DTHETA)
    first, second = (ff.fisher_information(data, max_features=16) for _ in range(2))
    assert torch.equal(first.curve_J, second.curve_J)
    data = ff.FiniteDifference(iter([x]), iter([y]), DTHETA)
    model = seeded(mlp)
    measure(model, data)
    with untouched(model), pytest.raises(ValueError, match=message(f"minus {EMPTY}")):
        measure(model, data)


YIELD = "minus must yield tensors or arrays [n, ...], got "
OTHER = r"^plus must have the same entries .* every batch, got \[6\] in batch 0 after "
BAD_BATCHES = {
    **{
        f"batch {batch!r}": (lambda batch=batch: [batch], message(YIELD + type(batch).__name__))
        for batch in ("abc", 3.0, None, ())
    },
    "dict": (lambda: [{"x": X}], OTHER),
    "tuple in a tuple": (lambda: [((X, X),)], r"^minus must be a tensor or array .*got tuple"),
    "labels": (lambda: ((part, part) for part in X.split(BATCH)), OTHER),
    "labels of a loader": (DataLoader(TensorDataset(X, X)), OTHER),
    "scalars": (lambda: [torch.tensor(1.0)], "^minus must "),
    "a forgotten return": (lambda: None, "^minus must .*(iterable|yield|return)"),
    "a number": (lambda: 3, "^minus must .*(iterable|yield|return)"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_batches_that_are_no_samples(case):
    """Catches a dict whose first key is iterated, a second input of the model that is dropped
    without a word, and torch's own words about missing attributes, iterators and 0-d tensors."""
    source, text = BAD_BATCHES[case]
    model = seeded(mlp)
    with untouched(model), pytest.raises((TypeError, ValueError), match=text):
        measure(model, ff.FiniteDifference(source, Y, DTHETA))


def test_errors_of_the_source_pass_through():
    """Catches a user's own error that is swallowed or renamed, in the pilot and later."""
    x, y = samples()

    def broken(batches: int):
        yield from x.split(BATCH)[:batches]
        raise OSError("disk is gone")

    model = seeded(mlp)
    for batches in (0, 1, 5):
        data = ff.FiniteDifference(lambda batches=batches: broken(batches), y, DTHETA)
        with untouched(model), pytest.raises(OSError, match=message("disk is gone")):
            measure(model, data, settings=ff.Settings(batch_size=BATCH))


def test_a_shuffled_loader_leaves_the_random_state():
    """Catches the seed that every pass over a DataLoader draws from the user's random stream."""
    model, data = nn.Identity(), ff.FiniteDifference(SHUFFLED, SHUFFLED, DTHETA)
    for measurement in (ff.fisher_information, lambda data: measure(model, data)):
        with untouched(model):
            measurement(data)


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_streams_are_read_once(paired):
    """Catches a second pass: the function is called once, every batch is asked for once."""
    x, y = samples()
    calls, batches = [], []

    def reader(name: str, source: torch.Tensor):
        def read():
            calls.append(name)
            for number, part in enumerate(source.split(BATCH)):
                batches.append((name, number))
                yield part

        return read

    data = ff.FiniteDifference(reader("minus", x), reader("plus", y), DTHETA, paired=paired)
    measure(seeded(mlp), data)
    assert sorted(calls) == ["minus", "plus"]
    assert len(batches) == len(set(batches)) == 2 * len(x.split(BATCH))


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_batches_are_let_go(paired):
    """Catches anything of size [samples, features] that is kept: batches and activations both.

    An array lives as long as a tensor made of it: of 160 batches at most the pilot's (2048 samples
    in 64 batches) and a handful more may be alive at once.
    """
    batches, size, allowed = 80, 32, 64 + 12
    alive: set[int] = set()
    most = 0

    def watched(values: np.ndarray) -> np.ndarray:
        nonlocal most
        key = id(values)
        alive.add(key)
        weakref.finalize(values, alive.discard, key)
        most = max(most, len(alive))
        return values

    def stream(shift: float):
        generator = np.random.default_rng(0)
        for _ in range(batches):
            yield watched(generator.normal(shift, 1, (size, WIDTH)).astype(np.float32))

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(watched(np.tanh(x.numpy())))

    model = nn.Sequential(Watched(), Watched())
    data = ff.FiniteDifference(lambda: stream(-0.1), lambda: stream(0.1), DTHETA, paired=paired)
    flow = measure(model, data)
    assert flow["input"].samples == 2 * batches * size
    assert most <= allowed
    assert len(alive) <= allowed
