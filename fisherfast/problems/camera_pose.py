"""The simulated camera with three parameters: the position of the object in both directions, and
its brightness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fisherfast._validation import check_whole
from fisherfast.problems.camera import PSF_TAIL, Camera
from fisherfast.problems.distributions import poisson_sample
from fisherfast.problems.gaussian import standard_normal
from fisherfast.problems.optics import (
    angular_frequencies,
    blurred_spectrum,
    centred_canvas,
    crop_and_bin,
)
from fisherfast.problems.problem import Problem, Theta, cholesky_factor


@dataclass(frozen=True, eq=False)
class CameraPose(Problem):
    """Images of a scene at theta = (x, y, a): x um along a row, y um down the columns, brightness
    a DN.

        m(theta) = offset + a * bin[ (scene shifted by x and y) * psf ]   in DN

    with the optics and the noise of a `Camera`, whose own amplitude is not used. Position and
    brightness are estimated from the same pixels: with both unknown each is known less well, which
    is what the marginal Fisher information measures.

        I_pq = m_p^T C^-1 m_q,  and with shot and read-out noise + tr(C^-1 C_p C^-1 C_q) / 2

    Args:
        camera: scene, optics and noise.

    Example:
        >>> from fisherfast.problems import CameraPose, default_camera
        >>> camera = default_camera()
        >>> pose = CameraPose(camera)
        >>> information = pose.fisher([0.0, 0.0, camera.amplitude])
        >>> information.shape, round(information[0, 0].item(), 6)
        (torch.Size([3, 3]), 1.6)
    """

    camera: Camera
    dim: int = field(init=False)
    parameters: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", self.camera.dim)

    def mean(self, theta: Theta) -> Tensor:
        """m(theta), float64 [H, W], in DN."""
        place = self.as_theta(theta)
        image = self.camera.offset + place[2] * self._expose(place, (0, 0))
        if self.camera.gain is not None and not (image > 0).all():
            raise ValueError(
                "offset must give every pixel some light for shot noise, "
                f"got a pixel of {float(image.min()):g} DN"
            )
        return image

    def mean_derivative(self, theta: Theta) -> Tensor:
        """dm/dtheta, float64 [3, H, W], in DN per um, DN per um, and DN per DN."""
        place = self.as_theta(theta)
        along, down = (place[2] * self._expose(place, orders) for orders in ((1, 0), (0, 1)))
        return torch.stack([along, down, self._expose(place, (0, 0))])

    def covariance(self, theta: Theta) -> Tensor:
        """C(theta) of the pixels in row-major order, float64 [HW, HW], in DN squared."""
        readout = self.camera.readout_covariance.clone()
        if self.camera.gain is None:
            return readout
        return readout + (self.mean(theta).flatten() / self.camera.gain).diag()

    def fisher(self, theta: Theta) -> Tensor:
        """The FI in one image, float64 [3, 3]: exact, or Gaussian for mixed noise."""
        information = self.linear_fisher(theta)
        if self.camera.gain is not None and self.camera.has_readout_noise:
            inverse = torch.cholesky_inverse(cholesky_factor(self.covariance(theta)))
            change = self.mean_derivative(theta).flatten(1) / self.camera.gain
            information = information + change @ inverse.square() @ change.mT / 2
        return information

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """Draw n images, float32 [n, H, W], in DN."""
        mean = self.mean(theta).flatten()
        gain = self.camera.gain
        if gain is None:
            images = mean.float().expand(check_whole("n", n, least=1), -1).to(generator.device)
        else:
            images = (poisson_sample(mean * gain, n, generator) / gain).float()
        if self.camera.has_readout_noise:
            noise = standard_normal(n, self.dim, generator)
            images = images + noise @ self.camera.readout_factor.mT.to(noise)
        return images.reshape(n, *self.camera.shape)

    def sample_with_tangent(
        self, theta: Theta, n: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw images [n, H, W] and their derivative [n, 3, H, W], equal for all (a view).

        Raises:
            NotImplementedError: with shot noise, whose counts have no derivative.
        """
        if self.camera.gain is not None:
            raise NotImplementedError(
                "CameraPose with shot noise has no pathwise derivative; use finite_difference"
            )
        images = self.sample(theta, n, generator)
        return images, self.mean_derivative(theta).to(images).expand(n, -1, -1, -1)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """m_p^T C^-1 (x - m), float64 [n, 3]: with read-out noise alone or shot noise alone.

        Raises:
            NotImplementedError: with both, whose density has no closed form.
        """
        if self.camera.gain is not None and self.camera.has_readout_noise:
            raise NotImplementedError(
                "CameraPose with shot and read-out noise has no closed-form score; "
                "use finite_difference"
            )
        residual = self._as_samples(x) - self.mean(theta).flatten()
        factor = cholesky_factor(self.covariance(theta))
        return residual @ torch.cholesky_solve(self.mean_derivative(theta).flatten(1).mT, factor)

    def as_theta(self, theta: Theta) -> Tensor:
        """Return theta as a float64 tensor [3], the position within the travel of the camera."""
        place = super().as_theta(theta)
        if not (place[:2].abs() <= self.camera.travel).all():
            raise ValueError(
                f"theta must lie within +-{self.camera.travel} um, got {place[:2].tolist()}"
            )
        return place

    def _expose(self, place: Tensor, orders: tuple[int, int]) -> Tensor:
        """Compute a derivative, of given orders in x and y, of the blurred, shifted, binned
        scene."""
        spectrum, rows, columns, (height, width) = self._optics
        along, down = orders
        phase = torch.exp(-1j * (columns * place[0] + rows * place[1]))
        factor = (-1j * columns) ** along * (-1j * rows) ** down * phase
        image = torch.fft.irfft2(spectrum * factor, s=(height, width))
        return crop_and_bin(image, *self.camera.shape, self.camera.oversampling)

    @cached_property
    def _optics(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Spectrum of the blurred canvas, angular frequencies of rows and columns, canvas size: as
        for the camera, with room to move in both directions."""
        camera = self.camera
        margin = PSF_TAIL * camera.psf_sigma + camera.travel
        height, width = (
            size * camera.oversampling + 2 * math.ceil(margin / camera.spacing)
            for size in camera.shape
        )
        canvas = centred_canvas(camera.scene, height, width, camera.padding)
        spectrum = blurred_spectrum(canvas, camera.spacing, camera.psf_sigma)
        rows = angular_frequencies(canvas.shape[0], camera.spacing).unsqueeze(1)
        columns = angular_frequencies(canvas.shape[1], camera.spacing, half=True)
        return spectrum, rows, columns, (canvas.shape[0], canvas.shape[1])
