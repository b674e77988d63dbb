"""torch.distributed.checkpoint: from any number and kind of ranks to any other."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    CASES,
    STEPS,
    Parameters,
    assert_close,
    build,
    tolerance_of,
    trajectory,
)
from distributed_cases import run as run_case
from ranks import on_ranks
from test_distributed_sharded import distributed, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from shampoo_core import DistributedShampoo

NAMES = ("staggered", "weight average", "two groups", "blocks of several sizes")
STOP = 5


def made(name: str, kind: str) -> tuple[Parameters, DistributedShampoo]:
    if kind == "replicated":
        return build(CASES[name])
    size = dist.get_world_size()
    replicas = 2 if size % 2 == 0 else size
    shape = (replicas, size // replicas) if kind == "hybrid" else (size,)
    mesh = init_device_mesh("cpu", shape)
    return build(CASES[name], lambda params: distributed(params, mesh, kind))


def content(params: Parameters, optimizer: DistributedShampoo) -> dict[str, object]:
    """What is saved: weights by number, and the optimizer, which torch asks for its state."""
    return {
        "weights": {str(index): p.detach() for index, p in enumerate(params)},
        "optimizer": optimizer,
    }


def save(kind: str, folder: str) -> None:
    for name in NAMES:
        params, optimizer = made(name, kind)
        run_case(CASES[name], params, optimizer, range(1, STOP + 1), lambda *_: None)
        dcp.save(content(params, optimizer), checkpoint_id=f"{folder}/{name}")


def load(kind: str, folder: str) -> dict[str, list[Tensor]]:
    found = {}
    for name in NAMES:
        params, optimizer = made(name, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about one process without a group
            dcp.load(content(params, optimizer), checkpoint_id=f"{folder}/{name}")
        run_case(CASES[name], params, optimizer, range(STOP + 1, STEPS + 1), lambda *_: None)
        found[name] = [whole(p) if isinstance(p, DTensor) else p.detach() for p in params]
    return found


def assert_finished(found: dict[str, list[Tensor]]) -> None:
    for name, final in found.items():
        expected = trajectory(CASES[name])[-1]
        assert_close(name, [final], [expected], tolerance_of(CASES[name]))


@pytest.fixture(
    scope="module",
    params=[
        "replicated",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("sharded", "hybrid")),
    ],
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of checkpoints that two ranks wrote together; four that are replicas of two."""
    folder = tmp_path_factory.mktemp("dcp")
    num_ranks = 4 if request.param == "hybrid" else 2
    on_ranks(num_ranks, tmp_path_factory.mktemp("ranks"), save, request.param, str(folder))
    return folder


def test_one_process_goes_on(saved: Path) -> None:
    assert_finished(load("replicated", str(saved)))


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
@pytest.mark.parametrize("kind", ["replicated", "sharded", "hybrid"])
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_others_go_on(num_ranks: int, kind: str, saved: Path, tmp_path: Path) -> None:
    for found in on_ranks(num_ranks, tmp_path, load, kind, str(saved)):
        assert_finished(found)


def test_what_was_saved_is_plain(saved: Path) -> None:
    """Every tensor is readable without this package, by a name that no rank shows in."""
    metadata = dcp.FileSystemReader(saved / "staggered").read_metadata()
    names = set(metadata.state_dict_metadata)
    params, optimizer = build(CASES["staggered"])
    for index, parameter in enumerate(params):
        for key in optimizer.state[parameter]:
            assert f"optimizer.state.{index}.{key}" in names
    assert torch.is_tensor(params[0])
