"""The submission's optimizer on the parameters of the official PyTorch models, by shape and type."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from official_harness import REPOSITORY
from torch import nn

import shampoo_core
from shampoo_core import AdamConfig
from shampoo_core.model_shapes import workload_shapes
from shampoo_core.plan import Placement, Plan, Request, make_plan
from submission import submission
from submission.hyperparameters import SELF_TUNING
from submission.routing import Kind, routed

POINTS = json.loads((REPOSITORY / "tuning_search_space.json").read_text())
SHAPES = json.loads((Path(shampoo_core.__file__).parent / "official_shapes.json").read_text())
SETTINGS: dict[str, Any] = {"self": None} | {
    f"point {number}": SimpleNamespace(**point) for number, point in enumerate(POINTS, start=1)
}
STEP_HINTS = {
    "mnist": 7_813,
    "cifar": 4_883,
    "criteo1tb": 10_666,
    "fastmri": 18_094,
    "finewebedu_lm": 72_000,
    "imagenet_resnet": 195_999,
    "imagenet_vit": 167_999,
    "librispeech_conformer": 76_000,
    "librispeech_deepspeech": 38_400,
    "ogbg": 52_000,
    "wmt": 120_000,
}
OFFICIAL = sorted(STEP_HINTS.keys() - {"mnist", "cifar"})

GIB = 2**30
NUM_RANKS, MEMORY_GIB = 8, 16.0
#: CUDA context and the workspaces of cuBLAS and cuDNN.
CONTEXT_GIB = 1.0

QUICK = [
    *(("mnist", setting) for setting in SETTINGS),
    *((workload, setting) for workload in ("fastmri", "ogbg") for setting in ("self", "point 2")),
]
SLOW = [
    (workload, setting)
    for workload in sorted(STEP_HINTS.keys() - {"mnist"})
    # The largest would take minutes a setting; what they add to the others is their size.
    for setting in (["self"] if workload in {"criteo1tb", "finewebedu_lm", "wmt"} else SETTINGS)
    if (workload, setting) not in QUICK
]
#: Of the model alone times this: its gradients, state, and copies that a step makes.
MEMORY_FACTOR = 9


def build(workload: str, device: str = "cpu") -> tuple[nn.Module, Any]:
    """A module with the parameters of an official model, and as much of its workload as we ask."""
    model, types = nn.Module(), {}
    for name, shape, kind in SHAPES[workload]:
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device=device)))
        types[name] = SimpleNamespace(name=kind)
    return model, SimpleNamespace(model_params_types=types, step_hint=STEP_HINTS[workload])


def optimizer_for(workload: str, setting: str, device: str) -> tuple[nn.Module, Any]:
    model, stub = build(workload, device)
    generator = torch.Generator().manual_seed(1)
    if device != "meta":
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.02, generator=generator)
    state = submission.init_optimizer_state(stub, model, None, SETTINGS[setting], None)
    return model, state["optimizer"]


def take_two_steps(workload: str, setting: str) -> None:
    model, optimizer = optimizer_for(workload, setting, "cpu")
    generator = torch.Generator().manual_seed(2)
    for step in range(2):
        before = [sample(weight) for weight in model.parameters()]
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight).normal_(std=1e-3, generator=generator)
        optimizer.step()
        for (name, weight), old in zip(model.named_parameters(), before, strict=True):
            moved = (sample(weight) - old).abs()
            assert torch.isfinite(weight).all(), (name, step)
            assert moved.max() > 0.0, (name, step)
            # Nobody's first steps may be longer than a few of Adam's at the peak.
            longest = 10.0 * optimizer.param_groups[0]["peak_lr"] * math.sqrt(moved.numel())
            assert moved.norm() <= longest, (name, step)
    assert all(optimizer.state[weight] for weight in model.parameters())


def sample(weight: torch.Tensor) -> torch.Tensor:
    """A million numbers of a parameter: whole copies of the largest ones would not fit."""
    return weight.detach().flatten()[:: 1 + weight.numel() // 2**20].clone()


@pytest.mark.parametrize(("workload", "setting"), QUICK)
def test_two_steps(workload: str, setting: str) -> None:
    take_two_steps(workload, setting)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workload", "setting"), SLOW)
def test_two_steps_of_the_larger_models(workload: str, setting: str) -> None:
    needed = MEMORY_FACTOR * 4 * sum(math.prod(shape) for _, shape, _ in SHAPES[workload])
    if available_bytes() < needed:
        pytest.skip(
            f"needs {needed / GIB:.0f} GiB of memory, {available_bytes() / GIB:.0f} are free"
        )
    take_two_steps(workload, setting)


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return int(kibibytes) * 1024


def plan_for(workload: str, setting: str, num_ranks: int) -> Plan:
    """What the planner says about the options that the submission gives its matrices."""
    _, optimizer = optimizer_for(workload, setting, "meta")
    matrices = (
        g for g in optimizer.param_groups if not isinstance(g["preconditioner"], AdamConfig)
    )
    largest = {max(size or 0 for size in group["max_block_size"]): group for group in matrices}
    block_size, options = max(largest.items(), key=lambda item: item[0])
    return planned(
        workload,
        num_ranks,
        options["preconditioner"],
        options["averaging"],
        block_size,
        options["refresh"].interval,
    )


@functools.cache
def planned(
    workload: str, num_ranks: int, config: Any, averaging: Any, block_size: int, interval: int
) -> Plan:
    request = Request(
        workload_shapes(workload),
        Placement(num_ranks),
        config=config,
        averaging=averaging,
        max_block_size=block_size,
        refresh_interval=interval,
        memory_gib=MEMORY_GIB,
    )
    return make_plan(request)


@pytest.mark.parametrize(
    "workload",
    [name if name == "ogbg" else pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL],
)
def test_a_rank_of_eight_has_memory_enough(workload: str) -> None:
    """Parameters, gradients, DDP's buckets, state, and what a step needs beside, as the planner counts.

    On top of it the training weights that are kept during an evaluation (a copy of the model, if there
    is averaging), and the CUDA context. What is left is for activations; criteo1tb, where least is
    left, has small ones.
    """
    for setting, point in SETTINGS.items():
        plan = plan_for(workload, setting, NUM_RANKS)
        copies = 1 if (point or SELF_TUNING).averaging != "none" else 0
        total = plan.peak_gib + CONTEXT_GIB + copies * plan.parameter_bytes / GIB
        left = MEMORY_GIB - total
        needed = 2.0 if workload == "criteo1tb" else 8.0
        assert left >= needed, f"{setting}: {left:.1f} GiB left"


@pytest.mark.parametrize("workload", ["criteo1tb", "imagenet_resnet", "ogbg"])
def test_the_planner_counts_the_state_that_the_submission_has(workload: str) -> None:
    """On one rank, against the optimizer itself.

    The routing cuts embeddings into smaller blocks and averages no tables; the planner knows of
    neither, so that it may count a little more, and where there are tables much more.
    """
    _, optimizer = optimizer_for(workload, "point 2", "meta")
    held = sum(entry.nbytes for state in optimizer.state.values() for entry in state.values())
    counted = plan_for(workload, "point 2", 1).state_bytes
    assert 0.99 * held <= counted <= (1.6 if workload == "criteo1tb" else 1.1) * held


def test_routes_of_the_official_models() -> None:
    """How many parameters go each way, as blocks of at most 1024."""
    found = {}
    for workload in STEP_HINTS:
        model, stub = build(workload, "meta")
        routes = routed(model, stub.model_params_types, 1024)
        found[workload] = {
            (route.kind, route.max_block_size): len(weights) for route, weights in routes.items()
        }
    matrix, vector, table = Kind.MATRIX, (Kind.DIAGONAL, None), (Kind.TABLE, None)
    assert found == {
        "mnist": {(matrix, 1024): 2, vector: 2},
        "cifar": {(matrix, 1024): 21, vector: 41},
        "criteo1tb": {table: 4, (matrix, 1024): 7, vector: 9},
        "fastmri": {(matrix, 1024): 22, vector: 2},
        "finewebedu_lm": {(matrix, 1024): 49, vector: 37},
        "imagenet_resnet": {(matrix, 1024): 54, vector: 107},
        "imagenet_vit": {(matrix, 1024): 75, vector: 125},
        "librispeech_conformer": {(matrix, 1024): 40, (matrix, 512): 4, vector: 94},
        "librispeech_deepspeech": {(matrix, 1024): 31, vector: 51},
        "ogbg": {(matrix, 128): 2, (matrix, 1024): 16, vector: 48},
        "wmt": {(matrix, 1024): 67, vector: 88},
    }
