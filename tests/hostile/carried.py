"""Which layers of a generated problem the dtype carries."""

from __future__ import annotations

import numpy as np
from hostile.generator import Problem

# Condition of the correlations of the activations that the dtype carries: the square root of it
# times the spacing of numbers (1.2e-7, 2.2e-16) is 1e-3 and 2e-10; the float64 sums that both need
# stop at 1e12.
CARRIED_CONDITION = {"float32": 1e8, "float64": 1e12}
# Share of the information that the rounding of the activations may take, where a layer is judged. A
# library that sees no more than the activations has to allow for a hundred times the rounding of
# one number (sums of many terms, means of many standard deviations), and that must stay below
# what users are promised, 3 %.
CARRIED_LOSS = 2e-4


def carried_layers(problem: Problem) -> list[bool]:
    """Whether the dtype of the activations carries the information of the input and each layer.

    The rounding of a layer is noise of its own: of the spacing of numbers times the size of what is
    added up, passed on by the layers after it. Its share of the information is
    V^T M V / V^T V, M the covariance of all rounding in whitened coordinates; tangents are rounded
    by the same rule.
    """
    structure, dtype = problem.structure, problem.dtype
    spacing = float(np.finfo(dtype).eps)
    B, mean = structure.factors[0], structure.means[0]
    V = structure.signal / np.linalg.norm(structure.signal, axis=0)
    squares = (B**2).sum(1) + mean**2
    tangents = ((B @ V) ** 2).sum(1)
    noise = [np.diag(spacing**2 * squares), np.diag(spacing**2 * tangents)]
    carried = [_carries(B, V, noise, problem)]
    for W, b, B, mean in zip(
        structure.weights, structure.biases, structure.factors[1:], structure.means[1:], strict=True
    ):
        added = (W**2) @ squares + b**2, (W**2) @ tangents
        squares, tangents = (B**2).sum(1) + mean**2, ((B @ V) ** 2).sum(1)
        own = spacing**2 * (added[0] + squares), spacing**2 * (added[1] + tangents)
        noise = [W @ N @ W.T + np.diag(n) for N, n in zip(noise, own, strict=True)]
        carried.append(_carries(B, V, noise, problem))
    return carried


def _carries(B: np.ndarray, V: np.ndarray, noise: list[np.ndarray], problem: Problem) -> bool:
    deviations = np.linalg.norm(B, axis=1)
    scaled = B / deviations[:, None]
    singular = np.linalg.svd(scaled, compute_uv=False)
    if singular[0] ** 2 > CARRIED_CONDITION[problem.dtype] * singular[-1] ** 2:
        return False
    activations, tangents = (
        np.linalg.solve(scaled, np.linalg.solve(scaled, N / np.outer(deviations, deviations)).T)
        for N in noise
    )
    loss = np.einsum("dp,de,ep->p", V, activations, V).max()
    if problem.source == "pathwise":
        loss = max(loss, 2 * np.trace(tangents) ** 0.5)
    return bool(loss <= CARRIED_LOSS)
