"""Real training on several processes: the submission under DDP and its checkpoints, and FSDP2."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from toy_workload import Run, namespace

from shampoo_core import (
    DistributedShampoo,
    ScheduleFree,
    StaggeredRefresh,
)
from submission import submission
from workloads_smoke.registry import load_workload

TARGET = 0.795
STEPS, EVALUATE_EVERY, BATCH = 120, 5, 256
HYPERPARAMETERS = namespace(averaging="weight_ema")


def accuracies() -> list[float]:
    """Validation accuracies of evaluated weights, every few steps."""
    if dist.is_initialized():
        os.environ.update(LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    workload = load_workload("mnist")
    model, model_state = workload.init_model_fn([3, 4])
    state = submission.init_optimizer_state(workload, model, model_state, HYPERPARAMETERS, [5, 6])
    queue = workload._build_input_queue([1, 2], "train", "", BATCH)
    found = []
    for step in range(STEPS):
        arguments = {
            "workload": workload,
            "current_param_container": model,
            "current_params_types": workload.model_params_types,
            "model_state": model_state,
            "hyperparameters": HYPERPARAMETERS,
            "loss_type": workload.loss_type,
            "optimizer_state": state,
            "eval_results": [],
            "global_step": step,
            "rng": [step, 7],
        }
        state, model, model_state = submission.update_params(**arguments, batch=next(queue))
        if (step + 1) % EVALUATE_EVERY == 0:
            arguments |= {"optimizer_state": state, "model_state": model_state}
            state, model, model_state = submission.prepare_for_eval(**arguments)
            metrics = workload._eval_model_on_split(
                "validation", workload.num_validation_examples, 300, model, model_state, [8, 9], ""
            )
            found.append(metrics["accuracy"])
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
def test_two_processes_reach_the_target_in_the_steps_of_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one = accuracies()
    two = on_ranks(2, tmp_path, accuracies)
    assert two[0] == two[1]
    first = [next(i for i, a in enumerate(run) if a >= TARGET) for run in (one, two[0])]
    assert first[0] == first[1]
    # Gradients are rounded in another order, and eigenvectors of equal eigenvalues follow the rounding.
    assert two[0] == pytest.approx(one, abs=0.01)


def resumed() -> tuple[list[Tensor], list[Tensor]]:
    """On each rank: restore what rank 0 alone saved after an evaluation, and train on."""
    setting = namespace(averaging="weight_ema", refresh_interval=3)
    run = Run(setting, step_hint=40)
    run.train(7)
    run.prepare_for_eval()
    box = [_in_file(_bare(run.checkpoint()))]
    dist.broadcast_object_list(box, src=0)
    other = Run(setting, step_hint=40)
    saved = torch.load(io.BytesIO(box[0]), weights_only=True)
    assert saved["state"]["optimizer"]["complete"]
    other.resume(saved)
    run.train(5)
    other.train(5)
    return run.weights(), other.weights()


def _bare(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Weights by the names that a fresh model has; the harness takes the wrapper off too."""
    weights = {key.removeprefix("module."): value for key, value in checkpoint["model"].items()}
    return {**checkpoint, "model": weights}


def _in_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_what_rank_zero_saves_alone_restores_both_ranks(tmp_path: Path) -> None:
    for gone_on, restored in on_ranks(2, tmp_path, resumed):
        assert all(torch.equal(a, b) for a, b in zip(gone_on, restored, strict=True))


def network() -> nn.Module:
    """Rows that no number of ranks divides."""
    torch.manual_seed(1)
    layers = [nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 11), nn.LayerNorm(11), nn.Linear(11, 3)]
    return nn.Sequential(*layers).double()


def losses(kind: str) -> list[float]:
    """Losses of a model that `fully_shard` spread over ranks, all of which see the same batch."""
    model = network()
    if kind != "whole":
        from torch.distributed.fsdp import fully_shard

        shape = (2, dist.get_world_size() // 2) if kind == "hybrid" else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = DistributedShampoo(
        model.parameters(),
        lr=0.03,
        max_block_size=16,
        refresh=StaggeredRefresh(4),
        averaging=ScheduleFree(),
        betas=(0.0, 0.99),
    )
    generator = torch.Generator().manual_seed(2)
    found = []
    for step in range(12):
        inputs = torch.randn(64, 13, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        if step % 4 == 3:
            optimizer.eval()
            found.append(float(nn.functional.mse_loss(model(inputs)[:, :3], inputs[:, :3])))
            if kind != "whole":
                model.reshard()  # or the next forward pass would use gathered weights to evaluate
            optimizer.train()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
@pytest.mark.parametrize(("num_ranks", "kind"), [(2, "sharded"), (3, "sharded"), (4, "hybrid")])
def test_fsdp2_trains_as_one_process(num_ranks: int, kind: str, tmp_path: Path) -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("fully_shard of this torch needs a GPU")
    expected = losses("whole")
    assert expected[-2] < 0.9 * expected[0]
    for found in on_ranks(num_ranks, tmp_path, losses, kind):
        assert found == pytest.approx(expected, rel=1e-9)
