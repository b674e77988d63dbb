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
from workloads_smoke.registry import WORKLOADS
from workloads_smoke.target_setting.recipe import HORIZON, Effort, TargetSetter
from workloads_smoke.targets import TARGETS_FILE

RECIPE = (
    "best of four algorithms (AdamW, NAdamW, Nesterov, heavy ball; torch.optim) over Sobol points, "
    f"warm-up and cosine over {HORIZON:g} of the step hint; the best points repeated on seeds; "
    "target = median over seeds of each run's best value"
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(arguments)
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
    content = json.loads(file.read_text()) if file.exists() else {}
    workloads = content.get("workloads", {}) | {name: entry}
    ordered = {key: workloads[key] for key in WORKLOADS if key in workloads}
    write_text(file, json.dumps({"recipe": RECIPE, "workloads": ordered}, indent=1) + "\n")


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
    parser.add_argument("--points", type=int, default=6, help="points per algorithm")
    parser.add_argument("--finalists", type=int, default=2, help="best points to repeat")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each finalist")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", type=Path, default=TARGETS_FILE, help="file of targets")
    parser.add_argument(
        "--runs_dir",
        type=Path,
        default=Path("results/set_targets"),
        help="where finished runs are kept; they are not run again",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
