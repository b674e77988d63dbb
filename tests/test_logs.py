"""Tables and files of a trial: official columns, whole at any moment, no row twice after a resume."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from workloads_smoke.atomic_files import atomic_write
from workloads_smoke.errors import UserError
from workloads_smoke.logs import CsvTable, MetricsLogger, read_json_object, write_json

# Header of eval_measurements.csv in the published v0.6 logs of mlcommons/submissions_algorithms
# (external_tuning/shampoo/study_2/criteo1tb_pytorch/trial_5).
OFFICIAL_EVAL_COLUMNS = [
    "accumulated_eval_time",
    "accumulated_logging_time",
    "accumulated_submission_time",
    "global_step",
    "preemption_count",
    "score",
    "test/loss",
    "test/num_examples",
    "total_duration",
    "train/loss",
    "validation/loss",
    "validation/num_examples",
]
# The same of measurements.csv, where the submission's first loss comes before the first evaluation.
OFFICIAL_COLUMNS = [
    "global_step",
    "grad_norm",
    "loss",
    "train/loss",
    "validation/loss",
    "validation/num_examples",
    "test/loss",
    "test/num_examples",
    "score",
    "total_duration",
    "accumulated_submission_time",
    "accumulated_eval_time",
    "accumulated_logging_time",
    "preemption_count",
]


def evaluation() -> dict[str, Any]:
    """Metrics in the order in which the training loop puts them together."""
    return {
        "train/loss": 0.5,
        "validation/loss": 0.6,
        "validation/num_examples": 100,
        "test/loss": 0.7,
        "test/num_examples": 100,
        "score": 1.5,
        "total_duration": 2.0,
        "accumulated_submission_time": 1.5,
        "accumulated_eval_time": 0.1,
        "accumulated_logging_time": 0.0,
    }


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_columns_are_the_official_ones(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.append_scalar_metrics({"loss": 0.7, "grad_norm": 7.6}, 0)
    logger.append_scalar_metrics(evaluation(), 1, 0, is_eval=True)
    logger.append_scalar_metrics({"score": 3.0}, 9, 0)
    logger.finish()
    assert table(tmp_path / "eval_measurements.csv")[0] == OFFICIAL_EVAL_COLUMNS
    header, training, evaluated, final = table(tmp_path / "measurements.csv")
    assert header == OFFICIAL_COLUMNS
    assert training[:4] == ["0", "7.6", "0.7", ""]
    assert evaluated[0] == "1"
    assert evaluated[-1] == "0"
    assert dict(zip(header, final, strict=True))["score"] == "3.0"


def test_metrics_gain_step_and_count(tmp_path: Path) -> None:
    metrics = evaluation()
    MetricsLogger(tmp_path).append_scalar_metrics(metrics, 4, 2, is_eval=True)
    assert (metrics["global_step"], metrics["preemption_count"]) == (4, 2)


def test_what_a_submission_logs_waits_for_the_next_evaluation(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    logger.append_scalar_metrics({"loss": 0.7}, 0)
    assert not (tmp_path / "measurements.csv").exists()
    logger.append_scalar_metrics(evaluation(), 1, 0, is_eval=True)
    assert len(table(tmp_path / "measurements.csv")) == 3


def test_a_resumed_logger_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path)
    for step in range(3):
        logger.append_step_time(step + 1, 0.25)
        logger.append_scalar_metrics({"loss": 1 / 3}, step)
    num_rows = logger.num_rows
    logger.append_scalar_metrics({"loss": 9.0, "unseen": 1.0}, 3)
    logger.append_step_time(4, 0.25)
    logger.finish()
    resumed = MetricsLogger(tmp_path, num_rows)
    resumed.append_scalar_metrics({"loss": 0.5}, 3)
    resumed.finish()
    assert [row[1] for row in table(tmp_path / "measurements.csv")[1:]] == [
        *([repr(1 / 3)] * 3),
        "0.5",
    ]
    assert len(table(tmp_path / "step_times.csv")) == 4


def test_a_fresh_table_replaces_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("a\n1\n")
    fresh = CsvTable(path)
    fresh.flush()
    assert path.read_text() == "a\n1\n", "nothing to write is no reason to delete"
    fresh.append({"b": 2, "a": 1})
    fresh.flush()
    assert path.read_text() == "a,b\n1,2\n"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new, but only ha")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_whole_write_replaces_it(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path, durable) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "hparams.json"
    write_json(path, {"lr": 1e-3, "path": Path("x")})
    assert json.loads(path.read_text()) == {"lr": 1e-3, "path": "x"}
    assert read_json_object(path)["lr"] == 1e-3
    for broken in ("[1]", "{", ""):
        path.write_text(broken)
        with pytest.raises(UserError, match=str(path)):
            read_json_object(path)
        assert path.read_text() == broken
