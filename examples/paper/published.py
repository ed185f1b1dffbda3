"""The numbers of the publication.

Source: M. Weimar, L. M. Rachbauer, I. Starshynov, D. Faccio, L. Adilova, D. Bouchet, S. Rotter,
Fisher Information Flow in Artificial Neural Networks, Phys. Rev. X 15, 031072 (2025),
arXiv:2509.02407. Its measurements of the imaging task: Zenodo, doi:10.5281/zenodo.17021436.
"""

from __future__ import annotations

CITATION = "Weimar et al., Phys. Rev. X 15, 031072 (2025), arXiv:2509.02407"

FIRST, LAST = -2, -1
"""Keys of the first and the last epoch, if their numbers are not known."""

# J of N(0, theta^2 1) against the number of features of a lift without bias
LIFT_DIM, LIFT_THETA, LIFT_STEP, LIFT_FISHER = 50, 1.0, 0.1, 100.0
LIFT_SLOPE = 0.7
"""Slope of the leaky ReLU below zero."""
LIFT_NOISE = 0.01
"""Standard deviation of the noise on each feature; keeps the covariance invertible."""
LIFT_CURVE = {0: 4.4, 100: 63.4, 200: 77.2, 400: 90.3, 800: 95.6, 1300: 97.7}
"""Features of the lift: J in 1/theta^2; 0 means the samples themselves."""

# J / J_input of the four hidden layers and the output, by epoch
GAUSSIAN_FLOW = {
    0: (0.327, 0.157, 0.053, 0.014, 0.001),
    1: (0.654, 0.564, 0.519, 0.503, 0.481),
    5: (0.919, 0.920, 0.909, 0.904, 0.885),
    15: (0.996, 1.008, 1.007, 1.007, 0.976),
}
LOGNORMAL_FLOW = {
    0: (0.981, 0.910, 0.755, 0.582, 0.034),
    2: (0.971, 0.949, 0.911, 0.872, 0.808),
    LAST: (0.988, 0.992, 0.991, 0.987, 0.969),
}
IMAGING_FLOW = {
    FIRST: (0.770, 0.131, 0.018, 0.004, 0.003),
    LAST: (0.981, 0.854, 0.835, 0.824, 0.822),
}

# early stopping on the Gaussian task: training MSE x J_input crosses 1 where the validation error
# is close to its minimum, and afterwards that error rises
STOPPING_WIDTHS = (256, 1000, 500, 300, 50, 1)
STOPPING_EXCESS = 0.03
"""Largest relative excess of the validation error at the stop over its minimum."""
STOPPING_RISE = 1 / 3
"""Relative excess of the validation error at the end over its minimum."""


def epoch_label(epoch: int) -> str:
    """Name of a published epoch."""
    return {FIRST: "first epoch", LAST: "last epoch"}.get(epoch, f"epoch {epoch}")
