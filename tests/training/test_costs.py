"""What the stored measurements of cost say, and that the guide quotes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SHARE_OF_AN_EPOCH = 0.08
SHARE_OF_A_STEP = 0.02
SHARE_OF_LARGE_IMAGES = 0.05
LARGE_IMAGES_SECONDS, LARGE_IMAGES_BYTES = 6 * 60, 4e9


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    stored = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())
    return {name: part["figures"] for name, part in stored.items()}


@pytest.fixture(scope="module")
def guide() -> str:
    return " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())


def test_a_monitor_is_cheap_enough_to_stay_on(results):
    """Catches results stored although they miss what is promised."""
    monitor, observe, images = (results[n] for n in ("monitor", "observe", "large_images"))
    assert monitor["training samples"] == 31 * 20_000
    assert monitor["held-out samples"] == 2 * 20_000
    assert monitor["share of an epoch"] <= SHARE_OF_AN_EPOCH
    assert observe["whole, share of a step"] <= SHARE_OF_A_STEP
    assert images["size"] == 512
    assert images["monitor_overhead"] <= SHARE_OF_LARGE_IMAGES
    assert images["seconds"] <= LARGE_IMAGES_SECONDS
    assert images["peak_bytes"] <= LARGE_IMAGES_BYTES


def test_the_guide_quotes_what_was_measured(results, guide):
    """Catches numbers in the text that are not those of the stored run."""
    monitor, observe, images = (results[n] for n in ("monitor", "observe", "large_images"))
    for quoted in (
        f"takes {monitor['measurement seconds']:.2f} s of an epoch of"
        f" {monitor['epoch seconds']:.1f} s, {100 * monitor['share of an epoch']:.1f} %",
        f"`observe` {100 * observe['inside observe, share of a step']:.1f} % of a training step of"
        f" {1e3 * observe['step seconds']:.1f} ms, {100 * observe['whole, share of a step']:.1f} %",
        f"took {images['seconds']:.0f} seconds: {images['training']['seconds']:.0f} for",
        f"{images['images_per_second']:.0f} pictures a second and"
        f" {images['images_per_second_monitored']:.0f} with the monitor"
        f" ({100 * images['monitor_overhead']:.1f} %), {images['flow_seconds']:.0f} for the flow",
        f"at most {images['peak_bytes'] / 1e9:.2f} GB of resident memory",
    ):
        assert quoted in guide


def test_the_guide_quotes_the_bounds_of_large_images(results, guide):
    """The table of bounds and errors; catches columns in another order or unit."""
    images = results["large_images"]

    def row(values: list[float]) -> str:
        digits = (3, 3, 4 if abs(values[2]) < 0.02 else 3, 3)
        units = (" px", " px", "°", " px")
        cells = [
            f"{value:.{d}f}{unit}" for value, d, unit in zip(values, digits, units, strict=True)
        ]
        return "| " + " | ".join(cells).replace("-", "\N{MINUS SIGN}") + " |"

    for name in ("crlb_closed_form", "crlb_input", "crlb_output", "rms_error", "bias"):
        assert row(images[name]) in guide, name
