"""Replicated parameters: 2 to 8 processes do what one does, and share state and work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_cases import CASES, MAIN, Case, assert_close, build, tolerance_of, trajectory
from distributed_cases import run as run_case
from ranks import assert_equal_on_ranks, on_ranks
from torch import Tensor

QUICK = [*MAIN, "frozen", "l2", "kl-soap", "schedule-free", "momentum", "overlap", "waves, packed"]
"""For every run of the tests; the others are slow ones."""


def follow_all(names: list[str]) -> dict[str, list[list[Tensor]]]:
    """On each rank: step every case, and compare the ranks after every step."""
    return {name: follow(name, CASES[name]) for name in names}


def follow(name: str, case: Case) -> list[list[Tensor]]:
    params, optimizer = build(case)
    seen: list[list[Tensor]] = []

    def after_step(step: int, params: list[torch.nn.Parameter]) -> None:
        assert_equal_on_ranks(list(params), f"{name}, step {step}")
        seen.append([p.detach().clone() for p in params])

    run_case(case, params, optimizer, range(1, 10), after_step)
    return seen


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Tensor]]]:
    return on_ranks(2, tmp_path_factory.mktemp("two"), follow_all, QUICK)[0]


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_follow_one(name: str, two_ranks: dict[str, list[list[Tensor]]]) -> None:
    case = CASES[name]
    assert_close(name, two_ranks[name], trajectory(case), tolerance_of(case))


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_more_processes_follow_one(num_ranks: int, tmp_path: Path) -> None:
    for name, found in on_ranks(num_ranks, tmp_path, follow_all, list(CASES))[0].items():
        assert_close(name, found, trajectory(CASES[name]), tolerance_of(CASES[name]))
