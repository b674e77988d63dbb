"""Checkpoints of shared state: complete on rank 0, for any number of ranks, refused if they do not fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES, STEPS, Case, assert_close, build, tolerance_of, trajectory
from distributed_cases import run as run_case
from quadratic import gradient
from ranks import assert_equal_on_ranks, on_ranks
from torch import Tensor

from shampoo_core import DistributedShampoo
from shampoo_core.exchange import gathering

NAMES = (
    "staggered",
    "eigenvalue-corrected, lagged",
    "kl-soap",
    "schedule-free",
    "weight average",
    "two groups, missing",
    "frozen",
    "momentum",
)
STOP = 4  # where weights are evaluated too: half way through every interval


def to_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def from_file(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def saved_and_finished(names: tuple[str, ...]) -> dict[str, Any]:
    """On each rank: save at `STOP`, evaluated; go on; resume a new optimizer and compare bitwise."""
    gathering.MESSAGE_BYTES = 20_000  # so that states go in several messages
    return {name: _saved_and_finished(CASES[name]) for name in names}


def _saved_and_finished(case: Case) -> dict[str, Any]:
    params, optimizer = build(case)
    run_case(case, params, optimizer, range(1, STOP + 1), lambda *_: None)
    optimizer.eval()
    own = state_bytes(optimizer)
    sent = optimizer.gather_state()
    file = to_file({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    complete = optimizer.state_dict()["complete"]
    optimizer.train()
    run_case(case, params, optimizer, range(STOP + 1, STEPS + 1), lambda *_: None)
    later = optimizer.state_dict()

    box = [file]
    dist.broadcast_object_list(box, src=0)  # every rank restores what rank 0 saved
    again, resumed = restored(case, from_file(box[0]))
    run_case(case, again, resumed, range(STOP + 1, STEPS + 1), lambda *_: None)
    for a, b in zip(params, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(params, again, strict=True):
        for name, entry in optimizer.state[a].items():
            assert torch.equal(entry, resumed.state[b][name]), name
    assert_equal_on_ranks(list(again), "resumed")
    return {
        "file": box[0],
        "final": [p.detach() for p in params],
        "own": own,
        "sent": sent,
        "complete": complete,
        "complete later": later["complete"],
        "own later": sum(
            entry.nbytes
            for entries in later["state"].values()
            for name, entry in entries.items()
            if name.startswith("block.")
        ),
        "owned": state_bytes(optimizer),
    }


def restored(
    case: Case, content: dict[str, Any]
) -> tuple[list[torch.nn.Parameter], DistributedShampoo]:
    params, optimizer = build(case)
    if case.frozen_until and case.frozen_until <= STOP:
        for index in (1, 3):
            params[index].requires_grad_(True)
    for parameter, weights in zip(params, content["weights"], strict=True):
        parameter.data.copy_(weights)
    optimizer.load_state_dict(content["optimizer"])
    optimizer.train()
    return params, optimizer


def finished(files: dict[str, bytes]) -> dict[str, list[Tensor]]:
    """On each rank: go on from files of another number of ranks."""
    found = {}
    for name, file in files.items():
        params, optimizer = restored(CASES[name], from_file(file))
        run_case(CASES[name], params, optimizer, range(STOP + 1, STEPS + 1), lambda *_: None)
        found[name] = [p.detach() for p in params]
    return found


def state_bytes(optimizer: DistributedShampoo) -> int:
    return sum(
        tensor.nbytes
        for entries in optimizer.state.values()
        for name, tensor in entries.items()
        if name.startswith("block.")
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, tmp_path_factory.mktemp("two"), saved_and_finished, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rank_zero_saves_what_one_process_would(name: str, two_ranks: list[dict[str, Any]]) -> None:
    """The same entries, up to rounding the same numbers; resumed bitwise on two ranks (see above)."""
    case = CASES[name]
    params, optimizer = build(case)
    run_case(case, params, optimizer, range(1, STOP + 1), lambda *_: None)
    optimizer.eval()
    expected = optimizer.state_dict()
    first, second = two_ranks[0][name], two_ranks[1][name]
    assert first["complete"]
    assert not second["complete"]
    actual = from_file(first["file"])["optimizer"]
    assert actual["param_groups"] == expected["param_groups"]
    assert set(actual["state"]) == set(expected["state"])
    for index, entries in expected["state"].items():
        assert set(actual["state"][index]) == set(entries)
        for key, entry in entries.items():
            assert actual["state"][index][key].dtype == entry.dtype
            torch.testing.assert_close(
                actual["state"][index][key], entry, rtol=1e-9, atol=1e-11, msg=key
            )
    # The price: the state of the other rank, once.
    assert first["sent"] == second["own"] > 0
    assert second["sent"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_one_process_goes_on_from_two(name: str, two_ranks: list[dict[str, Any]]) -> None:
    final = finished({name: two_ranks[0][name]["file"]})[name]
    assert_close(name, [final], [trajectory(CASES[name])[-1]], tolerance_of(CASES[name]))


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_other_numbers_go_on(
    num_ranks: int, tmp_path: Path, two_ranks: list[dict[str, Any]]
) -> None:
    files = {name: two_ranks[0][name]["file"] for name in NAMES}
    for found in on_ranks(num_ranks, tmp_path, finished, files):
        for name, final in found.items():
            expected = two_ranks[0][name]["final"]
            assert_close(name, [final], [expected], tolerance_of(CASES[name]))


def test_state_of_one_rank_alone_is_refused(two_ranks: list[dict[str, Any]]) -> None:
    """As where `gather_state` was forgotten."""
    content = from_file(two_ranks[1]["staggered"]["file"])["optimizer"]
    state = {
        index: {key: entry for key, entry in entries.items() if not key.startswith("block.0.0.")}
        for index, entries in content["state"].items()
    }
    params, optimizer = build(CASES["staggered"])
    weights = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"saved by one rank of several.*gather_state"):
        optimizer.load_state_dict({**content, "state": state, "complete": False})
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_makes_gathered_state_old(name: str, two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        assert not found[name]["complete later"]
        assert found[name]["own later"] == found[name]["owned"] > 0


def test_one_process_has_all_state_at_no_cost() -> None:
    params, optimizer = build(CASES["staggered"])
    for index, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 1, index)
    optimizer.step()
    assert optimizer.gather_state() == 0
    assert optimizer.state_dict()["complete"]


def gathered_by_the_last_two() -> list[tuple[Any, Tensor, int]] | None:
    """Entries that the first of these lacked, each with the bytes of its memory."""
    last_two = dist.new_group([1, 2])
    rank = dist.get_rank()
    if rank == 0:
        return None
    own = {(rank, name): torch.full((2, 3), 10.0 * rank + i) for i, name in enumerate("xy")}
    found = gathering.gather(own | {(0, "both"): torch.ones(2)}, last_two)
    return [(key, entry, entry.untyped_storage().nbytes()) for key, entry in found.items()]


def test_a_group_need_not_begin_at_rank_zero(tmp_path: Path) -> None:
    """Ranks of a group have numbers of their own. What arrived together is not kept together."""
    outside, first, second = on_ranks(3, tmp_path, gathered_by_the_last_two)
    assert outside is None
    assert second == []
    assert [(key, nbytes) for key, _, nbytes in first] == [((2, "x"), 24), ((2, "y"), 24)]
    for number, (_, entry, _) in zip((20.0, 21.0), first, strict=True):
        assert torch.equal(entry, torch.full((2, 3), number))


def test_an_entry_longer_than_a_message_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MESSAGE_BYTES", 100)
    sizes = [40, 10, 15, 30, 1]  # of 4 bytes; the third number is one of 8
    entries = [
        gathering._Entry((i, "x"), (size,), torch.float64 if i == 2 else torch.float32)
        for i, size in enumerate(sizes)
    ]
    found = [[entry.key[0] for entry in message] for message in gathering._messages(entries)]
    assert found == [[0], [1], [3], [4], [2]]
    assert list(gathering._messages([])) == []
