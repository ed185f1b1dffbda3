"""The instruction sets of the CPU kernels: chosen when fisherfast is imported, all of them right.

Each case runs in a process of its own: FISHERFAST_SIMD is read once.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisherfast import _native, ops
from fisherfast.ops import reference, reference_dual, selfcheck

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "FISHERFAST_SIMD"
LEVELS = ["baseline", "avx2", "avx512"]
# What the processor must have at least, as Linux names it.
FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-14}

pytestmark = pytest.mark.skipif(
    _native.load() is None,
    reason="FISHERFAST_DISABLE_NATIVE=1 is set: there are no kernels to choose from",
)


def available():
    return _native.build_info()["simd_available"]


def run(code, level=None):
    """A new process with FISHERFAST_SIMD = level, or without it."""
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"OMP_NUM_THREADS": "1"}
    if level is not None:
        environment[VARIABLE] = level
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def build_info(level=None, before="", after=""):
    """build_info of a new process, with a line of code before and after the import."""
    lines = ["import json, os", before, "from fisherfast import _native", after]
    done = run("\n".join([*lines, "print(json.dumps(_native.build_info()))"]), level)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(level):
    """The message of `import fisherfast` for a level that it cannot use."""
    done = run("import fisherfast", level)
    assert done.returncode == 1, (done.returncode, done.stderr)
    start = done.stderr.rfind(f"RuntimeError: {VARIABLE} must ")
    assert start >= 0, done.stderr
    return done.stderr[start:]


# --- the choice ----------------------------------------------------------------------------------


def test_available_levels_are_named_best_last():
    levels = available()
    assert isinstance(levels, list)
    assert levels[0] == "baseline"
    assert [level for level in LEVELS if level in levels] == levels


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the flags there")
def test_available_levels_are_those_of_the_machine():
    """Catches a list of what was compiled instead: an illegal instruction elsewhere."""
    text = Path("/proc/cpuinfo").read_text()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    for level in available()[1:]:
        assert FLAGS[level] <= set(flags.split()), level


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX is of x86 only")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the flags there")
def test_avx2_is_used_where_it_is():
    """Catches a build without the fast kernels, on a machine that has them."""
    text = Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    if not FLAGS["avx2"] <= flags:
        pytest.skip("this machine has no AVX2")
    assert "avx2" in available()


def test_the_best_one_is_the_default():
    assert build_info()["simd"] == available()[-1]


@pytest.mark.parametrize("level", LEVELS)
def test_the_variable_chooses(level):
    """Catches a variable that is read and not obeyed, or obeyed where it cannot be."""
    if level not in available():
        pytest.skip(f"this machine has no {level}")
    info = build_info(level)
    assert info["simd"] == level
    assert info["simd_available"] == available()


def test_the_variable_is_read_at_import():
    """Set before the import it counts, set later it does not."""
    early = build_info(before="os.environ['FISHERFAST_SIMD'] = 'baseline'")
    assert early["simd"] == "baseline"
    late = build_info(after="os.environ['FISHERFAST_SIMD'] = 'baseline'")
    assert late["simd"] == available()[-1]


@pytest.mark.parametrize("level", ["avx1024", "AVX2 ", "sse2", "0", "best"])
def test_unknown_levels_are_an_error(level):
    """At import, not at the first op; it names the variable, the value and the choices."""
    message = refusal(level)
    assert level in message
    for choice in available():
        assert choice in message


def test_levels_that_the_machine_lacks_are_an_error():
    """Catches a crash by an illegal instruction, and a silent fall-back."""
    missing = [level for level in LEVELS if level not in available()]
    if not missing:
        pytest.skip("this machine has every level")
    for level in missing:
        message = refusal(level)
        assert level in message
        for choice in available():
            assert choice in message


# --- the kernels of each level -------------------------------------------------------------------


def normal(*shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(got, expected, dtype):
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    error = (got.double() - expected.double()).abs().max() / scale
    assert error <= TOLERANCE[dtype], float(error)


def same_bits_for_threads(function):
    """The results, after a look at 1, 2 and 3 threads."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(function())
    torch.set_num_threads(1)
    for other in results[1:]:
        for left, right in zip(other, results[0], strict=True):
            assert torch.equal(left, right)
    return results[0]


def check_fisher_solve(dtype):
    for count, dim, params in ((1, 1, 1), (17, 5, 2), (33, 16, 3), (9, 33, 1), (3, 130, 17)):
        samples = normal(count, dim, 2 * dim + 3, dtype=dtype)
        cov, deriv = samples @ samples.mT, normal(count, dim, params, dtype=dtype)

        def solve(cov=cov, deriv=deriv):
            details = ops.fisher_solve_details(cov, deriv, ridge=2.0**-13, inverse_rows=True)
            return details[:5]

        got = same_bits_for_threads(solve)
        truth = reference.fisher_solve(cov.double(), deriv.double(), 2.0**-13, True)
        for left, right in zip(got, truth, strict=False):
            assert_close(left, right, dtype)


def check_moments(dtype):
    for rows, dim in ((1, 1), (1030, 17), (333, 64)):
        x = normal(rows, dim, dtype=dtype)
        group, pilot = torch.arange(rows) % 3, normal(dim, dtype=dtype)

        def run_moments(x=x, group=group, pilot=pilot):
            return ops.moments(x, group, 3, pilot=pilot)

        truth = reference.moments(x, group, 3, pilot)
        for left, right in zip(same_bits_for_threads(run_moments), truth, strict=True):
            assert_close(left, right, dtype)


def check_lift(dtype):
    for rows, dim in ((1, 1), (1030, 33)):
        inputs = (
            normal(rows, dim, dtype=dtype),
            normal(dim, dtype=dtype),
            normal(dim, dtype=dtype),
        )
        truth = reference.lift(*(t.double() for t in inputs), 0.75, 4, 1)

        def run_lift(inputs=inputs):
            return ops.lift(*inputs, slope=0.75, num_groups=4, first=1)

        for left, right in zip(same_bits_for_threads(run_lift), truth, strict=True):
            assert_close(left, right, dtype)


def check_spatial_moments(dtype):
    for shape in ((1, 1, 1, 1), (130, 17, 3, 11), (40, 3, 4, 4)):
        x, pilot = normal(*shape, dtype=dtype), normal(*shape[1:], dtype=dtype)
        centred = (x - pilot).double()
        cross = torch.einsum("nahw,nbhw->hwab", centred, centred)
        truth = (centred.sum(0).permute(1, 2, 0), cross)
        for layout in (x, x.contiguous(memory_format=torch.channels_last), x[..., ::1]):

            def run_spatial(layout=layout, pilot=pilot):
                return ops.spatial_moments(layout, pilot=pilot)

            for left, right in zip(same_bits_for_threads(run_spatial), truth, strict=True):
                assert_close(left, right, dtype)


def check_gradient_gram(dtype):
    for n, columns, positions, inputs, outputs in ((1, 1, 1, 1, 1), (5, 3, 37, 19, 11)):
        a, b = normal(n, positions, inputs, dtype=dtype), normal(n, positions, outputs, dtype=dtype)
        b = torch.stack([(c + 1) * b.roll(c, 0) for c in range(columns)], 1)
        gradients = torch.einsum("itd,ictm->icmd", a.double(), b.double()).flatten(2)
        truth = torch.einsum("icp,jep->icje", gradients, gradients)

        def run_gram(a=a, b=b):
            return [ops.gradient_gram(a, b)]

        assert_close(same_bits_for_threads(run_gram)[0], truth, dtype)


def check_gradient_squares(dtype):
    for shape, outputs in (((1, 1, 1, 1), 1), ((70, 6, 5, 7), 34), ((3, 4, 20, 30), 150)):
        x, g = normal(*shape, dtype=dtype), normal(shape[0], outputs, *shape[2:], dtype=dtype)
        truth = reference.gradient_squares(x.double(), g.double(), (3, 1), padding=(1, 0))
        for memory in (torch.contiguous_format, torch.channels_last):
            pair = [part.contiguous(memory_format=memory) for part in (x, g)]

            def run_squares(pair=pair):
                return [ops.gradient_squares(*pair, (3, 1), padding=(1, 0))]

            assert_close(same_bits_for_threads(run_squares)[0], truth, dtype)


def check_patch_moments(dtype):
    for shape, stride, groups in (
        ((1, 1, 3, 3), 1, 1),
        ((5, 17, 9, 21), 2, 1),
        ((3, 4, 9, 35), 1, 2),
    ):
        x = normal(*shape, dtype=dtype)
        geometry = ((3, 3), (stride, stride), (1, 1), (1, 1))
        truth = reference.patch_moments(x, *geometry, groups)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):

            def run_patches(layout=layout, geometry=geometry, groups=groups):
                kernel, stride, padding, _ = geometry
                return ops.patch_moments(
                    layout, kernel, stride=stride, padding=padding, groups=groups
                )

            for left, right in zip(same_bits_for_threads(run_patches), truth, strict=True):
                assert_close(left, right, dtype)


def check_lift_moments(dtype):
    for rows, dim, lifted in ((1, 1, 1), (517, 10, 63), (100, 33, 100)):
        z, weight = normal(rows, dim, dtype=dtype), normal(lifted, dim, dtype=dtype) / dim**0.5
        bias, pilot = normal(lifted, dtype=dtype), normal(lifted, dtype=dtype)
        before = z.double() @ weight.double().T + bias.double()
        lift = torch.nn.functional.leaky_relu(before, 0.75) - pilot.double()
        whole = torch.cat([z.double(), lift], 1)
        offsets = torch.tensor([0, rows // 5, rows // 2, rows // 2, rows])
        even, odd = whole.tensor_split([rows // 2])
        truth = torch.stack([half.T @ half for half in (even, odd)]).tril()
        folds = whole.tensor_split(offsets[1:-1])
        sums = torch.stack([folds[segment].sum(0) for segment in (0, 2, 1, 3)])
        size = dim + lifted

        def run_lift_moments(size=size, arguments=(z, weight, bias, pilot), offsets=offsets):
            sums = torch.zeros(4, size, dtype=torch.float64)
            cross = torch.zeros(2, size, size, dtype=torch.float64)
            ops.lift_moments_(sums, cross, *arguments, offsets=offsets, slope=0.75)
            return sums, cross

        got = same_bits_for_threads(run_lift_moments)
        assert_close(got[0], sums, dtype)
        assert_close(got[1], truth, dtype)


def check_dual_norm(dtype):
    for width, channels in ((1, 1), (19, 19), (700, 10)):
        x = normal(6, 9, width, dtype=dtype)
        vectors = (normal(channels, dtype=dtype), normal(channels, dtype=dtype))
        inner = width // channels

        def run_norm(x=x, vectors=vectors, inner=inner):
            return [ops.dual_norm(x, *vectors, eps=0.125, inner=inner)]

        wide = (v.double() for v in (x, *vectors))
        truth = reference_dual.dual_norm(*wide, 0.125, 1, inner)
        assert_close(same_bits_for_threads(run_norm)[0], truth, dtype)


def check_dual_softmax(dtype):
    for shape in ((1, 1, 1), (6, 19, 35), (10, 3, 130)):
        x = 10 * normal(*shape, dtype=dtype)
        for dim, log in ((1, False), (1, True), (2, False), (2, True)):

            def run_softmax(x=x, dim=dim, log=log):
                return [ops.dual_softmax(x, dim, log=log)]

            truth = reference_dual.dual_softmax(x.double(), dim, log)
            assert_close(same_bits_for_threads(run_softmax)[0], truth, dtype)


def check_dual_pool(dtype):
    for stride in (1, 2, 3):
        x = normal(10, 2, 21, 7, 75, dtype=dtype)
        window = ([3, 2], [stride, stride], [1, 1], [1, 2])
        truth = reference_dual.dual_pool(x, *window)
        for layout in (x, x.movedim(2, -1).contiguous().movedim(-1, 2)):

            def run_pool(layout=layout, window=window):
                return [ops.dual_pool(layout, *window)]

            assert torch.equal(same_bits_for_threads(run_pool)[0], truth)


def check_all():
    """Run by the tests below in a process that has chosen a level."""
    torch.set_num_threads(1)
    report = selfcheck.run_selfcheck()
    assert report.passed, selfcheck.format_report(report)
    for dtype in (torch.float32, torch.float64):
        check_fisher_solve(dtype)
        check_moments(dtype)
        check_lift(dtype)
        check_spatial_moments(dtype)
        check_gradient_gram(dtype)
        check_gradient_squares(dtype)
        check_patch_moments(dtype)
        check_lift_moments(dtype)
        check_dual_norm(dtype)
        check_dual_softmax(dtype)
        check_dual_pool(dtype)


@pytest.mark.parametrize("level", LEVELS)
def test_every_op_at_every_level(level):
    """Catches a kernel that is right at one width of vectors only."""
    if level not in available():
        pytest.skip(f"this machine has no {level}")
    lines = [
        "import runpy",
        "from fisherfast import _native",
        f"assert _native.build_info()['simd'] == {level!r}",
        f"runpy.run_path({str(Path(__file__))!r})['check_all']()",
        "print('right')",
    ]
    done = run("\n".join(lines), level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("right\n")
