"""The benchmark's rules as far as a machine can check them, by reading the source.

A clean report is no proof that an entry keeps every rule: it says that none of the plain ways to
break those here was taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from submission.leaderboard.rules import (
    environment,
    kernels,
    pins,
    private_torch,
    surroundings,
    workload_names,
)
from submission.leaderboard.rules.source import Offence, Source

__all__ = ["REQUIREMENTS", "Offence", "Source", "check_files", "check_folder", "check_source"]

#: Name of the file that lists what has to be installed.
REQUIREMENTS = "requirements.txt"
_RULES = (
    workload_names.check,
    surroundings.check,
    environment.check,
    private_torch.check,
    kernels.check,
)


def check_source(path: str, text: str) -> list[Offence]:
    """Return what a Python file breaks, in the order of its lines.

    Args:
        path: Its name in messages; a file named `batch_sizes.py` may hold the table of names.
        text: Its content.

    Raises:
        SyntaxError: It is not Python.
    """
    source = Source(path, text)
    return sorted({offence for rule in _RULES for offence in rule(source)})


def check_files(files: Iterable[Path], root: Path) -> list[Offence]:
    """Return what files break, whatever their kind, named by their path below `root`."""
    return [offence for file in sorted(files) for offence in _check_file(file, root)]


def check_folder(folder: Path) -> list[Offence]:
    """Return what an entry's folder breaks, all files below it included."""
    return check_files((path for path in folder.rglob("*") if path.is_file()), folder)


def _check_file(file: Path, root: Path) -> Iterator[Offence]:
    name = file.relative_to(root).as_posix()
    if file.suffix == ".py":
        yield from check_source(name, file.read_text(encoding="utf-8"))
    elif file.name == REQUIREMENTS:
        yield from pins.check(name, file.read_text(encoding="utf-8"))
    elif file.suffix in kernels.KERNEL_FILES:
        yield Offence(name, 0, kernels.KERNEL_RULE, f"a {file.suffix} file holds foreign kernels")
