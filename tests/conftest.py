"""What every test gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Same random numbers in every run and order of tests, and none left to the next test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
