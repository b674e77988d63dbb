"""Set the targets of smoke workloads: `python -m workloads_smoke.set_targets --workload mnist`.

Writes targets.json: the targets, the point and seeds that gave them, every run, and where it was
done. See `workloads_smoke.target_setting.recipe` for the recipe.
"""

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from workloads_smoke.atomic_files import write_text
from workloads_smoke.data.python_text import fingerprint
from workloads_smoke.errors import UserError
from workloads_smoke.folders import check_folder
from workloads_smoke.registry import WORKLOADS
from workloads_smoke.target_setting.recipe import HORIZON, Effort, TargetSetter
from workloads_smoke.targets import TARGETS_FILE

RECIPE = (
    "best of four algorithms (AdamW, NAdamW, Nesterov, heavy ball; torch.optim) over Sobol points, "
    f"warm-up and cosine over {HORIZON:g} of the step hint; the best points repeated on seeds; "
    "target = median over seeds of each run's best value, half a unit of the sixth decimal easier, so that "
    "the run in the middle reaches it"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = _parse(arguments)
    try:
        check_folder(options.runs_dir, "--runs_dir")
        check_folder(options.output.parent, "--output")
        known_entries(options.output)
        _set_targets(options)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _set_targets(options: argparse.Namespace) -> None:
    """Find the targets of one workload after the other, and write each when it is found."""
    torch.set_num_threads(options.threads)
    effort = Effort(options.points, options.finalists, options.seeds)
    for name in options.workload or WORKLOADS:
        entry = TargetSetter(name, options.runs_dir, _report).find(effort)
        entry["provenance"] = _provenance()
        write_entry(options.output, name, entry)
        _report(
            f"{name}: validation {entry['validation_target_value']:.5g}, "
            f"test {entry['test_target_value']:.5g}, by {entry['algorithm']}; {entry['check']}"
        )


def write_entry(file: Path, name: str, entry: dict[str, Any]) -> None:
    """Put one workload's entry into the file of targets, leaving the others as they are."""
    workloads = known_entries(file) | {name: entry}
    ordered = {key: workloads[key] for key in WORKLOADS if key in workloads}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"recipe": RECIPE, "workloads": ordered}, indent=1) + "\n")


def known_entries(file: Path) -> dict[str, Any]:
    """Entries of a file of targets by workload; none where there is no file.

    Raises:
        UserError: It is something else.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--output: {file} is no file of targets: {error}") from error
    workloads = content.get("workloads") if isinstance(content, dict) else None
    if not isinstance(workloads, dict):
        raise UserError(f"--output: {file} is no file of targets, it has no object 'workloads'")
    return workloads


def _provenance() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python_text_fingerprint": fingerprint(),
    }


def _report(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="workloads_smoke.set_targets", description=__doc__)
    parser.add_argument(
        "--workload", action="append", choices=sorted(WORKLOADS), help="repeatable; default: all"
    )
    parser.add_argument("--points", type=_positive, default=6, help="points per algorithm")
    parser.add_argument("--finalists", type=_positive, default=2, help="best points to repeat")
    parser.add_argument("--seeds", type=_positive, default=5, help="seeds of each finalist")
    parser.add_argument("--threads", type=_positive, default=1, help="torch threads")
    parser.add_argument("--output", type=Path, default=TARGETS_FILE, help="file of targets")
    parser.add_argument(
        "--runs_dir",
        type=Path,
        default=Path("results/set_targets"),
        help="where finished runs are kept; they are not run again: name another, or delete it, after"
        " a change of a model or of data (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
