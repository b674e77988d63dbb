"""Checkpoints: the official contents, whole files only, damage named and left alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from workloads_smoke.checkpoints import (
    TrainingState,
    find_checkpoints,
    read_checkpoint,
    restore,
    restore_random_state,
    save_checkpoint,
)
from workloads_smoke.errors import UserError

CPU = torch.device("cpu")
# Keys of `checkpoint_utils.save_checkpoint`, mlcommons/algorithmic-efficiency v0.6.
OFFICIAL_KEYS = {
    "model_params",
    "optimizer_state",
    "model_state",
    "train_state",
    "eval_results",
    "global_step",
    "preemption_count",
}


def trained(num_steps: int, seed: int = 0) -> TrainingState:
    """A state after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    state = {"optimizer": optimizer, "scheduler": scheduler}
    train_state = {"accumulated_submission_time": 1.25}
    evals = [(num_steps, {"validation/loss": 0.5})]
    return TrainingState(state, model, {"ema": torch.ones(2)}, train_state, evals, num_steps, 1)


def test_contents_are_the_official_ones_and_the_runners_own(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, trained(3), {"num_batches_drawn": 4}, keep_earlier=True)
    assert path == tmp_path / "checkpoint_3"
    content = torch.load(path, weights_only=False)
    assert set(content) == OFFICIAL_KEYS | {"runner_state"}
    assert set(content["optimizer_state"]) == {"optimizer", "scheduler"}
    assert content["eval_results"] == ((3, {"validation/loss": 0.5}),)


def test_a_restored_state_has_the_same_bits_and_goes_on_alike(tmp_path: Path) -> None:
    original = trained(5)
    save_checkpoint(tmp_path, original, {}, keep_earlier=True)
    fresh = trained(0, seed=1)
    content = read_checkpoint(tmp_path, CPU)
    assert content is not None
    runner_state = restore(content, fresh)
    assert (fresh.global_step, fresh.preemption_count) == (5, 2)
    assert fresh.eval_results == original.eval_results
    assert fresh.train_state == original.train_state
    for state in (original, fresh):
        restore_random_state(runner_state)
        state.optimizer_state["optimizer"].zero_grad()
        state.model_params(torch.randn(8, 3)).sum().backward()
        state.optimizer_state["optimizer"].step()
    for name, value in original.model_params.state_dict().items():
        assert torch.equal(value, fresh.model_params.state_dict()[name]), name


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    save_checkpoint(tmp_path, trained(1), {}, keep_earlier=True)
    content = read_checkpoint(tmp_path, CPU)
    assert content is not None
    restore_random_state(content["runner_state"])
    first = draw()
    draw()
    restore_random_state(content["runner_state"])
    assert draw() == first


def test_the_latest_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for num_steps in (9, 10, 2):
        save_checkpoint(tmp_path, trained(num_steps), {}, keep_earlier=True)
    (tmp_path / "checkpoint_11_backup").write_text("mine")
    (tmp_path / ".checkpoint_12.partial").write_text("half")
    assert [path.name for path in find_checkpoints(tmp_path)] == [
        "checkpoint_2",
        "checkpoint_9",
        "checkpoint_10",
    ]
    content = read_checkpoint(tmp_path, CPU)
    assert content is not None
    assert content["global_step"] == 10


def test_earlier_ones_go_only_when_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, trained(1), {}, keep_earlier=False)

    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(
            UserError, match="checkpoint_2 cannot be written: No space left on device;"
        ):
            save_checkpoint(tmp_path, trained(2), {}, keep_earlier=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]
    save_checkpoint(tmp_path, trained(2), {}, keep_earlier=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_2"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("width", [1, 200_000])
def test_a_full_disk_is_said_in_a_line_and_costs_nothing(tmp_path: Path, width: int) -> None:
    """Whether the system refuses within torch.save, which has an error of its own, or after it."""
    save_checkpoint(tmp_path, trained(1), {}, keep_earlier=False)
    (tmp_path / ".checkpoint_2.partial").symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        save_checkpoint(tmp_path, trained(2), {"padding": torch.zeros(width)}, keep_earlier=False)
    assert str(caught.value) == (
        f"{tmp_path / 'checkpoint_2'} cannot be written: No space left on device; make room or give "
        "rights, then start again: what was written before is whole"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


def cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_changed(content: bytes) -> bytes:
    # In the middle of the first weight, which is stored as it is.
    return content.replace(b"\x00\x00\x80\x3f" * 2, b"\x00\x00\x80\x3e" + b"\x00\x00\x80\x3f", 1)


def overwritten(content: bytes) -> bytes:
    return b"these are not the bytes you are looking for"


@pytest.mark.parametrize("damage", [cut_off, one_bit_changed, overwritten, lambda _: b""])
def test_damage_is_named_and_left_alone(tmp_path: Path, damage: Any) -> None:
    for num_steps in (1, 2):
        save_checkpoint(tmp_path, trained(num_steps), {}, keep_earlier=True)
    path = tmp_path / "checkpoint_2"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    damaged = path.read_bytes()
    with pytest.raises(UserError, match=rf"{path} is damaged.*resume from checkpoint_1"):
        read_checkpoint(tmp_path, CPU)
    assert path.read_bytes() == damaged
    path.rename(tmp_path / "damaged")
    content = read_checkpoint(tmp_path, CPU)
    assert content is not None
    assert content["global_step"] == 1


def test_a_lone_damaged_checkpoint_and_a_foreign_file(tmp_path: Path) -> None:
    torch.save({"model_params": {}}, tmp_path / "checkpoint_5")
    with pytest.raises(UserError, match=r"it lacks eval_results, .*no earlier checkpoint"):
        read_checkpoint(tmp_path, CPU)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path, CPU) is None
    assert read_checkpoint(tmp_path / "nowhere", CPU) is None


def test_a_value_without_state_dict_is_announced_and_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained(1)
    state.optimizer_state["steps"] = 7
    with caplog.at_level("WARNING"):
        save_checkpoint(tmp_path, state, {}, keep_earlier=True)
    assert "optimizer_state['steps'] is not in the checkpoint: int has no state_dict" in caplog.text
    content = read_checkpoint(tmp_path, CPU)
    assert content is not None
    with pytest.raises(UserError, match=r"optimizer_state\['steps'\].*cannot be resumed: int"):
        restore(content, state)
