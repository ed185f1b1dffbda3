"""A simulated camera with a moving object, and the Fisher information in its images."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fisherfast._validation import check_positive, check_whole
from fisherfast.problems.distributions import poisson_sample
from fisherfast.problems.gaussian import standard_normal
from fisherfast.problems.problem import (
    STREAM_TRAINING,
    Problem,
    Theta,
    angular_frequencies,
    cholesky_factor,
    seeded_generator,
)
from fisherfast.problems.scenes import glyph_scene

READOUT_STD = 15.0  # DN, published
INPUT_FISHER = 1.6  # of one image, per um^2, published
DEFAULT_PSF_SIGMA = 0.5  # um
DEFAULT_WHITE_STD, DEFAULT_CORRELATED_STD = 7.0, 2.0  # DN; the rest of READOUT_STD is row noise
PSF_TAIL = 6  # standard deviations; 2e-9 of the light is outside
FISHER_TOLERANCE = 1e-12  # relative; each round at least halves the error, so 100 are enough
FISHER_ROUNDS = 100


def published_positions() -> Tensor:
    """Return the 13 positions of the experiment, -1.8 to 1.8 um in steps of 0.3, float64 [13]."""
    return torch.linspace(-1.8, 1.8, 13, dtype=torch.float64)


class CameraImages(Problem):
    """Images of a signal that depends on theta, with the offset and the noise of a camera.

        m = offset + signal,  C = read-out noise + diag(m) / gain
        I_pq = m_p^T C^-1 m_q,  and with shot and read-out noise + tr(C^-1 C_p C^-1 C_q) / 2

    Attributes:
        camera: whose noise it is.
    """

    camera: Camera

    @abstractmethod
    def signal(self, theta: Theta) -> Tensor:
        """Mean image without the offset, float64 [H, W], in DN."""

    def as_theta(self, theta: Theta) -> Tensor:
        """Return theta as a float64 tensor [P], with the position within the travel of the
        camera."""
        theta = super().as_theta(theta)
        position = theta[:2]
        if not (position.abs() <= self.camera.travel).all():
            raise ValueError(
                f"theta must lie within +-{self.camera.travel} um, got"
                f" {position.squeeze().tolist()}"
            )
        return theta

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """True without shot noise: all images then change with theta in the same way."""
        return self.camera.gain is None

    @property
    def _mixed(self) -> bool:
        """True with both shot noise and read-out noise, whose density has no closed form."""
        return self.camera.gain is not None and self.camera.has_readout_noise

    def mean(self, theta: Theta) -> Tensor:
        """m(theta), float64 [H, W], in DN."""
        image = self.camera.offset + self.signal(theta)
        if self.camera.gain is not None and not (image > 0).all():
            raise ValueError(
                "offset must give every pixel some light for shot noise, "
                f"got a pixel of {float(image.min()):g} DN"
            )
        return image

    def covariance(self, theta: Theta) -> Tensor:
        """C(theta) of the pixels in row-major order, float64 [HW, HW], in DN squared."""
        if self.camera.gain is None:
            return self.camera.readout_covariance.clone()
        shot = (self.mean(theta).flatten() / self.camera.gain).diag()
        return self.camera.readout_covariance + shot

    def fisher(self, theta: Theta) -> Tensor:
        """The FI in one image, float64 [P, P]: exact, or Gaussian for mixed noise."""
        information, gain = self.linear_fisher(theta), self.camera.gain
        if gain is not None and self._mixed:
            inverse = torch.cholesky_inverse(cholesky_factor(self.covariance(theta)))
            change = self.mean_derivative(theta).flatten(1) / gain
            information = information + change @ inverse.square() @ change.mT / 2
        return information

    def sample(self, theta: Theta, n: int, generator: torch.Generator) -> Tensor:
        """Draw n images, float32 [n, H, W], in DN."""
        mean, gain = self.mean(theta).flatten(), self.camera.gain
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
        """Draw images [n, H, W] and their derivative [P, n, H, W], equal for all (a view).

        Raises:
            NotImplementedError: with shot noise, whose counts have no derivative.
        """
        if not self.additive:
            raise NotImplementedError(
                f"{type(self).__name__} with shot noise has no pathwise derivative; "
                "use finite_difference"
            )
        return super().sample_with_tangent(theta, n, generator)

    def score(self, x: Tensor, theta: Theta) -> Tensor:
        """m_p^T C^-1 (x - m), float64 [n, P]: with read-out noise alone or shot noise alone.

        Raises:
            NotImplementedError: with both, whose density has no closed form.
        """
        if self._mixed:
            raise NotImplementedError(
                f"{type(self).__name__} with shot and read-out noise has no closed-form score; "
                "use finite_difference"
            )
        residual = self._as_samples(x) - self.mean(theta).flatten()
        factor = cholesky_factor(self.covariance(theta))
        return residual @ torch.cholesky_solve(self.mean_derivative(theta).flatten(1).mT, factor)


@dataclass(frozen=True, eq=False)
class Camera(CameraImages):
    """Noisy images of a scene displaced by theta micrometres along the rows.

    The mean image is

        m(theta) = offset + amplitude * bin[ (scene shifted by theta) * psf ]   in DN

    with an exact shift in Fourier space, so m and m' are exact for any fraction of a pixel.
    The noise has the covariance

        C(theta) = white^2 1 + row^2 [same row] + correlated^2 exp(-r_ij^2 / (2 l^2))
                   + diag(m) / gain

    the last line only with shot noise: Poisson counts of gain * m electrons. The FI is
    m'^T C^-1 m' with read-out noise alone or shot noise alone; both together are treated as
    Gaussian, which adds tr[(C^-1 C')^2] / 2.

    Args:
        scene: the object, [h, w], samples `spacing` = pixel_size / oversampling apart, centred on
            the field of view at theta = 0.
        amplitude: signal of a scene value of 1, in DN.
        offset: uniform light level, in DN; it has shot noise like the signal.
        pixel_size: side of a pixel in the object plane, in um.
        oversampling: scene samples per pixel side.
        psf_sigma: standard deviation of the Gaussian point-spread function, in um.
        white_std: read-out noise independent in each pixel, in DN.
        row_std: read-out noise common to a row, in DN.
        correlated_std: read-out noise with Gaussian correlation, in DN.
        correlation_length: l of that correlation, in pixels.
        gain: electrons per DN; None for no shot noise.
        shape: (H, W), pixels.
        travel: largest |theta|, in um; the canvas is wide enough that nothing wraps around.
        padding: of the scene: "zero", or "edge" to repeat its edge values.

    Raises:
        ValueError: if a length or level is not positive, the point-spread function is narrower than
            one scene sample, or pixels have no independent noise.

    Example:
        >>> import torch
        >>> from fisherfast.problems import default_camera
        >>> camera = default_camera()
        >>> round(camera.fisher(0.0).item(), 6)
        1.6
        >>> camera.sample(0.3, 5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 18, 24])
    """

    scene: Tensor
    amplitude: float = 2.0
    offset: float = 100.0
    pixel_size: float = 0.6
    oversampling: int = 4
    psf_sigma: float = 0.4
    white_std: float = 11.0
    row_std: float = 10.0
    correlated_std: float = 2.0
    correlation_length: float = 1.5
    gain: float | None = None
    shape: tuple[int, int] = (18, 24)
    travel: float = 2.4
    padding: str = "zero"
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        scene = torch.as_tensor(self.scene, dtype=torch.float64)
        if scene.ndim != 2 or scene.numel() == 0:
            raise ValueError(f"scene must have shape [h, w], got {tuple(scene.shape)}")
        if not torch.isfinite(scene).all():
            raise ValueError("scene must be finite, got nan or inf")
        for size in self.shape:
            check_whole("shape", size, least=1)
        check_whole("oversampling", self.oversampling, least=1)
        for name in ("amplitude", "pixel_size", "psf_sigma", "correlation_length", "travel"):
            check_positive(name, getattr(self, name))
        for name in ("white_std", "row_std", "correlated_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.psf_sigma < self.spacing:
            raise ValueError(
                f"psf_sigma must be at least one scene sample ({self.spacing:g} um), "
                f"got {self.psf_sigma}"
            )
        if self.gain is not None:
            check_positive("gain", self.gain)
        if self.white_std == 0 and (self.gain is None or self.has_readout_noise):
            raise ValueError(
                "white_std must be positive unless shot noise is the only noise, got 0"
            )
        if self.padding not in ("zero", "edge"):
            raise ValueError(f"padding must be 'zero' or 'edge', got {self.padding!r}")
        object.__setattr__(self, "scene", scene)
        object.__setattr__(self, "dim", self.shape[0] * self.shape[1])

    @property
    def spacing(self) -> float:
        """Distance of two scene samples, in um."""
        return self.pixel_size / self.oversampling

    @property
    def has_readout_noise(self) -> bool:
        """Whether any read-out noise is present."""
        return max(self.white_std, self.row_std, self.correlated_std) > 0

    @property
    def readout_std(self) -> float:
        """Standard deviation of the read-out noise of one pixel, in DN."""
        return math.hypot(self.white_std, self.row_std, self.correlated_std)

    @property
    def camera(self) -> Camera:  # type: ignore[override]
        """The camera itself."""
        return self

    def signal(self, theta: Theta) -> Tensor:
        """Mean image without the offset, float64 [H, W], in DN."""
        return self.amplitude * self._optics.image(self._place(theta))

    def mean_derivative(self, theta: Theta) -> Tensor:
        """dm/dtheta, float64 [1, H, W], in DN per um."""
        return (self.amplitude * self._optics.image(self._place(theta), (1, 0))).unsqueeze(0)

    def snr(self, theta: Theta = 0.0) -> float:
        """Signal-to-noise ratio: the largest |m - offset| over the root mean noise variance."""
        signal = (self.mean(theta) - self.offset).abs().max()
        return float(signal / self.covariance(theta).diagonal().mean().sqrt())

    def with_input_fisher(self, target: float, theta: Theta = 0.0) -> Camera:
        """Return a copy whose amplitude is scaled so that `fisher(theta)` equals `target`.

        Args:
            target: the desired FI, per um^2.
            theta: the position, in um.

        Returns:
            The camera; its FI at `theta` agrees to a relative 1e-12.

        Raises:
            ValueError: if target is not positive, or the scene does not change when it moves.

        Example:
            >>> from fisherfast.problems import Camera, glyph_scene
            >>> camera = Camera(glyph_scene(), gain=2.0).with_input_fisher(3.0)
            >>> round(camera.fisher(0.0).item(), 9)
            3.0
        """
        check_positive("target", target)
        camera = self
        for _ in range(FISHER_ROUNDS):
            information = camera.fisher(theta).item()
            if information == 0:
                raise ValueError("scene must change when it moves, got a FI of 0")
            if abs(information / target - 1) < FISHER_TOLERANCE:
                return camera
            # FI ~ amplitude^2 in read-out noise, ~ amplitude in shot noise of the signal itself.
            scale = math.sqrt(target / information)
            camera = replace(camera, amplitude=camera.amplitude * scale)
        raise ValueError(f"target must be attainable by scaling the amplitude, got {target}")

    def positions(self) -> Tensor:
        """Return the positions to train on, those of the paper, float64 [13], in um."""
        return published_positions()

    def training_set(self, samples_per_position: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw images at all `positions()`, in their order, with independent noise.

        Args:
            samples_per_position: images at each position.
            seed: of the noise, which is independent of that of `finite_difference` for equal seeds.

        Returns:
            x, float32 [n, H, W], in DN, and theta, float32 [n], in um; n = 13 samples_per_position.

        Example:
            >>> from fisherfast.problems import default_camera
            >>> x, theta = default_camera().training_set(2)
            >>> x.shape, theta.shape
            (torch.Size([26, 18, 24]), torch.Size([26]))
        """
        generator = seeded_generator(seed, STREAM_TRAINING)
        places = self.positions()
        images = [self.sample(place, samples_per_position, generator) for place in places]
        return torch.cat(images), places.float().repeat_interleave(samples_per_position)

    def _place(self, theta: Theta) -> Tensor:
        """Return theta as a place (x, y), float64 [2], in um."""
        return torch.nn.functional.pad(self.as_theta(theta), (0, 1))

    @cached_property
    def _optics(self) -> Optics:
        return Optics(self)

    @cached_property
    def readout_covariance(self) -> Tensor:
        """Covariance of the read-out noise, float64 [HW, HW]."""
        rows, columns = (
            index.flatten().double()
            for index in torch.meshgrid(*map(torch.arange, self.shape), indexing="ij")
        )
        row_distance = rows[:, None] - rows
        distance2 = row_distance**2 + (columns[:, None] - columns) ** 2
        return (
            self.white_std**2 * torch.eye(self.dim, dtype=torch.float64)
            + self.row_std**2 * (row_distance == 0)
            + self.correlated_std**2 * torch.exp(-distance2 / (2 * self.correlation_length**2))
        )

    @cached_property
    def readout_factor(self) -> Tensor:
        """Its Cholesky factor."""
        return cholesky_factor(self.readout_covariance)


class Optics:
    """The scene of a camera seen through its point-spread function, moved by any distance.

        F(k) exp(-|k|^2 sigma^2 / 2) exp(-i k r),  averaged over each pixel

    Args:
        camera: whose scene moves along the rows, by up to its travel.
        down: how far the scene also moves along the columns, in um.
    """

    def __init__(self, camera: Camera, *, down: float = 0.0) -> None:
        self._shape, self._oversampling = camera.shape, camera.oversampling
        tail = PSF_TAIL * camera.psf_sigma
        around = []
        for held, pixels, move in zip(
            camera.scene.shape, camera.shape, (down, camera.travel), strict=True
        ):
            seen = pixels * camera.oversampling + 2 * math.ceil((tail + move) / camera.spacing)
            free = max(seen - held, 0)
            around.append((free // 2, free - free // 2))
        mode = "constant" if camera.padding == "zero" else "edge"
        canvas = np.pad(camera.scene.numpy(), around, mode=mode)  # type: ignore[call-overload]
        self._canvas = canvas.shape
        self._rows = angular_frequencies(canvas.shape[0], camera.spacing).unsqueeze(1)
        self._columns = angular_frequencies(canvas.shape[1], camera.spacing, half=True)
        blur = torch.exp(-(self._rows**2 + self._columns**2) * camera.psf_sigma**2 / 2)
        self._spectrum = torch.fft.rfft2(torch.from_numpy(canvas)) * blur

    def image(self, place: Tensor, orders: tuple[int, int] = (0, 0)) -> Tensor:
        """Compute the image [H, W] of the scene at a place (x, y) in um, x along the rows, or its
        derivative of these orders in x and y."""
        along, down = orders
        phase = torch.exp(-1j * (self._columns * place[0] + self._rows * place[1]))
        factor = (-1j * self._columns) ** along * (-1j * self._rows) ** down * phase
        image = torch.fft.irfft2(self._spectrum * factor, s=self._canvas)
        (height, width), side = self._shape, self._oversampling
        top, left = (image.shape[0] - height * side) // 2, (image.shape[1] - width * side) // 2
        view = image[top : top + height * side, left : left + width * side]
        return view.reshape(height, side, width, side).mean((1, 3))


def default_camera(scene: np.ndarray | Tensor | None = None) -> Camera:
    """Simulate the published experiment: 18 x 24 pixels, 15 DN read-out noise, FI 1.6 per um^2.

    With the glyph of `glyph_scene` the largest signal is 2.03 DN, a signal-to-noise ratio of
    13.6 %, and the FI is 1.600 to 1.601 per um^2 over all positions. Conditions 0.6 um apart, as in
    the experiment, have 1.51 per um^2: see `finite_step_fisher`. The glyph has thick lines and most
    of the read-out noise is common to a row, as in many cameras, so that images keep changing over
    the whole range of positions: with thin lines, images 1 um apart would differ as much as images
    3 um apart, and no estimate would come near a mean square error of 1 / FI.

    Args:
        scene: [h, w]; the glyph if None. The amplitude of any scene is set to give this FI.

    Returns:
        A `Camera` with an FI of 1.6 per um^2 at theta = 0.

    Example:
        >>> from fisherfast.problems import default_camera
        >>> round(default_camera().readout_std, 9)
        15.0
    """
    picture = glyph_scene() if scene is None else scene
    camera = Camera(
        torch.as_tensor(picture),
        psf_sigma=DEFAULT_PSF_SIGMA,
        white_std=DEFAULT_WHITE_STD,
        row_std=math.sqrt(READOUT_STD**2 - DEFAULT_WHITE_STD**2 - DEFAULT_CORRELATED_STD**2),
        correlated_std=DEFAULT_CORRELATED_STD,
    )
    return camera.with_input_fisher(INPUT_FISHER)
