"""Inputs as the model takes them: several by position or name, tokens, objects as outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.several_inputs import (
    CONTAINERS,
    DX,
    KEEP,
    MINUS,
    ONE,
    PLUS,
    SCORE,
    SOURCES,
    STEP,
    TOKENS,
    WORDS,
    Answer,
    Answering,
    ByHand,
    Camera,
    MapAnswer,
    N,
    OwnAnswer,
    Reader,
    ReaderByHand,
    Words,
    as_floats,
    bernoulli_score,
    drawn,
    join,
    join_tangents,
    measured,
    named,
    of_dx,
    same,
    seeded,
    shifted,
    stream,
    tokens,
    words,
)

import fisherfast as ff
from fisherfast.model.hooks import map_tensors


@pytest.mark.parametrize(
    ("source", "container"),
    [(source, "tuple") for source in SOURCES]
    + [("pathwise", c) for c in CONTAINERS if c != "tuple"]
    + [("paired", c) for c in CONTAINERS if c != "tuple"]
    + [("labelled", "dict"), ("labelled", "tuple of a loader")]
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
    theta, chance = torch.rand(2, N, generator=torch.Generator().manual_seed(4))
    ones = (chance < theta).long()[:, None].repeat(1, 5)
    flow = measured(seeded(Words), ff.Labelled(ones, theta, bins=2))
    assert flow["input"].J.isnan().all()
    assert flow["embed"].value > 2
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


def two_parameters(pack: Callable[..., Any]) -> ff.FiniteDifference:
    plus = [pack(*PLUS), pack(*shifted(*drawn(2), 0.06))]
    return ff.FiniteDifference([pack(*MINUS)] * 2, plus, [STEP, 0.12])


def rounded(pack: Callable[..., Any]) -> ff.Pathwise:
    """Counts, to which noise is added, beside times, to which none is."""
    image, time = drawn()
    return ff.Pathwise(pack((3 * image).round(), time), of_dx(pack))


def half(pack: Callable[..., Any]) -> ff.Pathwise:
    x, dx = (tuple(part.bfloat16() for part in parts) for parts in (drawn(), DX))
    side = torch.cat([part.flatten(2) for part in dx], 2)
    return ff.Pathwise(pack(*x), side if pack is ONE else pack(*dx))


def grouped(pack: Callable[..., Any]) -> ff.FiniteDifference:
    return ff.FiniteDifference(pack(*MINUS), pack(*PLUS), STEP, groups=torch.arange(N) // 4)


OPTIONS: dict[str, tuple[Callable[[Any], ff.data.Data], dict[str, Any]]] = {
    "two parameters": (two_parameters, {}),
    "rounded": (rounded, {}),
    "half": (half, {}),
    "groups": (grouped, {}),
    "shard": (lambda p: ff.Shard(two_parameters(p)), {}),
    "budget": (lambda p: SOURCES["pathwise"](p, stream), {"memory_budget": "100 MB"}),
    "probe": (grouped, {"probe": "network", "layers": []}),
    "maps": (rounded, {"settings": ff.Settings(maps=["conv"])}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_takes_several_inputs(case):
    """Catches noise against rounding that is added to another entry, memory that is planned from
    one entry, and groups, shards or kept samples that lose one."""
    make, options = OPTIONS[case]
    flow = measured(seeded(Camera), make(named), **options)
    same(flow, measured(seeded(ByHand), make(ONE), **options))


def test_a_monitor_keeps_several_inputs():
    """Catches batches of a loader that are kept in memory without one of their entries."""
    monitors = [
        ff.FisherMonitor(seeded(build), SOURCES["score"](pack, CONTAINERS["dict of a loader"][1]))
        for build, pack in ((Camera, named), (ByHand, ONE))
    ]
    for _ in range(3):
        same(*(monitor.step().flow for monitor in monitors))


def test_the_data_alone():
    two = [ff.fisher_information(SOURCES["pathwise"](pack, lambda x: x)) for pack in (KEEP, ONE)]
    assert torch.equal(two[0].J, two[1].J)
