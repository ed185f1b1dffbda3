"""Samples that carry a derivative, and simulators: what is read, what is refused, what repeats."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff
from fisherfast.data import Batch, Data

N, P, SHAPE = 20, 3, (4, 2)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def read(data: Data, batch_size: int = 7) -> Batch:
    """All samples of the only condition in one batch."""
    batches = list(data.read(0, batch_size))
    tangents = [b.tangents for b in batches if b.tangents is not None]
    score = [b.score for b in batches if b.score is not None]
    return Batch(
        torch.cat([b.x for b in batches]),
        torch.cat(tangents, 1) if tangents else None,
        torch.cat(score) if score else None,
    )


# reading ----------------------------------------------------------------------------------------


FORMS = {
    "tensors": ff.Pathwise,
    "arrays": lambda x, dx: ff.Pathwise(x.numpy(), dx.numpy()),
    "dataset": lambda x, dx: ff.Pathwise(TensorDataset(x, dx), parameters=P),
    "loader": lambda x, dx: ff.Pathwise(
        DataLoader(TensorDataset(x, dx), batch_size=6), parameters=P
    ),
    "list": lambda x, dx: ff.Pathwise(
        list(zip(x.split(P), dx.split(P), strict=True)), parameters=P
    ),
    "function": lambda x, dx: ff.Pathwise(
        lambda: zip(x.split(P), dx.split(P), strict=True), parameters=P
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_tangents_of_any_form(form):
    """Catches a tangent cut along the parameters, [P, n] read as [n, P] (both are 3 x 3 in batches
    of the list), and a cast on the way."""
    x, dx = (numbers(N, *shape, dtype=torch.float64) for shape in (SHAPE, (P, *SHAPE)))
    data = FORMS[form](x, dx)
    assert (data.parameters, data.conditions, data.source, data.dtheta) == (P, 1, "pathwise", ())
    got = read(data)
    assert torch.equal(got.x, x)
    assert torch.equal(got.tangents, dx.movedim(1, 0))
    if form == "tensors":
        assert [len(batch) for batch in data.read(0, 7)] == [7, 7, 6]


@pytest.mark.parametrize("shape", [(), SHAPE])
def test_one_parameter_may_be_left_out(shape):
    """Catches dx [n, ...] read as n parameters, from tensors or from a source of pairs."""
    x, dx = numbers(N, *shape), numbers(N, *shape) + 1
    for data in (ff.Pathwise(x, dx), ff.Pathwise(x, dx[:, None]), ff.Pathwise([(x, dx)])):
        assert data.parameters == 1
        assert torch.equal(read(data).tangents, dx[None])


@pytest.mark.parametrize("cls", [ff.Pathwise, ff.Score])
def test_a_list_of_batches_has_no_known_length(cls):
    """Catches the number of batches that passes for that of samples: too few, and refused."""
    x = numbers(2000, 4)
    companion = torch.ones(2000, 1, 4) if cls is ff.Pathwise else x.sum(1)
    whole = cls(TensorDataset(x, companion))
    batches = cls(list(zip(x.split(400), companion.split(400), strict=True)))
    assert (whole.samples(0), batches.samples(0)) == (2000, None)
    one, other = (
        ff.fisher_information(data, settings=ff.Settings(batch_size=400))
        for data in (whole, batches)
    )
    assert other.samples == 2000
    torch.testing.assert_close(one.linear, other.linear, rtol=1e-6, atol=0)


@pytest.mark.parametrize("parameters", [1, P])
def test_score_is_float64_with_one_column_per_parameter(parameters):
    """Catches a score [n] that broadcasts to [n, n], and one that is rounded to float32."""
    x = numbers(N, 4)
    score = numbers(N, parameters, dtype=torch.float64)
    given = score[:, 0] if parameters == 1 else score
    data = ff.Score(x, given)
    assert (data.parameters, data.conditions, data.source) == (parameters, 1, "score")
    for same in (data, ff.Score(x.numpy(), given.numpy())):
        assert torch.equal(read(same).score, score)
    loader = DataLoader(TensorDataset(x, given), batch_size=6)
    assert torch.equal(read(ff.Score(loader, parameters=parameters)).score, score)


@pytest.mark.parametrize("cls", [ff.Pathwise, ff.Score])
def test_what_repeats(cls):
    """Catches `grow` on samples that come in another order at the second pass, and streams that are
    taken for samples in memory."""
    x = numbers(N, 4)
    companion = numbers(N, 1, 4) if cls is ff.Pathwise else numbers(N)
    items = TensorDataset(x, companion)
    assert cls(x, companion).repeats(0)
    assert cls(x, companion).resident()
    assert not ff.Simulator(lambda t, n, g: t + torch.zeros(n, 1), [0.0], samples=8).resident()
    assert cls(items).repeats(0)
    assert not cls(DataLoader(items, batch_size=4, shuffle=True)).repeats(0)
    assert not cls(lambda: iter([])).repeats(0)


# refusals ---------------------------------------------------------------------------------------

X = numbers(N, *SHAPE)
NAN = torch.full((N, *SHAPE), float("nan"))

SINGLE = "dx must have the dtype of x, torch.float32, got torch.float64 in batch 0"
COLUMNS = "score must have shape [n, P] = [20, 1], got [20, 2] in batch 1 (parameters=1)"
REFUSED = [
    (lambda: ff.Pathwise(X, X[:, None][:, :0]), "dx must have shape [n, P, ...], or [n, ...] for"),
    (lambda: ff.Pathwise(X, X.expand(3, *X.shape)), "[3, 20, 4, 2]: batch first, dx.movedim(0, 1)"),
    (lambda: read(ff.Pathwise([(X, torch.stack([X, X], 1))])), "[20, 2, 4, 2] in batch 0"),
    (lambda: read(ff.Pathwise([(X, X[:, None].double())])), SINGLE),
    (lambda: ff.Score(X.to(torch.complex64), X[:, 0, 0]), "x must have a floating dtype"),
    (lambda: read(ff.Pathwise([(X, X[:, None]), (X, NAN)])), "dx must be finite, got NaN"),
    (lambda: ff.Pathwise(X), "dx must be a tensor or array [n, P, ...] as x is, got NoneType"),
    (lambda: ff.Pathwise([X], X), "dx must be left out when x yields batches (x, dx), got Tensor"),
    (lambda: ff.Pathwise(X, X, parameters=1), "parameters must be left out for tensors, got 1"),
    (lambda: ff.Score([X], parameters=0), "parameters must be at least 1, got 0"),
    (lambda: ff.Score(X, X), "score must have shape [n, P] or [n] with n = 20, got [20, 4, 2]"),
    (lambda: ff.Score(X, NAN[:, 0, 0]), "score must be finite, got NaN or infinity"),
    (lambda: read(ff.Score([(X, X[:, 0, 0]), (X, X[:, 0])])), COLUMNS),
    (lambda: read(ff.Score([X])), "x must yield pairs (x, score) where score is not given"),
    (lambda: read(ff.Score([(X, X[:, 0, 0], X)])), "got 3 entries in batch 0: leave labels out"),
    (lambda: ff.Pathwise((X, X), X), "dx must be a tuple as x is, got Tensor"),
    (lambda: ff.Pathwise({"a": X}, {"b": X}), "dx must have the entries of x, ['a'], got ['b']"),
    (lambda: ff.Pathwise((X, X), (X,)), "dx must have the entries of x, [0, 1], got [0]"),
    (lambda: ff.Pathwise((X, X), (None, None)), "dx must hold tangents of at least one"),
    (lambda: ff.Pathwise((X, X.long()), (X, X)), "dx[1] must be None, got Tensor: only floating"),
    (lambda: ff.Pathwise(X.long(), X), "integers have no derivative; use Score or FiniteDiff"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_wrong_companions_are_refused(make, message):
    """Catches samples that are paired with what is not theirs, silently."""
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


# simulators -------------------------------------------------------------------------------------


def draw(theta: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """Two parameters: mean and log of the spread."""
    noise = torch.randn(n, 3, generator=generator)
    return theta[0] + noise * torch.exp(theta[1])


THETA = [0.5, -0.2]
STEPS = {"pathwise": None, "paired": 0.1, "independent": 0.1}


def simulated(fn, theta, derivative: str, **options) -> ff.Simulator:
    return ff.Simulator(fn, theta, derivative=derivative, dtheta=STEPS[derivative], **options)


def test_tangents_of_a_simulator_are_exact():
    """Catches a direction in the place of another, and noise that differs between directions."""
    got = read(ff.Simulator(draw, THETA, samples=50))
    assert got.x.shape == (50, 3)
    torch.testing.assert_close(got.tangents[0], torch.ones(50, 3))
    torch.testing.assert_close(got.tangents[1], got.x - 0.5)


@pytest.mark.parametrize("derivative", ["pathwise", "paired", "independent"])
def test_every_pass_repeats(derivative):
    """Catches a generator that goes on where the first pass ended."""
    data, other = (simulated(draw, THETA, derivative, samples=50, seed=seed) for seed in (3, -4))
    assert data.source == derivative
    for c in range(data.conditions):
        one, two = (torch.cat([b.x for b in data.read(c, 16)]) for _ in range(2))
        assert torch.equal(one, two)
        assert len(one) == data.samples(c) == 50
        assert len(one.unique(dim=0)) == 50  # no batch repeats another
        assert not torch.equal(one, torch.cat([b.x for b in other.read(c, 16)]))


def test_pairs_share_their_noise_and_independent_conditions_do_not():
    """Catches dtheta taken as half a step, and the noise of one pair in another."""
    paired = ff.Simulator(draw, THETA, samples=9, derivative="paired", dtheta=[0.1, 0.2])
    batches = [next(paired.read(c, 16)).x for c in range(4)]
    torch.testing.assert_close(batches[1] - batches[0], torch.full((9, 3), 0.1))
    torch.testing.assert_close((batches[3] - 0.5) / (batches[2] - 0.5), torch.full((9, 3), 1.2214))
    assert not torch.allclose(batches[0], batches[2], atol=0.2)
    own = ff.Simulator(draw, THETA, samples=9, derivative="independent", dtheta=0.1)
    batches = [next(own.read(c, 16)).x for c in range(4)]
    assert not torch.allclose(batches[1], batches[0], atol=0.2)
    assert own.dtheta == (0.1, 0.1)


@pytest.mark.parametrize("theta", [0.5, [0.5], np.array([0.5]), torch.tensor(0.5)])
def test_theta_arrives_as_a_vector(theta):
    """Catches a number in the place of [P], and float64 that turns all samples into float64."""
    seen = []

    def fn(theta, n, generator):
        seen.append((tuple(theta.shape), theta.dtype))
        return theta + torch.randn(n, 2, generator=generator)

    assert read(ff.Simulator(fn, theta, samples=4)).x.dtype == torch.float32
    wide = ff.Simulator(fn, torch.tensor([0.5], dtype=torch.float64), samples=4)
    assert read(wide).x.dtype == torch.float64
    assert set(seen) == {((1,), torch.float32), ((1,), torch.float64)}


def counts(theta, n, generator):
    return torch.poisson(theta.exp().expand(n, 4), generator=generator)


def attention(theta, n, generator):
    noise = torch.randn(1, 1, n, 4, generator=generator)
    return torch.nn.functional.scaled_dot_product_attention(noise, theta * noise, noise)[0, 0]


CHANGING = r"fn must be differentiable in theta\[0\], got samples that change with it but .*"
FORWARD = "fn must be differentiable in forward mode, got: .* implemented yet"
INTEGERS = r"fn must return a floating tensor, got torch.int64: convert with .float\(\); counts .*"


@pytest.mark.parametrize(
    ("fn", "error", "start"),
    [
        (counts, ValueError, CHANGING),
        (attention, ValueError, FORWARD),
        (lambda *arguments: counts(*arguments).long(), TypeError, INTEGERS),
    ],
    ids=["counts", "attention", "integers"],
)
def test_simulators_without_derivative_name_the_way_out(fn, error, start):
    """Catches J = 0 for photon counts, a cast that hides them, and torch's request for an issue."""
    way_out = re.escape('use derivative="paired" with a dtheta')
    with pytest.raises(error, match=f"^{start}[:;] {way_out}$"):
        ff.fisher_information(ff.Simulator(fn, 2.0, samples=100))
    if error is ValueError:
        paired = ff.Simulator(fn, 2.0, samples=100, derivative="paired", dtheta=0.01)
        assert torch.isfinite(ff.fisher_information(paired, max_features=8).J).all()


def global_torch(theta, n, generator):
    return theta + torch.randn(n, 2)


def global_numpy(theta, n, generator):
    return theta + torch.from_numpy(np.random.randn(n, 2))


def frozen(theta, n, generator):
    return theta + torch.randn(n, 2, generator=torch.Generator().manual_seed(3))


OTHERS = "the same samples from the same generator state, got others"
SAME = "other samples from another generator state, got the same"


@pytest.mark.parametrize(
    ("fn", "derivative", "wrong"),
    [
        (global_torch, "pathwise", f"give {OTHERS}"),
        (global_numpy, "paired", f"give {OTHERS}"),
        (frozen, "pathwise", f"draw {SAME}"),
        (frozen, "independent", f"draw {SAME}"),
    ],
)
def test_noise_that_is_not_of_the_generator_is_found(fn, derivative, wrong):
    """Catches pairs whose noise differs, in which J would drown, and batches that repeat the same
    noise, as if each sample were new (J twice too large). The user's random state stays."""
    data = simulated(fn, 0.0, derivative, samples=1000)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    message = f"fn must {wrong}: draw every random number from the generator that it is given"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ff.fisher_information(data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("derivative", ["pathwise", "paired"])
def test_a_simulator_that_ignores_theta_has_no_information(derivative):
    """Catches an error, or a J from rounding, where the truth is 0."""
    data = simulated(lambda t, n, g: torch.randn(n, 2, generator=g), 0.0, derivative, samples=1000)
    message = "fn must depend on theta, got the same samples for another theta[0]: J = 0"
    with pytest.warns(ff.FisherWarning, match=f"^{re.escape(message)}$"):
        info = ff.fisher_information(data, max_features=16)
    assert info.value == 0


def test_forward_mode_works_in_inference_mode_and_is_silent():
    """Catches samples without derivative where the caller has switched gradients off, and the
    warning of torch's own compiler at the first use of forward mode."""
    data = ff.Simulator(lambda t, n, g: torch.sigmoid(draw(t, n, g)), THETA, samples=200)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = ff.fisher_information(data, max_features=8)
    assert torch.equal(inside.J, ff.fisher_information(data, max_features=8).J)


RESOLVED = "dtheta must be resolved by theta of torch.float32, got 0.01 at 1e+06"
BAD = [
    (lambda: ff.Simulator(1, 0.0), "fn must be a function, got int"),
    (lambda: ff.Simulator(draw, THETA, derivative="exact"), "derivative must be one of ('path"),
    (lambda: ff.Simulator(draw, THETA, derivative="paired"), "dtheta must be given"),
    (lambda: ff.Simulator(draw, THETA, dtheta=0.1), "dtheta must be left out"),
    (lambda: ff.Simulator(draw, [1e6, 0.0], derivative="paired", dtheta=0.01), RESOLVED),
    (lambda: ff.Simulator(draw, THETA, samples=0), "samples must be at least 1, got 0"),
    (lambda: ff.Simulator(draw, [[[0.0]]]), "theta must have shape [P] or [Q, P], got [1, 1, 1]"),
    (lambda: ff.Simulator(draw, float("nan")), "theta must be finite, got nan"),
    (lambda: ff.Simulator(draw, 1j), "theta must be real numbers, got torch.complex64"),
    (lambda: read(ff.Simulator(lambda t, n, g: X[1:7, 0], 0.0)), "return n = 7 samples"),
    (lambda: read(ff.Simulator(lambda t, n, g: np.ones((n, 1)), 0.0)), "return a tensor [n, ...]"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_simulators_are_refused(make, message):
    """Catches an argument that is ignored."""
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


def test_representations_tell_the_source():
    """Catches a repr that shows all samples."""
    assert repr(ff.Score(X, X[:, 0])) == "Score(parameters=2, samples=20)"
    simulator = ff.Simulator(draw, [1.0, 0.0], samples=9, derivative="paired", dtheta=0.5)
    expected = "Simulator(paired, dtheta=[0.5, 0.5], theta=[1.0, 0.0], samples=9)"
    assert repr(simulator) == expected


def test_rare_counts_are_no_frozen_noise():
    """Catches a batch of zeros that is taken for noise which ignores the generator."""
    data = ff.Simulator(
        lambda t, n, g: torch.poisson(t.expand(n, 2), generator=g),
        torch.tensor([1e-9]),
        samples=100,
        derivative="paired",
        dtheta=1e-10,
    )
    with pytest.warns(ff.FisherWarning, match="the same samples for another theta"):
        next(data.read(0, 100))


@pytest.mark.parametrize("derivative", ["pathwise", "paired", "independent"])
def test_simulators_may_reuse_their_memory(derivative):
    """Catches batches that the next call overwrites: J came out as 0."""
    memory = torch.empty(100, 2)

    def fresh(theta, n, generator):
        return theta + torch.randn(n, 2, generator=generator)

    def reusing(theta, n, generator):
        with torch.no_grad():
            return memory[:n].detach().copy_(fresh(theta, n, generator))

    one, two = (
        ff.fisher_information(
            ff.Simulator(
                fn, 0.0, samples=1000, derivative=derivative, dtheta=STEPS[derivative] and 0.3
            ),
            max_features=16,
            settings=ff.Settings(batch_size=100),
        )
        for fn in (fresh, reusing)
    )
    assert one.value == two.value > 0.5


@pytest.mark.parametrize("derivative", ["pathwise", "paired"])
def test_simulators_may_write_into_theta(derivative):
    """Catches a theta that the simulator changes for all later batches."""

    def converted(theta, n, generator):
        theta *= 2
        return theta + torch.randn(n, 2, generator=generator)

    data = simulated(converted, 1.0, derivative, samples=2000)
    info = ff.fisher_information(data, max_features=2)
    assert abs(info.value - 8) < 4 * float(info.stderr) < 2
    assert "theta=[1.0]" in repr(data)


@pytest.mark.parametrize("cls", [ff.Pathwise, ff.Score])
def test_streams_may_reuse_their_memory(cls):
    """Catches samples kept for the scale of the activations, overwritten by the batches behind."""
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    carried = torch.ones(1000, 1, 3) if cls is ff.Pathwise else x.sum(1, keepdim=True)

    def fresh():
        return zip(x.split(100), carried.split(100), strict=True)

    def reusing():
        memory = x[:100].clone(), carried[:100].clone()
        for batch in fresh():
            yield tuple(kept.copy_(part) for kept, part in zip(memory, batch, strict=True))

    one, two = (ff.fisher_information(cls(stream), max_features=16) for stream in (fresh, reusing))
    assert one.value == two.value


def test_large_derivatives_are_finite():
    """Catches a check by a sum that takes its overflow for an infinite derivative."""
    x = torch.zeros(4, 3)
    batch = next(ff.Pathwise(x, torch.full((4, 3), 3e38)).read(0, 4))
    assert batch.tangents is not None
    with pytest.raises(ValueError, match="dx must be finite"):
        ff.Pathwise(x, torch.full((4, 3), 3e38).index_fill(1, torch.tensor([1]), float("inf")))
