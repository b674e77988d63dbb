"""What a trial leaves on disk, in the official layout.

    experiment_dir/experiment_name/<workload>_pytorch/trial_<k>/
        hparams.json             the setting; read back on resume, so that a trial keeps its own
        meta_data_<p>.json       workload constants, machine, software, random seed
        flags_<p>.json           every flag of the command
        eval_measurements.csv    one row per evaluation
        measurements.csv         these rows and what the submission logs; a last row with the time
        step_times.csv           ours: seconds of each step on the submission's clock
        outcome.json             ours: how the trial ended; marks it as complete
        checkpoint_<step>        see checkpoints.py

`<p>` counts how often the trial was resumed. Columns have the official names, in the official order:
sorted for the first row of a file, later additions behind them.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `algoperf/logger_utils.py`.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from workloads_smoke.atomic_files import write_text
from workloads_smoke.errors import UserError

MEASUREMENTS = "measurements.csv"
EVAL_MEASUREMENTS = "eval_measurements.csv"
STEP_TIMES = "step_times.csv"
OUTCOME = "outcome.json"

OUT_OF_TIME = "time budget used up"
"""What `stopped_by` of an outcome is where the clock ended the trial."""


class CsvTable:
    """Rows of a CSV file, held in memory and written as a whole.

    Writing as a whole keeps the file sound whenever the process dies, lets a new column appear at any
    time, and costs about a millisecond for the hundreds of rows of a trial.
    """

    def __init__(self, path: Path, num_rows_kept: int = 0) -> None:
        """Start a table, or go on with the first rows of an existing file.

        Args:
            path: The CSV file.
            num_rows_kept: Rows of an existing file to keep; what follows them was written after
                the checkpoint that a resumed trial goes on from, and will be written again.
        """
        self.path = path
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []
        if num_rows_kept and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or [])
                self.rows = list(reader)[:num_rows_kept]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row in memory."""
        if not self.columns:
            self.columns = sorted(row)
        self.columns += [name for name in row if name not in self.columns]
        self.rows.append(dict(row))

    def flush(self) -> None:
        """Write the file; nothing happens while there are no rows."""
        if not self.rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


class MetricsLogger:
    """Collects the metrics of a trial; submissions reach it as `workload.metrics_logger`.

    Rows that a submission logs between two evaluations stay in memory until the next evaluation, so
    that logging costs it microseconds of its training time. A kill loses nothing by that: a resumed
    trial repeats the steps since its checkpoint.
    """

    def __init__(self, folder: Path, num_rows: Mapping[str, int] = MappingProxyType({})) -> None:
        """Open the tables of a trial.

        Args:
            folder: The trial's folder.
            num_rows: Rows of an earlier run to keep, by file name; none where it is not named.
        """
        self._tables = {
            name: CsvTable(folder / name, num_rows.get(name, 0))
            for name in (MEASUREMENTS, EVAL_MEASUREMENTS, STEP_TIMES)
        }

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows so far, by file name."""
        return {name: len(table.rows) for name, table in self._tables.items()}

    def append_step_time(self, global_step: int, seconds: float) -> None:
        """Add the duration of one step."""
        self._tables[STEP_TIMES].append({"global_step": global_step, "seconds": seconds})

    def append_scalar_metrics(
        self,
        metrics: dict[str, Any],
        global_step: int,
        preemption_count: int | None = None,
        is_eval: bool = False,
    ) -> None:
        """Add a row; `metrics` gains the step and the count, as in the official logger."""
        metrics["global_step"] = global_step
        if preemption_count is not None:
            metrics["preemption_count"] = preemption_count
        self._tables[MEASUREMENTS].append(metrics)
        if is_eval:
            self._tables[EVAL_MEASUREMENTS].append(metrics)
            self.flush()

    def flush(self) -> None:
        """Write all files."""
        for table in self._tables.values():
            table.flush()

    def finish(self) -> None:
        """Write what is still in memory."""
        self.flush()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, indented; values JSON does not know become their text."""
    write_text(path, json.dumps(content, indent=2, default=str))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that this module wrote.

    Raises:
        UserError: It is not a JSON object any more.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {error}; mend it or start with --overwrite"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; mend it or start with --overwrite")
    return content
