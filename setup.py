"""Builds the native core `fisherfast._C` with CMake; everything else is in pyproject.toml.

Environment:
    FISHERFAST_CUDA            AUTO (default: on when nvcc is found), ON or OFF
    CUDAARCHS                  GPU architectures, as CMake reads them (default all-major)
    FISHERFAST_SANITIZE        address,undefined: with these sanitizers, for developers (default:
                               none). Python must then start with their libraries; `make sanitize`
                               keeps such a module in build/sanitize, away from the one in use.
    CMAKE_BUILD_PARALLEL_LEVEL number of compile jobs (default: all cores)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path(__file__).resolve().parent
CUDA_CHOICES = ("AUTO", "ON", "OFF")
SANITIZE_CHOICES = ("", "address,undefined")


def cuda_choice() -> str:
    """Returns the value of FISHERFAST_CUDA, upper case."""
    choice = os.environ.get("FISHERFAST_CUDA", "AUTO").upper()
    if choice not in CUDA_CHOICES:
        raise SystemExit(f"FISHERFAST_CUDA must be AUTO, ON or OFF, got {choice}")
    return choice


def sanitize_choice() -> str:
    """Returns the value of FISHERFAST_SANITIZE, empty for none."""
    choice = os.environ.get("FISHERFAST_SANITIZE", "")
    if choice not in SANITIZE_CHOICES:
        raise SystemExit(f"FISHERFAST_SANITIZE must be empty or address,undefined, got {choice}")
    return choice


class CMakeBuild(build_ext):
    """Configures and builds the CMake target `_C`, straight into the place Python expects."""

    def run(self) -> None:
        if sanitize_choice() and (self.inplace or self.editable_mode):
            raise SystemExit("FISHERFAST_SANITIZE must be empty for a build in place, see setup.py")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        library_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One place for every way to build: a wheel takes the objects of an editable install.
        build_dir = SOURCE_DIR / "build" / ("cmake-sanitize" if sanitize_choice() else "cmake")
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            f"-S{SOURCE_DIR}",
            f"-B{build_dir}",
            "-GNinja",
            # Named at every run: the cache may hold the ninja of a deleted build environment.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFISHERFAST_VERSION={self.distribution.get_version()}",
            f"-DFISHERFAST_CUDA={cuda_choice()}",
            f"-DFISHERFAST_SANITIZE={sanitize_choice()}",
        ]
        build = ["cmake", "--build", str(build_dir), "--target", "_C"]
        if self.parallel:
            build += ["--parallel", str(self.parallel)]
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)


setup(
    ext_modules=[Extension("fisherfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
