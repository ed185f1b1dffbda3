"""Inputs as the model takes them: several by position or name, tokens, outputs that are objects.

The oracle is the same network wrapped by hand: one joined float tensor that its forward splits. The
arithmetic is the same, so J must be the same to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from support.networks_zoo import untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fisherfast as ff
from fisherfast.model.hooks import map_tensors

N, PIXELS, STEP = 400, (1, 3, 3), 0.1
WORDS = 7


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


class Camera(nn.Module):
    """A picture and its exposure times; its first layer writes into its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(10, 3)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        features = self.act(self.conv(image.mul_(1.5))).flatten(1)
        return self.fc(torch.cat([features, time.add_(1)], 1))


class ByHand(Camera):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :9].reshape(-1, *PIXELS).clone(), x[:, 9:].clone())


class Reader(nn.Module):
    """Tokens, a mask of integers, and one floating input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 4)
        self.fc = nn.Linear(5, 2)

    def forward(self, ids: Tensor, mask: Tensor, dose: Tensor, scale: float = 1.0) -> Tensor:
        words = (self.embed(ids) * mask[..., None]).sum(1) * scale
        return self.fc(torch.cat([words, dose[:, None]], 1))


class ReaderByHand(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 1:6].long(), x[:, 6:].long(), x[:, 0], 2.0)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(N, *PIXELS, generator=generator)
    return image, torch.randn(N, 2, generator=generator)


def shifted(image: Tensor, time: Tensor, step: float) -> tuple[Tensor, Tensor]:
    return image + step, time - 2 * step


def join(*entries: Tensor) -> Tensor:
    return torch.cat([entry.flatten(1) for entry in entries], 1)


class Items(Dataset):
    """Items of any structure, by index."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return item(self.samples, i)


def item(samples: Any, rows: Any) -> Any:
    if isinstance(samples, dict):
        return {key: item(value, rows) for key, value in samples.items()}
    if isinstance(samples, tuple):
        return tuple(item(value, rows) for value in samples)
    return samples[rows]


def named(image: Tensor, time: Tensor) -> dict[str, Tensor]:
    return {"image": image, "time": time}


def stream(samples: Any) -> Callable[[], Any]:
    return lambda: (item(samples, slice(i, i + 64)) for i in range(0, N, 64))


KEEP: Callable[..., Any] = lambda *entries: entries  # noqa: E731
ONE: Callable[..., Any] = lambda *entries: join(*entries)  # noqa: E731
CONTAINERS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "tuple": (KEEP, lambda x: x),
    "dict": (named, lambda x: x),
    "tuple of a Dataset": (KEEP, Items),
    "dict of a loader": (named, lambda x: DataLoader(Items(x), batch_size=64)),
    "tuple of a loader": (KEEP, lambda x: DataLoader(Items(x), batch_size=64)),
    "dict of a stream": (named, stream),
}
MINUS, PLUS = shifted(*drawn(), -STEP / 2), shifted(*drawn(1), STEP / 2)
DX = torch.ones(N, 1, *PIXELS), torch.full((N, 1, 2), -2.0)
SCORE = drawn()[0].flatten(1).sum(1) - 2 * drawn()[1].sum(1)


def pairs(x: Any, other: Any, form: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Two arguments, or one source of pairs."""
    given = form(x)
    return (x, other) if given is x else (form((x, other)),)


def simulator(pack: Callable[..., Any], derivative: str) -> ff.Simulator:
    def fn(theta: Tensor, n: int, generator: torch.Generator) -> Any:
        image = torch.randn(n, *PIXELS, generator=generator) + theta
        return pack(image, torch.randn(n, 2, generator=generator) - 2 * theta)

    step = None if derivative == "pathwise" else STEP
    return ff.Simulator(fn, 0.0, samples=N, derivative=derivative, dtheta=step)


SOURCES: dict[str, Callable[[Any, Any], ff.data.Data]] = {
    "independent": lambda p, f: ff.FiniteDifference(f(p(*MINUS)), f(p(*PLUS)), STEP),
    "paired": lambda p, f: ff.FiniteDifference(
        f(p(*MINUS)), f(p(*shifted(*drawn(), STEP / 2))), STEP, paired=True
    ),
    "pathwise": lambda p, f: ff.Pathwise(*pairs(p(*drawn()), of_dx(p), f)),
    "score": lambda p, f: ff.Score(*pairs(p(*drawn()), SCORE, f)),
    "simulated": lambda p, f: simulator(p, "pathwise"),
    "simulated pairs": lambda p, f: simulator(p, "paired"),
}


def of_dx(pack: Callable[..., Any]) -> Any:
    if pack is ONE:
        return torch.cat([part.flatten(2) for part in DX], 2)
    return pack(*DX)


def same(flow: ff.FisherFlow, expected: ff.FisherFlow) -> None:
    assert flow.names == expected.names
    for layer, other in zip(flow, expected, strict=True):
        for name in ("J", "stderr", "lower", "linear", "curve_J"):
            assert torch.equal(getattr(layer, name), getattr(other, name)), (layer.name, name)
        assert layer.shape == other.shape
        assert layer.descendants == other.descendants


def measured(model: nn.Module, data: ff.data.Data, **options: Any) -> ff.FisherFlow:
    options = {"max_features": 16, "settings": ff.Settings(batch_size=64)} | options
    with untouched(model):
        return ff.fisher_flow(model, data, **options)


@pytest.mark.parametrize(
    ("source", "container"),
    [(source, "tuple") for source in SOURCES]
    + [("pathwise", c) for c in CONTAINERS if c != "tuple"]
    + [("paired", c) for c in CONTAINERS if c != "tuple"]
    + [("score", "dict of a loader"), ("independent", "dict"), ("simulated pairs", "dict")],
)
def test_several_inputs_equal_the_network_wrapped_by_hand(source, container):
    """Catches entries in another order than their tangents, a second input that is dropped, cut at
    other rows or not sorted with the first, in-place layers that change the user's samples, and an
    "input" that is one of the entries."""
    pack, make = CONTAINERS[container]
    expected = measured(seeded(ByHand), SOURCES[source](ONE, make))
    before = [t.clone() for t in (*MINUS, *PLUS, *DX)]
    flow = measured(seeded(Camera), SOURCES[source](pack, make))
    same(flow, expected)
    assert flow["input"].shape == (11,)
    assert flow["fc"].value > 1
    assert all(map(torch.equal, before, (*MINUS, *PLUS, *DX)))


def words(seed: int, step: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Doses, tokens whose first word is more often 1 for a larger theta, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (N, 5), generator=generator)
    ids[:, 0] = (torch.rand(N, generator=generator) < 0.5 + step).long()
    mask = torch.rand(N, 5, generator=generator) < 0.8
    mask[:, 0] = True
    return torch.randn(N, generator=generator) + step, ids, mask


def tokens(dose: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return {"scale": 2.0, "ids": ids, "mask": mask, "dose": dose}


def as_floats(dose: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([dose[:, None], ids.float(), mask.float()], 1)


def bernoulli_score(dose: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return dose + 2.0 * (2 * ids[:, 0] - 1)


def first_only(dose: Tensor, *_: Tensor) -> Tensor:
    return torch.eye(11)[0].expand(N, 1, 11)


TOKENS: dict[str, Callable[[Any], ff.data.Data]] = {
    "independent": lambda p: ff.FiniteDifference(p(*words(0, -0.1)), p(*words(1, 0.1)), 0.2),
    "score": lambda p: ff.Score(p(*words(0)), bernoulli_score(*words(0))),
    "pathwise": lambda p: ff.Pathwise(
        p(*words(0)), first_only(*words(0)) if p is as_floats else {"dose": torch.ones(N)}
    ),
}


@pytest.mark.parametrize("source", TOKENS)
def test_tokens_equal_the_network_wrapped_by_hand(source):
    """Catches tokens or masks that are converted to floats, constants that are lost, tangents of
    integers, and an "input" that holds the numbers of words."""
    flow = measured(seeded(Reader), TOKENS[source](tokens))
    expected = measured(seeded(ReaderByHand), TOKENS[source](as_floats))
    for name in ("embed", "output"):
        for field in ("J", "stderr", "linear", "curve_J"):
            assert torch.equal(getattr(flow[name], field), getattr(expected[name], field))
    assert flow["input"].shape == ()
    assert (flow["input"].value == expected["input"].value) == (source == "score")
    left_out = "integers are left out: 'ids', 'mask'" in flow["input"].notes
    assert left_out == (source != "score")
    assert float(flow["input"].linear) < 2 < flow["output"].value or source != "independent"


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 4)
        self.fc = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embed(ids).mean(1))


def test_tokens_alone():
    """Catches an "input" of J = 0 that divides, and rules that wait for ever; V is known without a
    density."""
    ids = [words(seed, step)[1] for seed, step in ((0, -0.1), (1, 0.1))]
    data = ff.FiniteDifference(*ids, 0.2)
    flow = measured(seeded(Words), data)
    assert flow.names == ["input", "embed", "output"]
    assert flow["input"].J.isnan().all()
    assert flow["embed"].value > 2
    assert "x holds integers alone" in flow["input"].notes[0]
    assert str(flow).splitlines()[2].split()[:6] == ["input", "1", "1", "-", "-", "-"]
    with pytest.raises(TypeError, match=r"^x must have a floating dtype, got torch\.int64; conv"):
        ff.fisher_information(data)
    score = bernoulli_score(*words(0)) - words(0)[0]
    scored = ff.Score(words(0)[1], score)
    flow = measured(seeded(Words), scored)
    V = score.double().var(correction=0)
    assert flow["input"].value == pytest.approx(float(V), rel=0.05)
    assert flow["input"].notes == ()
    assert ff.fisher_information(scored).value == flow["input"].value
    assert 0 < flow.fractions()["output"] < 1.2


@pytest.mark.parametrize("rule", ["transmission", "crlb"])
def test_rules_refuse_an_input_without_J(rule):
    ids = [words(seed, step)[1] for seed, step in ((0, -0.1), (1, 0.1))]
    monitor = ff.FisherMonitor(seeded(Words), ff.FiniteDifference(*ids, 0.2), max_features=8)
    monitor.step(train_mse=0.1)
    with pytest.raises(ValueError, match=f"rule '{rule}'.* x holds integers alone"):
        ff.FisherEarlyStopping(rule).step(monitor)


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None
    classes: Tensor | None = None


@dataclass
class MapAnswer(OrderedDict):
    """As the models of transformers return it: a mapping whose fields are attributes too, and
    whose constructor takes fields and no mapping."""

    logits: Tensor
    loss: Tensor | None = None
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __setitem__(self, key: str, value: Tensor) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


class OwnAnswer:
    def __init__(self, logits: Tensor, loss: Tensor, classes: Tensor) -> None:
        self.logits, self.loss, self.classes, self.parent = logits, loss, classes, self


class Answering(Camera):
    """Returns an object, of an inner network that returns one as well."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, image: Tensor, time: Tensor) -> Any:
        y = super().forward(image, time)
        return self.kind(logits=y, loss=y.mean(), classes=y.argmax(1))


@pytest.mark.parametrize("kind", [Answer, MapAnswer, OwnAnswer])
def test_objects_with_logits(kind):
    """Catches an output that is not found, a loss or classes that become heads, an object that is
    rebuilt by its constructor, and tangents that stay in the primal's object."""
    model = seeded(lambda: Answering(kind))
    flow = measured(model, SOURCES["pathwise"](KEEP, lambda x: x))
    expected = measured(seeded(Camera), SOURCES["pathwise"](KEEP, lambda x: x))
    assert flow.names == expected.names
    assert "output[logits]" in flow["output"].aliases
    assert torch.equal(flow["output"].J, expected["output"].J)
    image, time = (entry.clone() for entry in drawn())
    dx = tuple(part.movedim(1, 0) for part in DX)
    y, dy = ff.jvp(model, (image, time), dx)
    assert type(y) is type(dy) is kind
    whole, tangents = ff.jvp(seeded(ByHand), join(*drawn()), join_tangents(*dx))
    assert torch.equal(y.logits, whole)
    assert torch.equal(dy.logits, tangents)
    assert torch.equal(y.classes, whole.argmax(1))
    assert map_tensors(y, lambda place, tensor: tensor) is y


def join_tangents(*dx: Tensor) -> Tensor:
    return torch.cat([part.flatten(2) for part in dx], 2)


def test_jvp_and_propagate_of_several_inputs():
    """Catches tangents of the wrong entry, a None that is refused or takes those of another entry,
    and integers that are made dual."""
    reader, by_hand = seeded(Reader).double(), seeded(ReaderByHand).double()
    dose, ids, mask = words(0)
    dx = torch.stack([torch.ones(N), torch.randn(N)]).double()
    x, whole = tokens(dose.double(), ids, mask), as_floats(dose, ids, mask).double()
    side = torch.cat([dx[..., None], torch.zeros(2, N, 10, dtype=dx.dtype)], 2)
    for given in ({"dose": dx}, {"dose": dx, "ids": None, "scale": None}):
        y, dy = ff.jvp(reader, x, given)
        assert torch.equal(y, ff.jvp(by_hand, whole, side)[0])
        assert torch.equal(dy, ff.jvp(by_hand, whole, side)[1])
    seen, expected = ff.propagate(reader, x, {"dose": dx}), ff.propagate(by_hand, whole, side)
    for name in ("embed", "output"):
        assert all(map(torch.equal, seen[name], expected[name]))
    assert torch.equal(seen["input"][1], dx)
    still = ff.propagate(seeded(Camera), drawn(), (None, DX[1].movedim(1, 0)))["input"]
    assert torch.equal(still[0], join(*drawn()))
    assert not still[1][..., :9].any()
    assert (still[1][..., 9:] == -2).all()
    report = ff.dual.coverage(reader, x)
    assert report.share == 1


BAD = {
    "x list": (lambda: ff.jvp(Camera(), [*drawn()], None), TypeError, "x must be a torch.Tensor,"),
    "a tensor": (lambda: ff.jvp(Camera(), drawn(), DX[0]), TypeError, "dx must be a tuple as x"),
    "too few": (lambda: ff.jvp(Camera(), drawn(), DX[:1]), ValueError, "dx must have the entries"),
    "none": (lambda: ff.jvp(Camera(), drawn(), (None, None)), ValueError, "dx must hold tangents"),
    "counts": (
        lambda: ff.jvp(Camera(), drawn(), (DX[0].movedim(1, 0), torch.zeros(2, N, 2))),
        ValueError,
        "dx must hold P tangents of each entry",
    ),
    "shape": (lambda: ff.jvp(Camera(), drawn(), DX), ValueError, r"dx\[0\] must have shape"),
    "integers": (
        lambda: ff.jvp(Reader(), tokens(*words(0)), {"ids": words(0)[1][None]}),
        TypeError,
        r"dx\['ids'\] must be None",
    ),
    "keys": (
        lambda: measured(Camera(), ff.FiniteDifference(*streams(named, KEEP), STEP)),
        ValueError,
        r"plus must have the same entries .* got \(\[1, 3, 3\], \[2\]\) in batch 0 after",
    ),
    "a changed entry": (
        lambda: measured(Camera(), ff.FiniteDifference(*streams(KEEP, wider), STEP)),
        ValueError,
        r"plus must have .* got \(\[1, 3, 3\], \[4\]\) in batch 0 after \(\[1, 3, 3\], \[2\]\)",
    ),
}


def wider(image: Tensor, time: Tensor) -> Any:
    return image, torch.cat([time, time], 1)


def streams(*packs: Callable[..., Any]) -> list[Any]:
    return [stream(pack(*drawn())) for pack in packs]


@pytest.mark.parametrize("case", BAD)
def test_wrong_inputs_are_refused(case):
    """Catches torch's own words about arguments, and derivatives that are put to other entries."""
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=f"^{message}"):
        call()


def test_errors_of_the_model_name_the_batch():
    """Catches an index error without the batch that holds the word, and an error of another class.
    Notes are a part of what pytest matches."""
    ids = words(0)[1]
    late = ids.clone()
    late[-1, 0] = WORDS
    for data in (ff.FiniteDifference(stream(ids), stream(late), 0.1), ff.Score(late, SCORE)):
        text = r"^index out of range in self\nin (batch 6|one of the batches 0 to 6) of condition"
        with pytest.raises(IndexError, match=text):
            measured(seeded(Words), data)


def labels(n: int = N) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(2))


def answers() -> nn.Module:
    return Answering(MapAnswer)


PARAMETER_DATA: dict[str, Callable[[Any, Any], Any]] = {
    "pair": lambda x, y: (x, y),
    "loader": lambda x, y: DataLoader(Items((x, y)), batch_size=64),
    "stream": lambda x, y: stream((x, y))(),
}


@pytest.mark.parametrize("kind", PARAMETER_DATA)
@pytest.mark.parametrize("pack", [KEEP, named])
def test_parameters_of_several_inputs(kind, pack):
    """Catches inputs that are taken for labels, or that are cut at other rows; rows of single
    samples by torch.func; logits in an object."""
    x = pack(*drawn())
    model, by_hand = (seeded(build).double() for build in (answers, ByHand))
    model.scale = by_hand.scale = nn.Parameter(torch.ones(()).double())  # no rule: rows
    for net in (model, by_hand):
        net.conv.register_forward_hook(lambda m, args, out, net=net: out * net.scale)
    with untouched(model):
        fisher = ff.parameters.fisher(
            model, "gaussian", PARAMETER_DATA[kind](x, labels()), fisher_type="empirical"
        )
    expected = ff.parameters.fisher(
        by_hand, "gaussian", (join(*drawn()), labels()), fisher_type="empirical"
    )
    torch.testing.assert_close(fisher.diag(), expected.diag(), rtol=1e-12, atol=0)  # sums
    if kind == "pair":
        scores = ff.parameters.score(model, "gaussian", x, labels()).matrix()
        other = ff.parameters.score(by_hand, "gaussian", join(*drawn()), labels()).matrix()
        assert torch.equal(scores, other)


def test_parameters_of_tokens():
    exact = ff.parameters.fisher(seeded(Reader), "gaussian", tokens(*words(0)))
    expected = ff.parameters.fisher(seeded(ReaderByHand), "gaussian", as_floats(*words(0)))
    assert torch.equal(exact.diag(), expected.diag())


@pytest.mark.parametrize("pack", [KEEP, named])
def test_live_estimates_of_several_inputs(pack):
    """Catches a live "input" that is the image alone, or missing for named inputs, and an output in
    an object that is not read."""
    models = [seeded(lambda: Answering(MapAnswer)), seeded(ByHand)]
    data = SOURCES["independent"](pack, lambda x: x), SOURCES["independent"](ONE, lambda x: x)
    monitors = [
        ff.FisherMonitor(m, d, observe_every=1, max_features=8)
        for m, d in zip(models, data, strict=True)
    ]
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        theta = torch.randn(64, generator=generator)
        image = torch.randn(64, *PIXELS, generator=generator) + theta[:, None, None, None]
        entries = image, torch.randn(64, 2, generator=generator)
        for model, monitor, own in zip(models, monitors, (pack, ONE), strict=True):
            x = own(*(entry.clone() for entry in entries))
            model.train()
            model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
            monitor.observe(theta)
    seen, expected = (monitor.live() for monitor in monitors)
    assert set(seen) == set(expected) >= {"input", "output"}
    for name in ("input", "output"):
        assert torch.equal(seen[name].J, expected[name].J)
