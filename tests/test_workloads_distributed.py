"""Smoke workloads on two processes give the numbers of one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from workloads_smoke import spec
from workloads_smoke.distributed import leave_process_group
from workloads_smoke.registry import load_workload
from workloads_smoke.workloads.base import SmokeWorkload
from workloads_smoke.workloads.layers import MaskedBatchNorm
from workloads_smoke.workloads.placement import current_placement

NAMES = ("mnist", "ogbg", "librispeech_conformer")
EVAL_EXAMPLES, EVAL_BATCH = 36, 20


def evaluate(workload: SmokeWorkload) -> dict[str, float]:
    """Metrics of a fixed model; 36 examples in batches of 20 end in a partly empty batch."""
    model, _ = workload.init_model_fn([3, 4])
    return workload._eval_model_on_split(
        "validation", EVAL_EXAMPLES, EVAL_BATCH, model, None, [5, 6], ""
    )


def summed_loss(workload: SmokeWorkload) -> torch.Tensor:
    """Sum of the losses of this process's part of a training batch, in evaluation mode."""
    model, _ = workload.init_model_fn([3, 4])
    batch = next(workload._build_input_queue([1, 2], "train", "", 8))
    logits, _ = workload.model_fn(model, batch, None, spec.ForwardPassMode.EVAL, None, False)
    loss = workload.loss_fn(batch["targets"], logits, batch.get("weights"))
    return loss["summed"].detach().double()


def normalised(rows: slice) -> tuple[torch.Tensor, MaskedBatchNorm]:
    """Rows of a padded batch through a batch norm in training mode."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 5, 3, generator=generator)
    paddings = (torch.arange(5) >= torch.tensor([[5], [3], [1], [4], [2], [2]])).float()
    norm = MaskedBatchNorm(3)
    return norm(inputs[rows], paddings[rows]).detach(), norm


def one_process() -> dict[str, Any]:
    """The numbers to agree with."""
    outputs, norm = normalised(slice(0, 6))
    return {
        "metrics": {name: evaluate(load_workload(name)) for name in NAMES},
        "losses": {name: summed_loss(load_workload(name)).item() for name in NAMES},
        "norm": outputs.flatten().tolist(),
        "running_var": norm.running_var.tolist(),
    }


def statistics_evaluated_with(name: str, rank: int) -> list[float]:
    """First number of a model's first running statistic on all ranks, which held 1, 2, ... before."""
    workload = load_workload(name)
    model, _ = workload.init_model_fn([3, 4])
    statistic = next(b for b in model.buffers() if b.is_floating_point())
    statistic.fill_(1.0 + rank)
    workload._eval_model_on_split("validation", 4, 4, model, None, [5, 6], "")
    everywhere = [torch.empty_like(statistic) for _ in range(2)]
    distributed.all_gather(everywhere, statistic)
    return [one.flatten()[0].item() for one in everywhere]


def process(rank: int, folder: str) -> None:
    """One of two processes; rank 0 writes what was found."""
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="2", RANK=str(rank))
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found: dict[str, Any] = {"metrics": {}, "losses": {}}
    for name in NAMES:
        workload = load_workload(name)
        model, _ = workload.init_model_fn([3, 4])
        assert isinstance(model, DistributedDataParallel)
        found["metrics"][name] = evaluate(workload)
        loss = summed_loss(workload)
        distributed.all_reduce(loss)
        found["losses"][name] = loss.item()
    found["statistics"] = {
        name: statistics_evaluated_with(name, rank)
        for name in ("imagenet_resnet", "librispeech_conformer")
    }
    outputs, norm = normalised(slice(3 * rank, 3 * rank + 3))
    parts = [torch.empty_like(outputs) for _ in range(2)]
    distributed.all_gather(parts, outputs)
    found |= {"norm": torch.cat(parts).flatten().tolist(), "running_var": norm.running_var.tolist()}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    leave_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Metrics, losses and batch statistics."""
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    expected = one_process()
    for name in NAMES:
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-5), name
        assert found["losses"][name] == pytest.approx(expected["losses"][name], rel=1e-5), name
    # Officially the mean of all for speech, those of rank 0 for the others.
    assert found["statistics"] == {"imagenet_resnet": [1, 1], "librispeech_conformer": [1.5, 1.5]}
    assert found["norm"] == pytest.approx(expected["norm"], abs=1e-5)
    assert found["running_var"] == pytest.approx(expected["running_var"], rel=1e-5)


def test_several_processes_without_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        current_placement()
