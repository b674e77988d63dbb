"""What can be asked of a benchmark: workloads, a folder, numbers; refused before anything is measured."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.tables import DEFAULT_FOLDER
from shampoo_core.model_shapes import official_workloads
from workloads_smoke.errors import UserError
from workloads_smoke.folders import check_folder


def count(text: str) -> int:
    """The type of a flag that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """The type of a flag that is a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def parser_of(description: str | None, workloads: str) -> argparse.ArgumentParser:
    """A parser with the flags that benchmarks of official workloads have in common.

    Args:
        description: Of the benchmark.
        workloads: Which it takes, and which are the default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--workload",
        action="append",
        choices=official_workloads(),
        help=f"can be repeated; {workloads}",
    )
    add_out(parser)
    return parser


def add_out(parser: argparse.ArgumentParser) -> None:
    """The flag `--out`; `out_folder` reads it."""
    parser.add_argument(
        "--out",
        type=_folder,
        help="folder of the JSON, earlier files of the same name there are replaced; default "
        f"{DEFAULT_FOLDER}, or with --workload a folder below it of the workloads' names",
    )


def out_folder(options: argparse.Namespace) -> Path:
    """Where files go: one workload's do not replace those of all, unless asked to."""
    chosen_folder: Path | None = options.out
    if chosen_folder is not None:
        return chosen_folder
    names = dict.fromkeys(options.workload or ())
    return DEFAULT_FOLDER / "+".join(names) if names else DEFAULT_FOLDER


def _folder(text: str) -> Path:
    try:
        check_folder(Path(text), "--out")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def chosen(
    asked: Sequence[str] | None, default: Sequence[str], left_out: Mapping[str, str] | None = None
) -> list[str]:
    """The workloads that a benchmark takes; of those that it does not it says why.

    Args:
        asked: None is no matter which.
        default: Taken then.
        left_out: Why it does not take some workload.
    """
    if asked is None:
        return list(default)
    reasons = left_out or {}
    names = list(dict.fromkeys(asked))
    for name in names:
        if name in reasons:
            sys.stdout.write(f"\nskipped: {name} ({reasons[name]})\n")
    return [name for name in names if name not in reasons]
