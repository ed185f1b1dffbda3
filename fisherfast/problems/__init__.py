"""Problems with known Fisher information: ground truths for tests, examples and benchmarks."""

from fisherfast.problems.camera import Camera, default_camera, published_positions
from fisherfast.problems.camera_pose import CameraPose
from fisherfast.problems.correlated_image import CorrelatedImage
from fisherfast.problems.distributions import Laplace, LogNormal, Poisson, RectifiedGaussian
from fisherfast.problems.experiment import CameraRecording, load_camera_npz
from fisherfast.problems.gaussian import GaussianFamily, GaussianScale, GaussianShift, NoisyLinear
from fisherfast.problems.networks import (
    gaussian_network,
    imaging_network,
    invertible_chain,
    lognormal_network,
    mlp,
)
from fisherfast.problems.problem import Problem
from fisherfast.problems.scenes import glyph_scene, scene_from_file

__all__ = [
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
]
