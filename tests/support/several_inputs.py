"""Networks of several inputs, of tokens, or with objects as outputs, and the same wrapped by hand.

Those take one joined float tensor that their forward splits. The arithmetic is the same, so J is
too, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from support.networks_zoo import untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fisherfast as ff

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
LABELS = torch.linspace(0, 1, N)


def labelled() -> tuple[Tensor, Tensor]:
    image, time = drawn()
    return image + LABELS[:, None, None, None], time - 2 * LABELS[:, None]


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
    "labelled": lambda p, f: ff.Labelled(*pairs(p(*labelled()), LABELS, f), bins=2),
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


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 4)
        self.fc = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embed(ids).mean(1))


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


def join_tangents(*dx: Tensor) -> Tensor:
    return torch.cat([part.flatten(2) for part in dx], 2)
