"""All benchmarks: ``python -m benchmarks``, a few minutes; sections and workloads can be chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import counts, measured, memory, methods, scaling, share, timing
from benchmarks.tables import DEFAULT_FOLDER
from shampoo_core.model_shapes import official_workloads

SECTIONS: dict[str, Callable[[Sequence[str], Path], None]] = {
    "counts": counts.run,
    "methods": methods.run,
    "memory": memory.run,
    "scaling": scaling.run,
    "time": timing.run_affordable,
    "measured": measured.run,
    "share": share.run,
}
"""By name: prints tables for some workloads and writes them to a folder."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default all"
    )
    parser.add_argument("--workload", action="append", choices=official_workloads())
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_FOLDER, help="folder for JSON and plots"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown sections {unknown}; known are {sorted(SECTIONS)}")
    for name in arguments.sections or SECTIONS:
        SECTIONS[name](arguments.workload or official_workloads(), arguments.out)
    sys.stdout.write(f"\nJSON and plots are in {arguments.out}\n")


if __name__ == "__main__":
    main()
