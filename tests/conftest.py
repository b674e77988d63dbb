"""What every test gets."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerator import imitate_an_accelerator
from hypothesis import settings

# How long an example takes says nothing on a machine that does other work as well.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Two workers share two cores: more threads each would only wait for one another.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those that want one, and from the processes that they start.

    The runner would give every process a GPU of its own, and a machine can have fewer than a test has
    processes.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `imitate_an_accelerator`."""
    imitate_an_accelerator(monkeypatch)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Same random numbers in every run and order of tests, and none left to the next test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
