"""What all tests of training share."""

from __future__ import annotations

import pytest
from support.theta_batches import generator


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same batches."""
    generator.manual_seed(0)
