"""Ranks that are killed at any moment: the others end, and the run goes on from its last checkpoint."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from quadratic import gradient, optimizer_for, parameters
from ranks import join, leave_process_group

from shampoo_core import DistributedShampoo, EigenvalueCorrectedConfig, StaggeredRefresh, WeightEMA

NUM_RANKS, STEPS, SAVE_EVERY = 2, 40, 5
MOMENTS = ("before the step", "while updates travel", "after the step", "while rank 0 saves")
OPTIONS: dict[str, Any] = {
    "refresh": StaggeredRefresh(4),
    "preconditioner": EigenvalueCorrectedConfig(),
    "averaging": WeightEMA(0.9),
    "lr": 0.01,
}
EXIT_SECONDS = 90.0
"""A rank that is left alone has to end by itself long before this."""


def train(rank: int, folder: Path, store: Path, death: tuple[int, int, str] | None) -> None:
    """Train to the end from the latest checkpoint, or be killed: (rank, step, moment)."""
    join(rank, NUM_RANKS, store, seconds=60)
    params = parameters()
    optimizer = optimizer_for(params, **OPTIONS)
    step = resume(folder, params, optimizer)
    while step < STEPS:
        step += 1
        moment = death[2] if death is not None and death[:2] == (rank, step) else ""
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, index)
        if moment == "before the step":
            die()
        if moment == "while updates travel":
            dist.all_gather_single = lambda *_, **__: die()  # type: ignore[attr-defined]
            dist.all_gather_into_tensor = lambda *_, **__: die()
        optimizer.step()
        if moment == "after the step":
            die()
        if step % SAVE_EVERY == 0:
            optimizer.eval()
            optimizer.gather_state()
            if rank == 0:
                save(folder, step, params, optimizer, die if moment else lambda: None)
            optimizer.train()
    torch.save([p.detach() for p in params], folder / f"final_{rank}")
    leave_process_group()


def save(
    folder: Path,
    step: int,
    params: list[torch.nn.Parameter],
    optimizer: DistributedShampoo,
    half_way: Callable[[], object],
) -> None:
    """Write a checkpoint beside the old one, and put it in its place when it is whole."""
    content = {
        "step": step,
        "weights": [p.detach() for p in params],
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, folder / "new")
    half_way()
    os.replace(folder / "new", folder / "checkpoint")


def resume(folder: Path, params: list[torch.nn.Parameter], optimizer: DistributedShampoo) -> int:
    if not (folder / "checkpoint").exists():
        return 0
    content = torch.load(folder / "checkpoint", weights_only=True)
    for parameter, weights in zip(params, content["weights"], strict=True):
        parameter.data.copy_(weights)
    optimizer.load_state_dict(content["optimizer"])
    optimizer.train()
    return int(content["step"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(folder: Path, number: int, death: tuple[int, int, str] | None) -> list[int | None]:
    """One start of all ranks; their exit codes."""
    context = get_context("forkserver")
    store = folder / f"store_{number}"
    ranks = [
        context.Process(target=train, args=(rank, folder, store, death))
        for rank in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + EXIT_SECONDS
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
def test_ten_deaths_leave_no_trace(tmp_path: Path) -> None:
    """Same bits at the end as without; whoever survives ends with an error, and nobody waits."""
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    assert attempt(undisturbed, 0, None) == [0, 0]
    choice = random.Random(6)
    for number in range(10):
        # The run gets no further than 5 steps beyond its last checkpoint, and further each time.
        step = min(STEPS, 3 * number + choice.randint(1, 5))
        moment = MOMENTS[number % len(MOMENTS)]
        rank = choice.randrange(NUM_RANKS)
        if moment == "while rank 0 saves":
            rank, step = 0, -(-step // SAVE_EVERY) * SAVE_EVERY
        step = max(step, saved_step(disturbed) + 1)
        if moment == "while rank 0 saves":
            step = -(-step // SAVE_EVERY) * SAVE_EVERY
        codes = attempt(disturbed, number, (rank, step, moment))
        assert codes[rank] == -signal.SIGKILL, (number, moment, codes)
        assert codes[1 - rank] not in (None, -signal.SIGKILL), (number, moment, codes)
    assert saved_step(disturbed) < STEPS
    assert attempt(disturbed, 10, None) == [0, 0]
    for rank in range(NUM_RANKS):
        expected = torch.load(undisturbed / f"final_{rank}")
        actual = torch.load(disturbed / f"final_{rank}")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def saved_step(folder: Path) -> int:
    path = folder / "checkpoint"
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else 0


def test_states_of_something_else_are_named(tmp_path: Path) -> None:
    """Nothing is changed, and the file is as it was."""
    params = parameters()
    optimizer = optimizer_for(params, **OPTIONS)
    before = [p.detach().clone() for p in params]
    foreign = torch.optim.AdamW(parameters()).state_dict()
    with pytest.raises(ValueError, match="not a state of this optimizer: it has no evaluates"):
        optimizer.load_state_dict(foreign)
    with pytest.raises(ValueError, match="it has nothing"):
        optimizer.load_state_dict({})
    for version in (1, 99):
        other = {**optimizer.state_dict(), "format_version": version}
        with pytest.raises(ValueError, match=f"format version {version}, this release reads 2"):
            optimizer.load_state_dict(other)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_state_saved_in_evaluation_needs_its_training_weights() -> None:
    params = parameters()
    optimizer = optimizer_for(params, **OPTIONS)
    for index, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 1, index)
    optimizer.step()
    optimizer.eval()
    state = optimizer.state_dict()
    without = {
        index: {key: entry for key, entry in entries.items() if key.startswith("block.")}
        for index, entries in state["state"].items()
    }
    with pytest.raises(ValueError, match="has no training weights; call train"):
        optimizer_for(parameters(), **OPTIONS).load_state_dict({**state, "state": without})
