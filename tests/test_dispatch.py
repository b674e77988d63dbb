"""Counts that decide speed on a GPU: operations, host synchronisations, compiled graphs, bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quadratic import optimizer_for, parameters, run

from benchmarks.counts import MIB, PEERS, PLAIN_LIMITS, REFRESH_SHARE, STATE_LIMITS, THEIRS
from shampoo_core import (
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    ShampooConfig,
    StaggeredRefresh,
)
from shampoo_core.counting import OperationCounter
from shampoo_core.solvers import eigh

DATA = Path(__file__).parent / "data"
pytestmark = pytest.mark.usefixtures("as_on_an_accelerator")
SHAPES = json.loads((DATA / "algoperf_param_shapes.json").read_text())


def model(workload: str, device: str = "meta") -> list[torch.nn.Parameter]:
    """Parameters of the official shapes with gradients; on "meta" operations cost nothing."""
    params = []
    for _, shape, _ in SHAPES[workload]["params"]:
        parameter = torch.nn.Parameter(torch.zeros(shape, device=device))
        parameter.grad = torch.randn(shape, device=device)
        params.append(parameter)
    return params


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors; blocks are views that do not overlap."""
    return sum(
        tensor.numel() * tensor.element_size()
        for entries in optimizer.state.values()
        for tensor in entries.values()
    )


@pytest.mark.parametrize("workload", PLAIN_LIMITS)
@pytest.mark.parametrize("vectors", [False, True])
def test_steps_dispatch_few_operations_and_only_a_refresh_waits(
    workload: str, vectors: bool
) -> None:
    config = ShampooConfig(precondition_vectors=vectors)
    optimizer = DistributedShampoo(
        model(workload), betas=(0.9, 0.99), preconditioner=config, refresh=FixedRefresh(10, 2)
    )
    optimizer.step()
    with OperationCounter() as refresh:
        optimizer.step()
    with OperationCounter() as plain:
        optimizer.step()
    assert plain.num_synchronisations == 0
    assert plain.num_operations <= PLAIN_LIMITS[workload][vectors]
    assert plain.num_kernels <= 2.5 * plain.num_operations
    assert plain.num_operations < PEERS[workload][THEIRS]["plain_step_ops"] / 10
    # Once for every 2^27 numbers of factors, of which all models but one have fewer.
    assert refresh.num_synchronisations == (2 + vectors if workload == "wmt" else 1)
    assert refresh.num_operations <= PEERS[workload][THEIRS]["refresh_step_ops"] / REFRESH_SHARE


def test_counts_on_meta_are_those_of_a_real_step() -> None:
    """But for copies from the host to the device, which a CPU does not need."""
    counted: dict[str, list[Any]] = {"meta": [], "cpu": []}
    for device, steps in counted.items():
        params = model("mnist", device)
        optimizer = DistributedShampoo(
            params, betas=(0.9, 0.99), refresh=FixedRefresh(10, 2), max_wave_numel=None
        )
        for _ in range(3):
            with OperationCounter() as ops:
                optimizer.step()
            counts = ops.counts
            del counts["aten::_to_copy"]
            steps.append((counts, ops.flops))
    assert counted["meta"] == counted["cpu"]


@pytest.mark.parametrize(
    ("workload", "dense", "packed"),
    [(workload, *limits) for workload, limits in STATE_LIMITS.items()],
)
def test_state_is_small(workload: str, dense: float, packed: float) -> None:
    theirs = PEERS[workload][THEIRS]["state_MB"] * MIB
    for storage, limit in (("dense", dense), ("packed", packed)):
        params = model(workload)
        for parameter in params:
            parameter.grad = None
        config = ShampooConfig(storage=storage)  # type: ignore[arg-type]
        assert state_bytes(DistributedShampoo(params, preconditioner=config)) <= limit * theirs


@pytest.mark.parametrize(
    "preconditioner",
    [
        ShampooConfig(),
        ShampooConfig(storage="packed", statistics_interval=2),
        ShampooConfig(storage="4bit"),
        EigenvalueCorrectedConfig(storage="8bit"),
        EigenvalueCorrectedConfig(),
        KLShampooConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_method_waits_only_at_refreshes(preconditioner: Any) -> None:
    waits = waits_of_ten_steps(preconditioner, FixedRefresh(4, 2))
    if preconditioner.solver.warm_starts:  # the second refresh asks which factors have a basis, too
        assert waits[3] == 2
        waits[3] = 1
    assert waits_only_at(refreshes=[2, 4, 8], waits=waits)


@pytest.mark.parametrize(
    "preconditioner",
    [
        ShampooConfig(),
        EigenvalueCorrectedConfig(),
        EigenvalueCorrectedConfig(solver=OrthogonalIterationSolver()),
        PerFactorCorrectedConfig(),
        KLShampooConfig(),
        KLSOAPConfig(),
    ],
    ids=lambda config: f"{type(config).__name__}-{type(config.solver).__name__}",
)
def test_an_adaptive_refresh_waits_once_for_test_and_solution(preconditioner: Any) -> None:
    waits = waits_of_ten_steps(preconditioner, AdaptiveRefresh(4, 2, threshold=0.01))
    assert waits_only_at(refreshes=[2, 4, 8], waits=waits)
    assert sum(waits) == 3


@pytest.mark.parametrize("config", [ShampooConfig(), EigenvalueCorrectedConfig()])
def test_what_failed_unasked_falls_back_at_the_next_adaptive_refresh(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_in_single_precision(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(matrices)
        if matrices.dtype == torch.float32:
            values, vectors = values + float("nan"), vectors + float("nan")
        return values, vectors

    monkeypatch.setattr(eigh, "decompose", fails_in_single_precision)
    (weight,) = params = [torch.nn.Parameter(torch.randn(8, 6))]
    refresh = AdaptiveRefresh(4, 2, threshold=0.0001)
    optimizer = DistributedShampoo(params, preconditioner=config, refresh=refresh)
    counts, waits = [], []
    for _ in range(4):
        weight.grad = torch.randn(8, 6)
        with OperationCounter() as ops:
            optimizer.step()
        state = optimizer.state[weight]
        counts.append([int(state[f"block.0.0.{name}.axis0"]) for name in ("refreshes", "failures")])
        waits.append(ops.num_synchronisations > 1)
    assert counts == [[0, 0], [0, 1], [0, 1], [1, 1]]
    assert waits == [False, False, False, True]
    assert torch.isfinite(weight).all()


def waits_of_ten_steps(preconditioner: Any, refresh: Any) -> list[int]:
    """Host synchronisations of each step."""
    params = parameters()
    optimizer = optimizer_for(params, preconditioner=preconditioner, refresh=refresh)
    waits = []
    for step in range(1, 11):
        with OperationCounter() as ops:
            run(optimizer, params, range(step, step + 1))
        waits.append(ops.num_synchronisations)
    return waits


def waits_only_at(refreshes: list[int], waits: list[int]) -> bool:
    return all(
        count <= (1 if step in refreshes else 0) for step, count in enumerate(waits, start=1)
    )


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_packed_storage_changes_nothing_but_memory(storage: str) -> None:
    options: dict[str, Any] = {"refresh": StaggeredRefresh(4)}
    ours, expected = parameters(), parameters()
    first = optimizer_for(ours, preconditioner=ShampooConfig(storage=storage), **options)  # type: ignore[arg-type]
    second = optimizer_for(expected, preconditioner=ShampooConfig(), **options)
    run(first, ours, range(1, 15))
    run(second, expected, range(1, 15))
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def test_warm_started_roots_agree_with_exact_ones() -> None:
    ours, expected = parameters(), parameters()
    options: dict[str, Any] = {"refresh": FixedRefresh(2, 6), "betas": (0.9, 0.99)}
    warm = ShampooConfig(solver=OrthogonalIterationSolver(max_iterations=40), rank_tolerance=1e-6)
    first = optimizer_for(ours, preconditioner=warm, **options)
    second = optimizer_for(expected, preconditioner=ShampooConfig(rank_tolerance=1e-6), **options)
    run(first, ours, range(1, 21))
    run(second, expected, range(1, 21))
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-3)


def test_compiled_steps_reuse_their_graphs() -> None:
    """After two intervals every kind of step has been seen: the third compiles nothing.

    As functional graphs, in which tensors that share memory are told apart, as by the default backend.
    Torch 2.5 compiles any function anew for every new value of a float that it reads, which its own
    optimizers avoid by a learning rate in a tensor; there the learning rate has to stand still.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    torch_reads_floats = torch.__version__ >= torch.torch_version.TorchVersion("2.6")
    shapes = [(8, 12), (12, 8)]
    plain, params = (parameters(shapes, dtype=torch.float32) for _ in range(2))
    optimizers = [optimizer_for(held, refresh=FixedRefresh(3)) for held in (plain, params)]
    step = torch.compile(optimizers[1].step, backend="aot_eager")
    graphs = []
    for number in range(1, 10):
        if torch_reads_floats:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.01 / number
        for held in (plain, params):
            for index, parameter in enumerate(held):
                parameter.grad = torch.full_like(parameter, 0.1 * (index + number))
        optimizers[0].step()
        step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[5], graphs
    for left, right in zip(params, plain, strict=True):
        torch.testing.assert_close(left, right)


def test_kernels_are_one_for_a_list_that_fits_together_and_else_one_for_each() -> None:
    """By the rules of torch's fused path, of which a CPU has none: lists of 5 tensors."""
    matrices = [torch.ones(3, 4) for _ in range(5)]
    more = [torch.ones(3, 4) for _ in range(5)]
    cases: list[tuple[list[torch.Tensor], int]] = [
        (more, 1),
        ([torch.ones(4, 3).mT for _ in range(5)], 5),  # other strides
        ([*more[:4], torch.ones(4, 3).mT], 5),  # one suffices
        ([torch.ones(3, 8)[:, :4] for _ in range(5)], 5),  # gaps
        ([torch.ones(1, 1) for _ in range(5)], 5),  # broadcast
        ([one.double() for one in more], 5),
    ]
    for others, expected in cases:
        with OperationCounter() as counter:
            torch._foreach_add_(matrices, others)
        assert counter.num_kernels == expected
    many = [torch.ones(2) for _ in range(130)]
    large = [torch.ones(65536 * 321, device="meta")]
    one = torch.ones(3)
    with OperationCounter() as counter:
        torch._foreach_mul(many, 2.0)  # 64 at a time, for the results are a list too
        torch._foreach_mul_(large, 2.0)  # 320 chunks at a time
        torch.empty(3)
        one.add_(1.0)
    assert [operation.num_kernels for operation in counter.operations] == [3, 2, 0, 1]
