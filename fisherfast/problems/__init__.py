"""Problems whose Fisher information is known: ground truths for tests, examples and benchmarks."""

from .camera import Camera, default_camera, published_positions
from .camera_pose import CameraPose
from .correlated_image import CorrelatedImage
from .distributions import Laplace, LogNormal, Poisson, RectifiedGaussian
from .experiment import CameraRecording, load_camera_npz
from .gaussian import GaussianFamily, GaussianScale, GaussianShift, NoisyLinear
from .networks import (
    MLP,
    gaussian_network,
    imaging_network,
    invertible_chain,
    lognormal_network,
    mlp,
)
from .optics import shift_image
from .problem import Problem
from .scenes import glyph_scene, scene_from_file

__all__ = [
    "MLP",
    "Camera",
    "CameraPose",
    "CameraRecording",
    "CorrelatedImage",
    "GaussianFamily",
    "GaussianScale",
    "GaussianShift",
    "Laplace",
    "LogNormal",
    "NoisyLinear",
    "Poisson",
    "Problem",
    "RectifiedGaussian",
    "default_camera",
    "gaussian_network",
    "glyph_scene",
    "imaging_network",
    "invertible_chain",
    "load_camera_npz",
    "lognormal_network",
    "mlp",
    "published_positions",
    "scene_from_file",
    "shift_image",
]
