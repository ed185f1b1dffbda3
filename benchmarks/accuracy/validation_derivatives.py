"""Parts of validation.py about samples that come with their derivative or score, wide layers, and
the rules that carry derivatives through a network.

    python benchmarks/accuracy/validation.py tangents error_bars score camera wide operations
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherfast as ff
from benchmarks.speed import networks
from fisherfast.data import Data, Score
from fisherfast.demo.training import train
from fisherfast.problems import (
    Camera,
    CameraPose,
    CorrelatedImage,
    GaussianScale,
    GaussianShift,
    Laplace,
    LogNormal,
    Problem,
    gaussian_network,
    glyph_scene,
    mlp,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "paper"))

from figure import Options
from montecarlo.replications import of_features
from tasks import gaussian_task

# --- tangents against two conditions ---

TASK = GaussianShift(torch.ones(256))
TASK_SAMPLES, TASK_STEP = 30_000, 0.06  # in all; the published dtheta
TASK_EPOCHS, TASK_TRAINING = 3, 2000  # samples per value of theta: the output transmits 73 %


def trained_network() -> nn.Module:
    """The network of the Gaussian task behind the first epochs of its training."""
    task = replace(
        gaussian_task(Options(samples=TASK_TRAINING)), epochs=TASK_EPOCHS, layers=("relu4",)
    )
    for _ in train(task):
        pass
    return task.model


def tangents() -> dict[str, Any]:
    """Standard error with tangents over that with two independent conditions, dtheta = 0.06, of as
    many samples in all (30 000): published Gaussian task, every layer, untrained and behind three
    short epochs."""
    known = TASK.pathwise(0.0, TASK_SAMPLES)
    two = TASK.finite_difference(0.0, TASK_STEP, TASK_SAMPLES // 2)
    results: dict[str, Any] = {"theory, input": ratio_in_theory()}
    for name, model in (("untrained", gaussian_network(seed=0)), ("trained", trained_network())):
        exact, noisy = (ff.fisher_flow(model, data, max_features=256) for data in (known, two))
        results[name] = {
            "stderr ratio": {e.name: float(e.stderr / noisy[e.name].stderr) for e in exact},
            "J, tangents": {e.name: e.value for e in exact},
            "J, two conditions": {e.name: e.value for e in noisy},
        }
    return results


def ratio_in_theory() -> float:
    """Of the error of J with an exactly known derivative to that with two conditions, input of
    the Gaussian task (docs/theory.md, 12)."""
    J, k, nu = 256.0, 256, TASK_SAMPLES
    c = 2 / (TASK_SAMPLES / 2) / TASK_STEP**2
    return J / (J**2 + 2 * c * J * nu + c**2 * k * nu) ** 0.5


# --- error bars ---

REPLICATIONS = 300
ERROR_BARS: dict[str, dict[str, tuple[Problem, float, int]]] = {
    # problem, theta, max_features; 2000 samples
    "pathwise": {
        "Gaussian shift": (GaussianShift(torch.ones(20)), 0.0, 100),
        "Gaussian scale": (GaussianScale(8), 1.0, 64),
        "log-normal": (LogNormal.random(dim=10), 0.0, 64),
    },
    "scored": {
        "Gaussian shift": (GaussianShift(torch.ones(20)), 0.0, 100),
        "Gaussian scale": (GaussianScale(8), 1.0, 64),
        "Laplace": (Laplace(4), 0.0, 64),
    },
}


def error_bars() -> dict[str, Any]:
    """Share of 300 replications whose J +- 1.96 stderr holds the mean of J; 2000 samples with
    tangents ("pathwise") or scores ("scored")."""
    results: dict[str, Any] = {}
    for kind, cases in ERROR_BARS.items():
        for name, (problem, theta, features) in cases.items():
            infos = [
                of_features(getattr(problem, kind)(theta, 2000, seed=seed), max_features=features)
                for seed in range(REPLICATIONS)
            ]
            J, stderr = values(infos), torch.stack([i.stderr[0, 0] for i in infos])
            results.setdefault(kind, {})[name] = {
                "coverage": share((J - J.mean()).abs() < 1.96 * stderr),
                "mean J": float(J.mean()),
                "I": float(problem.fisher(theta)),
                "spread of J": float(J.std()),
                "root mean square stderr": float(stderr.square().mean().sqrt()),
            }
    return results


def values(infos: Iterable[ff.LayerFisher]) -> Tensor:
    """J of one parameter, float64 [replications]."""
    return torch.stack([info.J[0, 0] for info in infos])


def share(hits: Tensor) -> float:
    """How many of them are true, 0 to 1."""
    return float(hits.double().mean())


# --- the score ---

SCORE_SAMPLES, SCORE_FEATURES = 4000, 300
SCORE_SEEDS, MORE_SCORE_SEEDS = 24, 200
LARGE_SAMPLE, LARGE_SEED = 200_000, 1000


def score() -> dict[str, Any]:
    """Mean and spread of J from 4000 samples with scores, log-normal d = 10, 300 features, over 24
    and 200 seeds; the large-sample value from 200 000 samples."""
    problem = LogNormal.random(dim=10, variance=0.01, seed=0)
    many = problem.scored(0.0, LARGE_SAMPLE, seed=LARGE_SEED)
    large = of_features(many, max_features=SCORE_FEATURES)
    infos, variances = [], []
    for seed in range(MORE_SCORE_SEEDS):
        data = problem.scored(0.0, SCORE_SAMPLES, seed=seed)
        infos.append(of_features(data, max_features=SCORE_FEATURES))
        variances.append(variance_of_score(data, SCORE_SAMPLES))
    J, V = values(infos), torch.stack(variances)
    results: dict[str, Any] = {
        "large-sample J": large.value,
        "stderr of it": float(large.stderr),
        "large-sample J / V": large.value / float(variance_of_score(many, LARGE_SAMPLE)),
        "exact std of V": (2 / SCORE_SAMPLES) ** 0.5 * float(problem.fisher(0.0)),
        "mean stderr": float(torch.stack([i.stderr[0, 0] for i in infos]).mean()),
    }
    for count in (SCORE_SEEDS, MORE_SCORE_SEEDS):
        results[f"{count} seeds"] = {
            "mean J": float(J[:count].mean()),
            "std of J": float(J[:count].std()),
            "std of V": float(V[:count].std()),
            "mean J / V": float((J / V)[:count].mean()),
            "std of J / V": float((J / V)[:count].std()),
            "mean lower": float(torch.stack([i.lower[0, 0] for i in infos[:count]]).mean()),
        }
    return results


def variance_of_score(data: Score, samples: int) -> Tensor:
    """V, the information of the input as these samples tell it."""
    scores = next(data.read(0, samples)).score
    assert scores is not None
    return scores.var()


# --- cameras ---

CAMERA_SAMPLES, POSE_SAMPLES = 4000, 6000


def camera() -> dict[str, Any]:
    """J of images against the closed form: photon counts with scores (4000 images), and place and
    brightness of an object behind read-out noise, 6000 images: largest deviation of the 3 x 3 J and
    of the marginals in standard errors, input and two linear layers."""
    photons = Camera(
        glyph_scene(), white_std=0.0, row_std=0.0, correlated_std=0.0, gain=0.3, psf_sigma=0.5
    )
    info = of_features(photons.scored(0.1, CAMERA_SAMPLES), max_features=64)
    truth = float(photons.fisher(0.1))
    results: dict[str, Any] = {
        "photon counts": {
            "J": info.value,
            "stderr": float(info.stderr),
            "I": truth,
            "in standard errors": (info.value - truth) / float(info.stderr),
        }
    }
    for kind in ("pathwise", "scored"):
        results[f"place and brightness, {kind}"] = deviations_of_pose(kind)
    return results


def deviations_of_pose(kind: str) -> dict[str, dict[str, float]]:
    """Largest deviation of J and of the marginals from the closed form in standard errors, by
    layer."""
    scene = torch.zeros(40, 48, dtype=torch.float64)
    scene[4:36, 6:16] = scene[26:36, 6:44] = 1.0
    pose = CameraPose(Camera(scene, shape=(8, 10), white_std=1.0, row_std=0.5, correlated_std=0.5))
    theta = [0.3, -0.2, 2.0]
    model = mlp([80, 20, 5], nn.Identity, flatten=True, seed=0)
    flow = ff.fisher_flow(
        model, getattr(pose, kind)(theta, POSE_SAMPLES), layers=r"fc", max_features=64
    )
    D, S = pose.mean_derivative(theta).flatten(1), pose.covariance(theta)
    first, second = (layer.weight.detach().double() for layer in (model.fc1, model.fc2))
    readouts = (torch.eye(80, dtype=torch.float64), first, second @ first)
    results = {}
    for W, layer in zip(readouts, flow, strict=True):
        truth = D @ W.T @ torch.linalg.solve(W @ S @ W.T, W @ D.T)
        alone = 1 / torch.linalg.inv(truth).diagonal()
        marginals = [layer.marginal([p]) for p in range(3)]
        off = [
            (m.J[0, 0] - expected) / m.stderr[0, 0]
            for m, expected in zip(marginals, alone, strict=True)
        ]
        results[layer.name] = {
            "J": float(((layer.J - truth) / layer.stderr).abs().max()),
            "marginal": float(torch.stack(off).abs().max()),
        }
    return results


# --- layers that are too wide for a covariance ---

IMAGE_THETA = (0.0, 1.0)
IMAGE_BATCH, IMAGE_SAMPLES, IMAGE_SEEDS = 500, 2000, 5


def shares_of_image(image: CorrelatedImage, source: Callable[[int], Data], seeds: int) -> Tensor:
    """D alone, J, its standard error and `lower` over the closed form, for position and amplitude:
    [seeds, 4, 2]."""
    truth = image.fisher(IMAGE_THETA).diagonal()
    rows = []
    for seed in range(seeds):
        info = of_features(source(seed), settings=ff.Settings(batch_size=IMAGE_BATCH))
        found = (info.curve_J[0], info.J, info.stderr, info.lower)
        rows.append(torch.stack([each.diagonal() for each in found]) / truth)
    return torch.stack(rows)


def wide() -> dict[str, Any]:
    """J and lower over the closed form, image of 128 x 128 pixels in correlated noise, 2000 samples
    in all, Krylov space: position and amplitude, 5 seeds each. Independent conditions are dtheta =
    1 / sqrt(J) apart."""
    image = CorrelatedImage()
    steps = image.fisher(IMAGE_THETA).diagonal().rsqrt().tolist()
    conditions = 2 * image.parameters

    def independent(seed: int) -> Data:
        return image.finite_difference(IMAGE_THETA, steps, IMAGE_SAMPLES // conditions, seed=seed)

    sources: dict[str, Callable[[int], Data]] = {
        "tangents": lambda seed: image.pathwise(IMAGE_THETA, IMAGE_SAMPLES, seed=seed),
        "scores": lambda seed: image.scored(IMAGE_THETA, IMAGE_SAMPLES, seed=seed),
        "independent conditions": independent,
    }
    results: dict[str, Any] = {}
    for name, source in sources.items():
        shares = shares_of_image(image, source, IMAGE_SEEDS)
        results[name] = {
            parameter: {
                "J": shares[:, 1, p].tolist(),
                "mean J": float(shares[:, 1, p].mean()),
                "spread of J": float(shares[:, 1, p].std()),
                "mean stderr": float(shares[:, 2, p].mean()),
                "mean lower": float(shares[:, 3, p].mean()),
                "matched filter": float(shares[:, 0, p].mean()),
            }
            for p, parameter in enumerate(("position", "amplitude"))
        }
    return results


# --- rules for derivatives ---


class Hourglass(nn.Module):
    """Down by pooling, up by a transposed convolution, the skip concatenated (a small U-Net)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.1))
        self.bottom = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.GELU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 1, H, W] -> the same shape."""
        skip = self.before(x)
        low = self.up(self.bottom(F.max_pool2d(skip, 2)))
        blurred = F.interpolate(F.avg_pool2d(skip, 2), size=skip.shape[-2:], mode="bilinear")
        return self.head(torch.cat([low, skip - blurred], dim=1))


def mobile() -> nn.Module:
    """Depthwise and pointwise convolutions with hardswish."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(inplace=True),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(16, 4),
    )


def encoder() -> nn.Module:
    """Two layers of PyTorch's transformer encoder."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # builder, shape of a sample
    "published MLP": (lambda: gaussian_network(seed=0), (256,)),
    "small CNN": (lambda: networks.built("small CNN"), (1, 32, 32)),
    "ResNet-18": (lambda: networks.built("ResNet-18", width=8), (3, 32, 32)),
    "mobile": (mobile, (3, 16, 16)),
    "U-Net": (Hourglass, (1, 16, 16)),
    "ViT": (lambda: networks.built("ViT", image=32, width=24, depth=2), (3, 32, 32)),
    "transformer encoder": (encoder, (5, 8)),
    "LSTM": (lambda: nn.LSTM(4, 6, 2, batch_first=True), (7, 4)),
    "GRU": (lambda: nn.GRU(4, 6, batch_first=True, bidirectional=True), (7, 4)),
}


def operations() -> dict[str, Any]:
    """Operations that small networks of each kind execute on tangents, and how they are served: by
    a rule, by PyTorch's forward mode of that operation alone, or not at all."""
    results = {}
    for name, (build, shape) in NETWORKS.items():
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        report = ff.dual.coverage(build().eval(), x)
        results[name] = {
            "rule": sum(report.rules.values()),
            "fallback": sum(report.fallbacks.values()),
            "failed": sum(report.failures.values()),
        }
    return results


PARTS = (tangents, error_bars, score, camera, wide, operations)
