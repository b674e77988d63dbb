"""On a GPU: the steps of the CPU, without waiting for the device, in the memory that is promised.

Run by `make test-gpu`. Everything else that the suite tests is tested on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES, Case, Parameters, assert_close, build, trajectory
from distributed_cases import run as run_case
from quadratic import assert_same, optimizer_for, parameters, run
from ranks import on_ranks
from solver_cases import BASIS_SOLVERS, SOLVERS
from test_distributed_sharded import follow
from test_surroundings import CASES as OPTIONS
from test_waves import largest_stack
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.models import workload_groups
from benchmarks.observation import observe
from shampoo_core import (
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    EighSolver,
    FixedRefresh,
    OrthogonalIterationSolver,
    ShampooConfig,
    StaggeredRefresh,
)
from shampoo_core.counting import OperationCounter

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""Largest difference in units of the largest number: sums have another order, and roots amplify that."""
STEPS = range(1, 8)


def on_gpu(params: Parameters) -> Parameters:
    return [nn.Parameter(p.detach().to(GPU), requires_grad=p.requires_grad) for p in params]


@contextmanager
def waits_raise() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def followed(case: Case) -> list[list[Tensor]]:
    params, optimizer = build(case, on_gpu)
    seen: list[list[Tensor]] = []

    def after_step(_: int, now: Parameters) -> None:
        seen.append([parameter.detach().to("cpu", copy=True) for parameter in now])

    run_case(case, params, optimizer, range(1, 10), after_step)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_takes_the_steps_of_the_cpu(name: str) -> None:
    case = CASES[name]
    assert_close(name, followed(case), trajectory(case), TOLERANCES[case.dtype])


@pytest.mark.parametrize("name", [name for name in OPTIONS if "lagged" not in name])
def test_every_solver_and_storage_does(name: str) -> None:
    # Every factor has full rank at the first refresh: rounding turns the bases of others, and those that
    # lagging methods make of their first gradient.
    options = OPTIONS[name] | (
        {"refresh": FixedRefresh(2, 4)} if "refresh" in OPTIONS[name] else {}
    )
    here, there = parameters(), on_gpu(parameters())
    run(optimizer_for(here, **copy.deepcopy(options)), here, STEPS)
    run(optimizer_for(there, **copy.deepcopy(options)), there, STEPS)
    for left, right in zip(here, there, strict=True):
        assert (left - right.cpu()).abs().max() <= 1e-8 * left.abs().max(), tuple(left.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_roots_are_those_of_the_cpu(solver: Any, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 96, 200, dtype=dtype)
    factors = torch.bmm(rows, rows.mT) / 200
    expected = solver.inverse_root(factors, 0.25).roots
    result = solver.inverse_root(factors.to(GPU), 0.25)
    assert result.accepted.all()
    assert (result.roots.cpu() - expected).abs().max() < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("side", [16, 33, 64, 256, 512, 513, 768])
def test_healthy_factors_need_no_fallback(side: int) -> None:
    """As in refreshes that must not wait: by Jacobi rotations none of side 128 to 512 would be accepted."""
    rows = torch.randn(3, side, 2 * side, device=GPU)
    factors = torch.bmm(rows, rows.mT) / (2 * side)
    solver = EighSolver(double_fallback=False)
    assert solver.inverse_root(factors, 0.25).accepted.all()
    basis = solver.basis(factors)
    assert basis.accepted.all()
    noise = torch.randn_like(rows)
    factors = 0.9 * factors + 0.1 * torch.bmm(noise, noise.mT) / (2 * side)
    torch.cuda.synchronize()
    with waits_raise():
        turned = OrthogonalIterationSolver(eigh_fallback=False).basis(factors, basis.eigenvectors)
    assert turned.accepted.all()
    error = turned.eigenvectors.mT @ turned.eigenvectors - torch.eye(side, device=GPU)
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("solver", BASIS_SOLVERS, ids=lambda solver: type(solver).__name__)
def test_bases_diagonalise(solver: Any) -> None:
    rows = torch.randn(3, 96, 200, device=GPU)
    factors = torch.bmm(rows, rows.mT) / 200
    result = solver.basis(factors)
    rotated = result.eigenvectors.mT @ factors @ result.eigenvectors
    assert (rotated - torch.diag_embed(result.eigenvalues)).abs().max() < 1e-4


def trained(config: Any, surroundings: AbstractContextManager[object]) -> list[nn.Parameter]:
    params = on_gpu(parameters([(200, 130), (130,), (64, 3, 3, 3)], dtype=torch.float32))
    with surroundings:
        optimizer = optimizer_for(
            params, max_block_size=128, preconditioner=config, refresh=FixedRefresh(2, 1)
        )
        run(optimizer, params, STEPS)
    return params


@pytest.mark.parametrize("config", [ShampooConfig(), EigenvalueCorrectedConfig()])
def test_autocast_has_no_effect(config: Any) -> None:
    autocast = torch.autocast(GPU, dtype=torch.bfloat16)
    # Reductions of some kernels are in no order of their own.
    assert_same(trained(config, autocast), trained(config, nullcontext()), 1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_tf32_does_not_reach_into_solvers(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(3, 96, 200, device=GPU)
    factors = torch.bmm(rows, rows.mT) / 200
    expected = solver.inverse_root(factors, 0.25).roots
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert not torch.equal(torch.bmm(rows, rows.mT) / 200, factors), "it reaches into products"
    torch.testing.assert_close(
        solver.inverse_root(factors, 0.25).roots, expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "exact polar factors"])
def test_a_plain_step_never_waits(name: str) -> None:
    options = OPTIONS[name]
    if "refresh" in options:
        options = options | {"refresh": FixedRefresh(4, 4)}
    params = on_gpu(parameters(dtype=torch.float32))
    optimizer = optimizer_for(params, **copy.deepcopy(options))
    run(optimizer, params, range(1, 6))  # a refresh is behind it
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    with waits_raise():
        optimizer.step()
        optimizer.step()


@pytest.mark.parametrize("config", [ShampooConfig(), EigenvalueCorrectedConfig()])
def test_a_step_takes_the_memory_and_kernels_that_are_counted(config: Any) -> None:
    """In whole waves: the workspaces of libraries come on top of what is counted."""
    groups = workload_groups("ogbg", config, GPU)
    optimizer = DistributedShampoo(groups, refresh=FixedRefresh(10**9, 1))
    for _ in range(3):
        optimizer.step()
    with OperationCounter() as counter:
        optimizer.step()
    seen = observe(optimizer.step, lambda: None, 1)
    parameters = [parameter for group in groups for parameter in group["params"]]
    whole = sum(parameter.nbytes for parameter in parameters)
    assert seen.peak <= max(4 * whole, 2 * 4 * largest_stack(optimizer))
    assert counter.num_kernels <= seen.kernels <= 1.25 * counter.num_kernels
    assert seen.waits == 0


@pytest.mark.parametrize("name", ["eigenvalue-corrected", "shampoo", "momentum"])
def test_checkpoints_cross_devices(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    finished = build(case, on_gpu)
    run_case(case, *finished, range(1, 10), lambda *_: None)
    for begin, go_on in ((on_gpu, list), (list, on_gpu)):
        params, optimizer = build(case, begin)
        run_case(case, params, optimizer, range(1, 6), lambda *_: None)
        torch.save([optimizer.state_dict(), [p.detach() for p in params]], tmp_path / "saved")
        state, weights = torch.load(tmp_path / "saved", map_location="cpu", weights_only=False)
        params, optimizer = build(case, go_on)
        optimizer.load_state_dict(state)
        with torch.no_grad():
            for parameter, weight in zip(params, weights, strict=True):
                parameter.copy_(weight)
        run_case(case, params, optimizer, range(6, 10), lambda *_: None)
        assert_close(name, [[p.cpu() for p in params]], [[p.cpu() for p in finished[0]]], 1e-9)


def test_a_hopeless_factor_leaves_its_neighbours_alone() -> None:
    """Also where a library reports what it could not decompose by an exception."""
    params = on_gpu(parameters([(8, 8), (8, 8)], dtype=torch.float32))
    optimizer = optimizer_for(params, refresh=StaggeredRefresh(2, 1))
    run(optimizer, params, range(1, 4))
    state = optimizer.state[params[0]]
    for name in [name for name in state if ".factors." in name]:
        state[name].fill_(torch.nan)
    run(optimizer, params, range(4, 8))
    assert torch.isfinite(params[1]).all()


def trained_by_nccl() -> dict[str, list[list[Tensor]]]:
    """One process in a group of NCCL's: DTensors on a mesh of GPUs."""
    mesh = init_device_mesh(GPU, (1,))
    names = ("l2", "two groups", "not finite", "waves")
    return {
        name: [[t.cpu() for t in now] for now in follow(CASES[name], mesh, "mixed")]
        for name in names
    }


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch has no NCCL")
def test_sharded_parameters_of_one_gpu_follow_the_cpu(tmp_path: Path) -> None:
    (found,) = on_ranks(1, tmp_path / "nccl", trained_by_nccl, backend="nccl")
    for name, seen in found.items():
        assert_close(name, seen, trajectory(CASES[name]), TOLERANCES[CASES[name].dtype])


def replicated_on_one_gpu() -> dict[str, list[list[Tensor]]]:
    """Two processes of gloo's that share a GPU, which NCCL refuses."""
    return {
        name: followed(CASES[name]) for name in ("staggered", "two groups", "waves", "not finite")
    }


def test_two_processes_on_a_gpu_follow_the_cpu(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path / "gloo", replicated_on_one_gpu):
        for name, seen in found.items():
            assert_close(name, seen, trajectory(CASES[name]), TOLERANCES[CASES[name].dtype])
