"""Headers, text tables and JSON files of benchmarks."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, Any]
DEFAULT_FOLDER = Path("results/bench")


def _commit() -> str:
    """The commit that is checked out, marked if files differ from it; "unknown" outside git."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


COMMIT = _commit()
"""As the run began: a long one may see others."""


def environment() -> dict[str, Any]:
    """Where the numbers come from: machine, versions, commit."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": COMMIT,
    }


def header(facts: Mapping[str, Any]) -> str:
    """One line of `environment`."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def text_table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Rows under headings, numbers to the right.

    Args:
        rows: One mapping per line; a missing or None entry is shown as "-".
        columns: Key of an entry -> its heading, in order.
    """
    cells = [list(columns.values())]
    cells += [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    texts = [_is_text(rows, key) for key in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(line, widths, texts, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def of_several(workloads: Sequence[str], columns: Mapping[str, str]) -> Mapping[str, str]:
    """Columns that name the workload, too, where a table whose title names them has several."""
    return columns if len(workloads) == 1 else {"workload": "workload", **columns}


def publish(
    title: str, rows: Sequence[Row], columns: Mapping[str, str], folder: Path, notes: str = ""
) -> list[Path]:
    """Print a table and write its rows as JSON; without rows do neither.

    Args:
        title: Heading; its first word names the file.
        rows: All entries are written, those of ``columns`` printed.
        columns: See `text_table`.
        folder: Made if missing. Benchmarks are there to be rerun: a file of the same name is
            replaced.
        notes: Printed below the table.

    Returns:
        Files that were written.
    """
    if not rows:
        return []
    facts = environment()
    sys.stdout.write(f"\n{title}\n{header(facts)}\n\n{text_table(rows, columns)}\n")
    if notes:
        sys.stdout.write(f"\n{notes}\n")
    sys.stdout.flush()
    name = title.split()[0].strip(":,").lower()
    known = [{key: _strict(value) for key, value in row.items()} for row in rows]
    document = {"title": title, "environment": facts, "notes": notes, "rows": known}
    path = folder / f"{name}.json"
    write_json(path, document)
    return [path]


def _strict(value: Any) -> Any:
    """JSON has no number for what is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, document: Any) -> None:
    """Write JSON in one go: a reader finds the old file or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _is_text(rows: Sequence[Row], key: str) -> bool:
    return any(isinstance(row.get(key), str) for row in rows)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
