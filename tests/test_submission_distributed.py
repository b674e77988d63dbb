"""The submission on two processes: the loss of the whole batch, and equal weights on all ranks."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from toy_workload import Run, ToyWorkload, namespace

from shampoo_core.refresh import FactorStackSize
from submission.data_parallel import Wrapper
from submission.objective import averaged_over_ranks, mean_loss, world_size
from submission.refresh_cost import RefreshCost
from workloads_smoke.distributed import leave_process_group

NUM_RANKS = 2
NUM_VALID = (7, 2)  # valid examples per rank: the mean of means would be wrong


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    """Return a rank's eight examples, of which `NUM_VALID[rank]` count."""
    batch = next(ToyWorkload().batches(size=8, seed=rank))
    batch["weights"] = (torch.arange(8) < NUM_VALID[rank]).float()
    return batch


def linear_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def measured_interval(refresh_seconds: float) -> int:
    """What a rank decides on that sees each of eight shares of a refresh take so long."""
    now, sizes = 0.0, (FactorStackSize(8 * world_size(), 600),)
    cost = RefreshCost(8, 10_000, torch.device("cpu"))
    with mock.patch("submission.refresh_cost.time.perf_counter", lambda: now):
        for step in range(1, 60):
            cost.begin(step)
            cost.begin_update(step)
            now += 1.0 + (refresh_seconds if cost.policy.due(step, sizes) else 0.0)
            cost.end(step)
    return cost.policy.interval


def statistics_of_batches(run: Run) -> torch.Tensor:
    """Mean and variance of what batch norm sees of this rank's batches, means over batches."""
    batches = run.state["recent_batches"].kept().batches
    with torch.no_grad():
        seen = [run.model.module.conv(batch["inputs"]) for batch in batches]
    found = [torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3))]) for x in seen]
    return torch.stack(found).mean(0)


def on_each_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=NUM_RANKS)
    outcome: dict[str, Any] = {}

    # The harness hands over a bare module after a resume.
    wrapper = Wrapper(linear_model())
    model = wrapper.wrapped(linear_model())
    outcome["is_wrapped"] = isinstance(model, DistributedDataParallel)
    outcome["is_wrapped_once"] = wrapper.wrapped(model) is model
    first = DistributedDataParallel(linear_model(), find_unused_parameters=True)
    again = Wrapper(first).wrapped(first.module)
    assert isinstance(again, DistributedDataParallel)
    outcome["keeps_options"] = again.find_unused_parameters and not again.static_graph
    compiled: Any = torch.compile(first)  # as some workloads hand it over
    bare = Wrapper(compiled).wrapped(first.module)
    assert isinstance(bare, DistributedDataParallel)
    outcome["looks_behind_compilation"] = (
        Wrapper(compiled).wrapped(compiled) is compiled and bare.find_unused_parameters
    )
    batch = batch_of(rank)
    loss = mean_loss(ToyWorkload(), batch, model(batch["inputs"]), 0.1)
    loss.backward()
    outcome["gradients"] = gradients(model)
    outcome["loss"] = averaged_over_ranks(loss.detach())

    outcome["interval"] = measured_interval(refresh_seconds=0.04 if rank == 0 else 0.3)

    outcome["sharing"] = RefreshCost(8, 10_000, torch.device("cpu")).policy.ranks

    run = Run(namespace(averaging="weight_ema"), step_hint=40)
    run.model.bn.momentum = 1e-3  # all batches count alike
    run.queue = run.workload.batches(seed=rank + 10)
    run.train(6)
    run.prepare_for_eval()
    outcome["evaluated"] = run.weights()
    outcome["statistics"] = [buffer.clone() for buffer in run.model.buffers()]
    outcome["of_batches"] = statistics_of_batches(run)
    run.train(1)
    outcome["trained"] = run.weights()
    torch.save(outcome, folder / f"rank_{rank}")
    leave_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(on_each_rank, (folder,), nprocs=NUM_RANKS)
    return [torch.load(folder / f"rank_{rank}") for rank in range(NUM_RANKS)]


def test_gradient_is_that_of_the_mean_over_all_valid_examples(
    outcomes: list[dict[str, Any]],
) -> None:
    batches = [batch_of(rank) for rank in range(NUM_RANKS)]
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    model = copy.deepcopy(linear_model())
    loss = mean_loss(ToyWorkload(), whole, model(whole["inputs"]), 0.1)
    loss.backward()
    for outcome in outcomes:
        torch.testing.assert_close(outcome["gradients"], gradients(model), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(outcome["loss"], loss.detach())


def test_a_bare_module_is_wrapped_once_and_as_at_first(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert outcome["is_wrapped"]
        assert outcome["is_wrapped_once"]
        assert outcome["keeps_options"]
        assert outcome["looks_behind_compilation"]


def test_ranks_refresh_alike_though_they_measure_otherwise(outcomes: list[dict[str, Any]]) -> None:
    """The slowest is who all wait for; the other one, alone, would have halved the interval."""
    assert [outcome["interval"] for outcome in outcomes] == [16, 16]
    assert measured_interval(refresh_seconds=0.04) == 4
    assert [outcome["sharing"] for outcome in outcomes] == [NUM_RANKS, NUM_RANKS]


@pytest.mark.parametrize("weights", ["trained", "evaluated", "statistics"])
def test_ranks_agree_bit_for_bit(outcomes: list[dict[str, Any]], weights: str) -> None:
    first, second = (outcome[weights] for outcome in outcomes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_statistics_are_of_the_batches_of_all_ranks(outcomes: list[dict[str, Any]]) -> None:
    expected = (outcomes[0]["of_batches"] + outcomes[1]["of_batches"]) / 2
    mean, variance, _ = outcomes[1]["statistics"]
    torch.testing.assert_close(torch.stack([mean, variance]), expected, rtol=1e-2, atol=1e-3)
    apart = (outcomes[0]["of_batches"] - expected).abs() / expected.abs().clamp_min(0.1)
    assert apart.max() > 0.03


def test_one_process_is_left_alone() -> None:
    model = linear_model()
    assert Wrapper(model).wrapped(model) is model
