"""Differentiable information and its loss: closed forms, gradients, wrong formulas."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

import fisherfast as ff
from fisherfast import ops

SIGMAS = 4.0
"""Of every statistical bound here; one test of 10^4 right codes fails by chance, at fixed seeds
none."""

DTHETA = (0.3, 0.2, 0.5)
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # rounding was 1e-15; an ill-conditioned S loses more


def normal(*shape: int, seed: int = 0) -> Tensor:
    """N(0, 1) numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixed(P: int, n: int = 40, k: int = 4) -> tuple[Tensor, Tensor]:
    """Two conditions [P, n, k] with a covariance and a step that are not those of another test."""
    mixing = torch.eye(k, dtype=torch.float64) + 0.4 * normal(k, k, seed=1)
    z = normal(2, P, n, k, seed=2) @ mixing + 3.0
    shift = 0.3 * normal(P, 1, k, seed=3)
    return z[0] - shift, z[1] + shift


SOURCES = ("independent", "paired", "tangents", "score")


def arguments(source: str, P: int, n: int = 40, k: int = 4) -> tuple[tuple, dict]:
    """What `linear_fisher` is called with for a source."""
    minus, plus = mixed(P, n, k)
    if source in ("independent", "paired"):
        return (minus, plus, DTHETA[:P]), {"paired": source == "paired"}
    if source == "tangents":
        return (minus[0],), {"tangents": plus}
    return (minus[0],), {"score": minus[0, :, :P] + normal(n, P, seed=9)}


def linear(covariance: Tensor, derivative: Tensor) -> Tensor:
    """D^T S^-1 D."""
    return derivative.T @ torch.linalg.inv(covariance) @ derivative


def pooled_covariance(*conditions: Tensor) -> Tensor:
    return torch.stack([torch.cov(z.T) for z in conditions]).mean(0)


# --- closed forms ---


@pytest.mark.parametrize("P", [1, 3])
def test_plain_information_by_sample_moments(P):
    """Catches a covariance that is not pooled, n for n - 1, a half step, swapped parameters,
    tangents whose parameter and sample axes are swapped, and a ridge in the unit of the outputs."""
    minus, plus = mixed(P)
    covariance = pooled_covariance(*minus, *plus)
    steps = torch.tensor(DTHETA[:P], dtype=torch.float64)
    derivative = ((plus.mean(1) - minus.mean(1)) / steps[:, None]).T
    expected = linear(covariance, derivative)
    for given in ((minus, plus), (list(minus), list(plus))):
        torch.testing.assert_close(ff.linear_fisher(*given, DTHETA[:P]), expected, **EXACT)
    ridged = ops.fisher_solve(covariance, derivative, ridge=0.1)[0]
    for unit in (1, 1e6):
        found = ff.linear_fisher(unit * minus, unit * plus, DTHETA[:P], ridge=0.1)
        torch.testing.assert_close(found, ridged, **EXACT)
    expected = linear(torch.cov(minus[0].T), plus.mean(1).T)
    torch.testing.assert_close(ff.linear_fisher(minus[0], tangents=plus), expected, **EXACT)


@pytest.mark.parametrize("P", [1, 3])
def test_score_is_the_explained_covariance(P):
    """Against a regression of the score. Catches a score that is not centred, n for n - 1, and the
    explained part shrunk instead of the residual corrected."""
    (z,), given = arguments("score", P)
    s = given["score"] + 5
    design = torch.cat([torch.ones(len(z), 1, dtype=torch.float64), z], 1)
    fitted = design @ torch.linalg.lstsq(design, s).solution
    expected, V = torch.cov(fitted.T).reshape(P, P), torch.cov(s.T).reshape(P, P)
    adjusted = V - (V - expected) * 39 / (39 - 4)
    for score in (s, s[:, 0])[: 3 - min(P, 2)]:
        torch.testing.assert_close(ff.linear_fisher(z, score=score), expected, **EXACT)
        corrected = ff.linear_fisher(z, score=score, corrected=True)
        torch.testing.assert_close(corrected, adjusted, **EXACT)


def test_conditions_of_unequal_size():
    """Catches a covariance that weighs a small condition as much as a large one."""
    minus, plus = mixed(1)
    minus, plus = minus[0], plus[0, :25]
    pooled = (39 * torch.cov(minus.T) + 24 * torch.cov(plus.T)) / 63
    J = linear(pooled, (plus.mean(0) - minus.mean(0))[:, None] / 0.3)
    torch.testing.assert_close(ff.linear_fisher(minus, plus, 0.3), J, **EXACT)
    corrected = ff.linear_fisher(minus, plus, 0.3, corrected=True)
    c = (1 / 40 + 1 / 25) / 0.3**2
    torch.testing.assert_close(corrected, (63 - 4 - 1) / 63 * J - 4 * c, **EXACT)


# --- corrections ---

FOLDS = 16


def within_folds(z: Tensor) -> tuple[Tensor, Tensor]:
    """Means [F, k] of samples dealt in turn, and scatter about them, by loops."""
    parts = [z[f::FOLDS] for f in range(FOLDS)]
    means = torch.stack([part.mean(0) for part in parts])
    return means, sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in parts)


def over_pairs(covariance: Tensor, d: Tensor, nu: Tensor | int) -> Tensor:
    """J from products of derivatives [F, k, P] in different folds, by loops."""
    inverse = torch.linalg.inv(covariance)
    total = sum(a.T @ inverse @ b for i, a in enumerate(d) for j, b in enumerate(d) if i != j)
    return (nu - len(covariance) - 1) / nu * total / (FOLDS * (FOLDS - 1))


def test_corrected_information_is_a_sum_over_pairs_of_folds():
    """Catches equal folds, S about the overall mean, and folds that are not whole (n = 41); of
    pairs that share noise, the covariances of both conditions taken for independent: nu must be
    that of one divided by 1 + rho^2."""
    (z,), given = arguments("tangents", 2, n=41)
    nu = 41 - FOLDS
    d = torch.stack([within_folds(dz)[0] for dz in given["tangents"]], -1)
    expected = over_pairs(within_folds(z)[1] / nu, d, nu)
    torch.testing.assert_close(ff.linear_fisher(z, **given, corrected=True), expected, **EXACT)

    minus = normal(64, 3)
    plus = 0.8 * minus + 0.6 * normal(64, 3, seed=1) + 0.3
    (mean, scatter), (mean_plus, scatter_plus) = within_folds(minus), within_folds(plus)
    rho = sum(torch.corrcoef(torch.stack([minus[:, i], plus[:, i]]))[0, 1] for i in range(3)) / 3
    cells = 2 * (64 - FOLDS)
    d = (mean_plus - mean)[:, :, None] / 0.5
    expected = over_pairs((scatter + scatter_plus) / cells, d, cells / (1 + rho**2))
    found = ff.linear_fisher(minus, plus, 0.5, paired=True, corrected=True)
    assert rho > 0.7
    torch.testing.assert_close(found, expected, **EXACT)


REPLICATIONS, SAMPLES, OUTPUTS = 2000, 60, 8


def replicated(source: str, **settings: object) -> Tensor:
    """J of many small batches of one Gaussian shift, I = 8, at once [REPLICATIONS]."""
    noise = normal(REPLICATIONS, 2, SAMPLES, OUTPUTS)
    step = 0.5
    if source == "independent":
        minus, plus = noise[:, :1] - step / 2, noise[:, 1:] + step / 2
        J = ff.linear_fisher(minus, plus, step, **settings)
    elif source == "paired":  # a gain that differs from sample to sample: D is noisy
        gain = 1 + 0.3 * normal(REPLICATIONS, 1, SAMPLES, OUTPUTS, seed=5)
        minus, plus = noise[:, :1] - gain * step / 2, noise[:, :1] + gain * step / 2
        J = ff.linear_fisher(minus, plus, step, paired=True, **settings)
    elif source == "tangents":
        tangents = 1 + normal(REPLICATIONS, 1, SAMPLES, OUTPUTS, seed=5)
        J = ff.linear_fisher(noise[:, 0], tangents=tangents, **settings)
    else:
        noisy = noise[:, 0] + normal(REPLICATIONS, SAMPLES, OUTPUTS, seed=6)  # J = I / 2
        J = 2 * ff.linear_fisher(noisy, score=noise[:, 0].sum(-1, keepdim=True), **settings)
    return J.flatten()


def off_by_errors(J: Tensor) -> float:
    """Distance of the mean from the truth in its standard errors."""
    return abs(float(J.mean()) - OUTPUTS) / (float(J.std()) / math.sqrt(REPLICATIONS))


@pytest.mark.parametrize("source", SOURCES)
def test_corrected_information_has_no_bias(source):
    """n = 60, k = 8, I = 8. False alarms: 4 sigma. Power: J without correction, which this rejects,
    is 20 to 32 standard errors off. The largest seen is 2.7, of pairs, whose nu is approximate."""
    assert off_by_errors(replicated(source, corrected=True)) < SIGMAS
    assert off_by_errors(replicated(source)) > 2 * SIGMAS


# --- gradients ---


@pytest.mark.parametrize(("corrected", "ridge"), [(False, 0.1), (True, "auto")])
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_of_the_loss(source, corrected, ridge):
    """Against differences. Catches a moment, a scale or a factor of J that autograd takes for a
    constant though it does not cancel, the diagonal's factor 1 + ridge left out, and a gradient
    that changes the score of a simulator instead of the outputs."""
    given, keywords = arguments(source, 2, n=12, k=2)
    steps = given[2] if len(given) > 1 else None
    paired = keywords.pop("paired", False)
    loss = ff.InformationLoss(steps, paired=paired, corrected=corrected, ridge=ridge)
    inputs = [z.clone().requires_grad_() for z in given[:2]]
    if source == "tangents":
        inputs.append(keywords.pop("tangents").clone().requires_grad_())

    def value(*tensors: Tensor) -> Tensor:
        if source == "tangents":
            return loss(tensors[0], tangents=tensors[1])
        return loss(*tensors, **keywords)

    assert torch.autograd.gradcheck(value, inputs, fast_mode=True)
    if source == "score":
        keywords["score"].requires_grad_()
        value(*inputs).backward()
        assert keywords["score"].grad is None


def test_the_line_meets_the_logarithm():
    """From an estimate that is negative to one that is well above its noise. Catches a line with
    another value or slope than the logarithm has where they meet, and a slope of zero below."""
    z = normal(2, 30, 1)
    z = z - z.mean(1, keepdim=True)
    noise = math.sqrt(2 / 30)  # of the difference of the means
    shifts = (torch.linspace(0.7, 3.0, 400, dtype=torch.float64) * noise).requires_grad_()
    loss = ff.InformationLoss(0.1, corrected=True, regularization=0.0)

    def value(shift: Tensor) -> Tensor:  # the mean over systems [S, 1, 30, 1]
        half = shift[:, None, None, None] / 2
        return loss(z[0] - half, z[1] + half)

    value(shifts).backward()
    slope, ends = shifts.grad * len(shifts), shifts.detach()[[0, -1]]
    J = [ff.linear_fisher(z[0], z[1] + shift, 0.1, corrected=True).item() for shift in ends]
    assert J[0] < 0 < J[1]
    assert (slope < 0).all()
    assert (slope.diff().abs() < 0.1 * slope[1:].abs()).all()  # 0.03: no jump
    fall = torch.trapezoid(slope, shifts.detach())
    assert abs(fall - (value(ends[1:]) - value(ends[:1]))) < 1e-3 * abs(fall)


# --- invariances ---


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("corrected", [False, True])
def test_invariances(source, corrected):
    """theta' = u theta gives J / u^2, and leading dimensions are systems of their own. Catches a
    step used once, a unit in the noise, and samples of one system in the covariance of another."""
    given, keywords = arguments(source, 2)
    *z, steps = given if len(given) > 1 else (*given, None)
    other = keywords.get("tangents", keywords.get("score"))

    def information(z: list[Tensor], steps: object, other: Tensor | None) -> Tensor:
        if steps is not None:
            return ff.linear_fisher(*z, steps, **keywords, corrected=corrected)
        return ff.linear_fisher(*z, **{source: other}, corrected=corrected)

    J = information(z, steps, other)
    torch.testing.assert_close(J, J.mT, **EXACT)
    u = torch.tensor([10.0, 0.1], dtype=torch.float64)
    longer = None if steps is None else (u * torch.tensor(steps, dtype=torch.float64)).tolist()
    scaled = other / u[:, None, None] if source == "tangents" else other
    scaled = other / u if source == "score" else scaled
    torch.testing.assert_close(information(z, longer, scaled), J / u / u[:, None], **EXACT)

    second = [2 * part + normal(*part.shape, seed=11) for part in z]
    joined = [torch.stack(parts) for parts in zip(z, second, strict=True)]
    both = None if other is None else torch.stack([other, other])
    expected = torch.stack([J, information(second, steps, other)])
    torch.testing.assert_close(information(joined, steps, both), expected, **EXACT)


# --- precision ---


def test_float32_is_summed_in_float64():
    """Outputs far from zero. Catches sums in float32, which lose 6 of 7 digits here, products that
    autocast turns to bfloat16, and half outputs that are refused or get another gradient."""
    minus, plus = (100 * z.float() + 30_000 for z in mixed(2, n=500))
    loss = ff.InformationLoss(DTHETA[:2])
    J, outside = ff.linear_fisher(minus, plus, DTHETA[:2], ridge=0), loss(minus, plus)
    assert J.dtype == torch.float64
    assert torch.equal(J, ff.linear_fisher(minus.double(), plus.double(), DTHETA[:2], ridge=0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ff.linear_fisher(minus, plus, DTHETA[:2], ridge=0), J)
        assert torch.equal(loss(minus, plus), outside)
        assert torch.is_autocast_enabled("cpu")
    for dtype in (torch.bfloat16, torch.float16):
        minus, plus = (z.to(dtype).requires_grad_() for z in mixed(1))
        ff.InformationLoss(0.3)(minus, plus).backward()
        assert minus.grad.dtype == dtype


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", SOURCES)
def test_cuda_equals_cpu(source):
    """Catches a constant on the CPU."""
    given, keywords = arguments(source, 2)
    J = ff.linear_fisher(*given, **keywords, corrected=True)
    given = tuple(z.cuda() if isinstance(z, Tensor) else z for z in given)
    keywords = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    found = ff.linear_fisher(*given, **keywords, corrected=True)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), J, **EXACT)


# --- bad input ---


A, B = normal(20, 3), normal(20, 3, seed=1)
CONSTANT = A * torch.tensor([1.0, 0.0, 1.0]) + 0.1  # whose mean is not 0.1 but for rounding
A_CONSTANT, B_CONSTANT = (torch.stack([z, CONSTANT])[:, None] for z in (A, B))
TWINS = A[:, [0, 1, 0]]
BOTH = {"paired": True, "corrected": True}
DOF = "degrees of freedom must exceed the {} outputs by at least 2, got {}: use more"

BAD_TYPES = {
    "one of z_plus, tangents and score must be given, got none": ((A,), {}),
    "tangents and score must be given, got z_plus and score": ((A, B, 0.1), {"score": A[:, :1]}),
    "dtheta must be given with z_plus, got None": ((A, B), {}),
    "dtheta must be left out with score, got 0.1": ((A, None, 0.1), {"score": A[:, :1]}),
    "z_minus[0] must be a torch.Tensor, got float": (([1.0], B, 0.1), {}),
    "z_plus must be of floating dtype, got torch.int64": ((A, B.long(), 0.1), {}),
    "ridge must be \"auto\" or a number, got 'a'": ((A, B, 0.1), {"ridge": "a"}),
    "list of P of them, got a tuple: join several": (((A, A), (B, B), 0.1), {}),
}
BAD_VALUES = {
    "shape [n, k] with at least one of each, got [20]": ((A[:, 0], B[:, 0], 0.1), {}),
    "as many conditions as z_minus, got 1 and 2": (([A], [B, B], 0.1), {}),
    "z_minus must hold at least one condition, got an empty list": (([], [], 0.1), {}),
    "the same [..., k] in all conditions, got [[20, 3]": ((A, B[:, :2], 0.1), {}),
    "the same [..., n, k] in all conditions": ((A, B[:9], 0.1), {"paired": True}),
    "dtheta must be positive and finite, got 0.0": ((A, B, 0.0), {}),
    "dtheta must hold one step or one per parameter (1), got 2": ((A, B, (0.1, 0.2)), {}),
    "[..., P, n, k] with [..., n, k] = [20, 3], got [20, 3]": ((A,), {"tangents": B}),
    "[..., n, P] with [..., n] = [20], got [9, 3]": ((A,), {"score": B[:9]}),
    'ridge must be "auto" or in [0, 1), got -1.0': ((A, B, 0.1), {"ridge": -1}),
    DOF.format(3, 4): ((A[:3], B[:3], 0.1), {}),
    DOF.format(3, 0): ((A[:1],), {"tangents": A[None, :1], "corrected": True}),
    DOF.format(1, 2): ((A[:3, :1], B[:3, :1], 0.1), BOTH),
    "outputs of z must vary, got a constant one: 1 of 3": ((A_CONSTANT, B_CONSTANT, 1), {}),
    "z must be finite, got NaN or infinity": ((A * math.nan, B, 0.1), {}),
    "got a singular one at feature 3 of 3: add": ((TWINS, TWINS, 0.1), {"ridge": 0}),
}


@pytest.mark.parametrize("text", [*BAD_TYPES, *BAD_VALUES])
def test_messages(text):
    """Catches an error of torch from within, or a number out of nothing."""
    error = TypeError if text in BAD_TYPES else ValueError
    given, keywords = (BAD_TYPES | BAD_VALUES)[text]
    with pytest.raises(error, match=re.escape(text)):
        ff.linear_fisher(*given, **keywords)


def test_messages_of_the_loss():
    """Catches settings that fail in the first step of a training, or never; and a ridge that does
    not do what the message about twins promises."""
    for ridge in ("auto", 1e-6):
        assert ff.linear_fisher(TWINS, TWINS + 0.1, 0.1, ridge=ridge).isfinite().all()
    for error, text, dtheta, regularization in (
        (ValueError, "regularization must be finite and at least 0, got -1", 0.1, -1),
        (TypeError, "regularization must be a number, got 'a'", 0.1, "a"),
        (ValueError, "dtheta must be positive and finite, got -0.1", -0.1, 0),
    ):
        with pytest.raises(error, match=f"^{text}$"):
            ff.InformationLoss(dtheta, regularization=regularization)
    assert ff.InformationLoss(torch.tensor([0.1, 0.2])).dtheta == pytest.approx((0.1, 0.2))
    with pytest.raises(TypeError, match=r"^dtheta must be given with z_plus, got None$"):
        ff.InformationLoss()(A, B)
    text = "z must have at least as many outputs as parameters (2), got 1"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ff.InformationLoss((0.1, 0.2))([A[:, :1], B[:, :1]], [A[:, 1:2], B[:, 1:2]])


# --- the loss ---


def test_value_of_the_loss():
    """-log det J + w KL(N(m, C) || N(0, 1)), also corrected, well above the noise. Catches a sign,
    a trace for the determinant, a regularisation that is not zero at mean 0 and covariance 1, the
    line where the logarithm belongs, random numbers drawn, parameters of a loss, and inputs written
    to."""
    state = torch.get_rng_state()
    minus, plus = mixed(2)
    kept = minus.clone(), plus.clone()
    J = ff.linear_fisher(minus, plus, DTHETA[:2])
    covariance = pooled_covariance(*minus, *plus)
    mean = torch.cat([minus, plus]).mean((0, 1))
    normals = torch.distributions.MultivariateNormal
    white = normals(torch.zeros_like(mean), torch.eye(4, dtype=torch.float64))
    divergence = torch.distributions.kl_divergence(normals(mean, covariance), white)
    for w in (0.0, 0.5):
        loss = ff.InformationLoss(DTHETA[:2], regularization=w)
        value = loss(minus, plus)
        assert value.shape == ()
        torch.testing.assert_close(value, -J.logdet() + w * divergence, **EXACT)
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    value = loss((minus - mean) @ whitening, (plus - mean) @ whitening)
    torch.testing.assert_close(value, -J.logdet(), **EXACT)

    noise, slopes = normal(500, 3), torch.eye(2, 3, dtype=torch.float64)
    tangents = slopes[:, None] + 0.1 * noise
    J = ff.linear_fisher(noise, tangents=tangents, corrected=True)
    loss = ff.InformationLoss(corrected=True, regularization=0.0)
    torch.testing.assert_close(loss(noise, tangents=tangents), -J.logdet(), rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.stack([minus, plus]), torch.stack(kept))
    assert not loss.state_dict()
    assert "corrected=True" in repr(loss)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("corrected", [False, True])
def test_an_untrained_network_gives_no_nan(source, corrected):
    """Outputs without information, so that an estimate is negative half the time, and J = 0
    exactly. Catches the logarithm of a negative or zero number, and its gradient."""
    paired, two = source == "paired", source in ("independent", "paired")
    settings = {"dtheta": 0.1, "paired": paired} if two else {}
    loss = ff.InformationLoss(**settings, corrected=corrected)
    z = normal(2, 40, 2, 30, 2).requires_grad_()
    moves = torch.cat([0 * z[1, :1], z[1, 1:]])  # nothing moves at all in the first
    given = (z[0], torch.cat([z[0, :1], z[1, 1:]])) if two else (z[0, :, 0],)
    keywords = {} if two else {source: moves if source == "tangents" else moves[:, 0]}
    value = loss(*given, **keywords)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()
    J = ff.linear_fisher(*given, **keywords, **settings, corrected=True)
    assert (torch.linalg.eigvalsh(J) < 0).any(-1).sum() > 10  # the case was there
