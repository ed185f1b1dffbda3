"""The build: version stamp, missing and stale modules, build facts, layering of the sources."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fisherfast
from fisherfast import _native
from fisherfast.ops import selfcheck

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
# Objects of the kernels with wide instructions, as the last build made them.
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles"
WIDE = [
    path
    for level in ("avx2", "avx512")
    for source in sorted(CSRC.rglob("*.simd.cpp"))
    for path in OBJECTS.glob(f"fisherfast_{level}.dir/{source.relative_to(ROOT)}.o")
]
X = torch.ones(1, 3)
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)

needs_native = pytest.mark.skipif(
    _native.load() is None,
    reason="FISHERFAST_DISABLE_NATIVE=1 is set: there is no module to look at",
)


@needs_native
def test_build_info():
    info = _native.build_info()
    facts = {"version", "compiler", "simd", "simd_available", "threads"}
    facts |= {"cuda", "nvcc", "cuda_architectures"}
    assert set(info) == facts
    assert info["version"] == fisherfast.__version__
    assert info["compiler"]
    assert info["simd"]
    assert info["cuda"] == bool(info["nvcc"]) == bool(info["cuda_architectures"])
    assert info["cuda"] == _native.CUDA_COMPILED


@needs_native
@pytest.mark.parametrize("given", [{}, {"y": X, "z": X}, {"y": X, "inner": 1, "z": None}])
def test_a_kernel_takes_its_fields_and_no_others(given):
    """Catches a field that stays zero because its name is wrong or missing."""
    fields = {"x": X, "slice_stride": 3, "tangents": 0, "outer": 1, "width": 3, "log": False}
    message = "the fields must be x, y, slice_stride, tangents, outer, width, inner, log, got"
    with pytest.raises(ValueError, match=message):
        _native.call("dual_softmax", X, **fields, **given)


MADE_UP = SimpleNamespace(__version__="0.0.1")
BUILDS = {  # None: import then raises ImportError
    "built before use": (None, f"{_native.DISABLE_VARIABLE}=1"),
    f"of version {fisherfast.__version__}, got 0.0.1": (MADE_UP, "stale build"),
}


@pytest.mark.parametrize("message", BUILDS)
def test_missing_and_stale_builds(monkeypatch, message):
    module, advice = BUILDS[message]
    monkeypatch.delenv(_native.DISABLE_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "fisherfast._C", module)
    message = re.escape(f"fisherfast._C must be {message}")
    with pytest.raises(RuntimeError, match=message) as caught:
        _native.load()
    assert "Run `pip install .`" in str(caught.value)
    assert advice in str(caught.value)


def test_plain_pytorch_when_native_is_disabled(monkeypatch):
    """Catches an op that needs the module all the same."""
    monkeypatch.setenv(_native.DISABLE_VARIABLE, "1")
    monkeypatch.setattr(_native, "_C", _native.load())
    assert _native._C is None
    report = selfcheck.run_selfcheck()
    assert report.passed
    assert report.facts["native core"].startswith("not used")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_layering(path):
    """bindings.cpp -> ops -> core; no op includes another; Python in bindings.cpp alone."""
    allowed = {"core"}
    if path.parent.parent.name == "ops":
        op = path.name.removesuffix("".join(path.suffixes))
        folder = path.parent
        if not (folder / f"{op}.h").exists():  # op_way.simd.cpp, op_way.cuh
            op = op.rpartition("_")[0]
        allowed |= {f"ops/{folder.name}/{op}.h"}
        allowed |= {f"ops/{folder.name}/{part.name}" for part in folder.glob(f"{op}*.cuh")}
    if path.parent.name == "ops":  # all.h
        allowed |= {"ops"}
    if path.name == "bindings.cpp":
        allowed |= {"ops", "pybind11"}
    for name in INCLUDE.findall(path.read_text()):
        known = name in allowed or name.partition("/")[0] in allowed
        assert name != "Python.h"
        assert known or "/" not in name, name


def test_sources():
    """Catches a kernel that is not launched through the macro, and a library that prints or
    exits."""
    for path in SOURCES:
        text = path.read_text()
        assert path.suffix != ".cu" or "<<<" not in text, path
        assert not re.search(r"\b(printf|std::cout|std::cerr|abort|exit)\b", text), path


@pytest.mark.skipif(not WIDE or not shutil.which("nm"), reason="needs nm, and build/cmake as built")
def test_wide_instructions_stay_in_their_namespace():
    """Catches an inline function of a shared header in a source that is compiled for AVX2: the
    linker keeps one copy of it for all callers, which an older processor would then run."""
    for path in WIDE:
        done = subprocess.run(
            ["nm", "--defined-only", "-C", path], check=True, capture_output=True, text=True
        )
        symbols = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
        shared = [name for _, kind, name in symbols if kind in "TWi"]
        level = "avx2" if "fisherfast_avx2.dir" in path.parts else "avx512"
        assert shared
        assert [name for name in shared if f"fisherfast::{level}::" not in name] == [], path
