"""Which batch size a run takes, and that processes can share it."""

from pathlib import Path
from typing import Any

import pytest
from tiny_runner import TinyWorkload

from workloads_smoke.batch_sizes import base_workload_name, batch_sizes
from workloads_smoke.errors import UserError
from workloads_smoke.submissions import Submission


def submission_with(**functions: Any) -> Submission:
    fields = dict.fromkeys(
        ("init_optimizer_state", "update_params", "data_selection", "prepare_for_eval"), None
    )
    defaults = {"get_batch_size": lambda name: 96, "get_eval_batch_size": None}
    path = Path("entry/submission.py")
    return Submission(path=path, wants_train_state=False, **{**fields, **defaults, **functions})


def test_batch_sizes_are_the_workloads_unless_the_submissions_are_asked_for() -> None:
    workload = TinyWorkload()
    submission = submission_with(get_eval_batch_size=lambda name: 32)
    assert batch_sizes(workload, "tiny", submission, use_submission_batch_size=False) == (8, 64)
    assert batch_sizes(workload, "tiny", submission, use_submission_batch_size=True) == (96, 32)


def test_a_variant_takes_the_batch_size_of_its_base_workload() -> None:
    def get_batch_size(name: str) -> int:
        if name != "wmt":
            raise ValueError(f"Unsupported workload name: {name}.")
        return 128

    submission = submission_with(get_batch_size=get_batch_size)
    assert batch_sizes(TinyWorkload(), "wmt_post_ln", submission, True)[0] == 128
    assert base_workload_name("finewebedu_lm") == "finewebedu_lm"
    assert batch_sizes(TinyWorkload(), "mnist", submission, False)[0] == 8
    with pytest.raises(UserError, match=r"get_batch_size knows no 'mnist' \(Unsupported"):
        batch_sizes(TinyWorkload(), "mnist", submission, True)


@pytest.mark.parametrize("size", [0, -8, 7, 8.0])
def test_batch_sizes_divide_among_processes(monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    submission = submission_with(get_batch_size=lambda name: size)
    with pytest.raises(UserError, match=rf"multiple of the number of processes \(2\), got {size}"):
        batch_sizes(TinyWorkload(), "tiny", submission, use_submission_batch_size=True)
