"""All benchmarks: ``python -m benchmarks``, a few minutes; sections and workloads can be chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import counts, measured, memory, methods, on_device, scaling, share, timing
from benchmarks.flags import out_folder, parser_of


class Section(NamedTuple):
    """Some tables of one kind."""

    run: Callable[[Sequence[str] | None, Path], list[Path]]
    """Prints tables for some workloads, or for its own, and writes them; returns the files."""
    takes: str
    """Which workloads it can be asked for, and what it takes unasked."""


SECTIONS = {
    "counts": Section(counts.run, counts.TAKES),
    "methods": Section(methods.run, methods.TAKES),
    "memory": Section(memory.run, memory.TAKES),
    "scaling": Section(scaling.run, scaling.TAKES),
    "time": Section(timing.run_affordable, timing.TAKES),
    "measured": Section(measured.run, measured.TAKES),
    "share": Section(share.run, share.TAKES),
    "device": Section(on_device.run, f"{on_device.TAKES}; needs a GPU"),
}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = parser_of(__doc__, "what a section does not take it skips, and says why")
    parser.prog = "python -m benchmarks"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "sections, and the workloads that they take:\n" + "\n".join(
        f"  {name:<10}{section.takes}" for name, section in SECTIONS.items()
    )
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default all"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown sections {unknown}; known are {sorted(SECTIONS)}")
    written: list[Path] = []
    for name in options.sections or SECTIONS:
        written += SECTIONS[name].run(options.workload, out_folder(options))
    files = ", ".join(str(path) for path in written)
    sys.stdout.write(f"\nwritten: {files}\n" if files else "\nnothing was written\n")
    if not written:
        sys.exit(1)  # whoever asked for it has no table, on a machine without a GPU for example


if __name__ == "__main__":
    main()
