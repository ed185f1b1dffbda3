"""The simulated camera with three parameters: the position of the object in both directions, and
its brightness."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fisherfast.problems.camera import Camera, CameraImages, Optics
from fisherfast.problems.problem import Theta


@dataclass(frozen=True, eq=False)
class CameraPose(CameraImages):
    """Images of a scene at theta = (x, y, a): x um along a row, y um down the columns, brightness
    a DN.

        m(theta) = offset + a * bin[ (scene shifted by x and y) * psf ]   in DN

    with the optics and the noise of a `Camera`, whose own amplitude is not used. Position and
    brightness are estimated from the same pixels: with both unknown each is known less well, which
    is what the marginal Fisher information measures.

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

    def signal(self, theta: Theta) -> Tensor:
        """Mean image without the offset, float64 [H, W], in DN."""
        place = self.as_theta(theta)
        return place[2] * self._optics.image(place)

    def mean_derivative(self, theta: Theta) -> Tensor:
        """dm/dtheta, float64 [3, H, W], in DN per um, DN per um, and DN per DN."""
        place = self.as_theta(theta)
        along, down, still = (
            self._optics.image(place, orders) for orders in ((1, 0), (0, 1), (0, 0))
        )
        return torch.stack([place[2] * along, place[2] * down, still])

    @cached_property
    def _optics(self) -> Optics:
        return Optics(self.camera, down=self.camera.travel)
