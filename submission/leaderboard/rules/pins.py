"""Requirements that leave the benchmark's own packages as they are.

"You may not modify the package versions of the software dependencies used by the benchmarking
codebase"; "additional dependencies can be added as long as they include a comment describing what was
added and why" (AlgoPerf v0.6, docs/DOCUMENTATION.md, Software Dependencies). The benchmark's
versions lie beside this file, with their source.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from submission.leaderboard.rules.source import Offence

RULE = "pin"
_PINS_FILE = Path(__file__).with_name("benchmark_pins.json")
_LINE = re.compile(r"([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*([^;#]*)")
_CLAUSE = re.compile(r"(===|==|~=|!=|<=|>=|<|>)\s*([\w.*+!-]+)")


@functools.cache
def benchmark_pins() -> dict[str, str]:
    """Return the benchmark's version clause by normalised package name, e.g. "==2.5.1"."""
    pins: dict[str, str] = json.loads(_PINS_FILE.read_text(encoding="utf-8"))["pins"]
    return pins


def check(path: str, text: str) -> Iterator[Offence]:
    """Yield the lines of a requirements file that change what the benchmark has.

    Args:
        path: The file's name in messages.
        text: Its content.
    """
    commented = False
    for number, line in enumerate(text.splitlines(), start=1):
        requirement, _, comment = line.partition("#")
        if requirement.strip():
            has_reason = bool(comment.strip()) or commented
            message = disagreement(requirement.strip(), has_reason)
            if message:
                yield Offence(path, number, RULE, message)
        commented = bool(comment.strip()) and not requirement.strip()


def disagreement(requirement: str, has_reason: bool = True) -> str | None:
    """Say what is wrong with one requirement, or None.

    Args:
        requirement: For example `torch==2.5.1`.
        has_reason: Whether a comment says what it is for.
    """
    match = _LINE.match(requirement)
    if match is None or "@" in requirement or "://" in requirement:
        return f"{requirement!r} is no plain requirement `name==version`, so it cannot be checked"
    name, clauses = normalised(match[1]), match[2]
    if name not in benchmark_pins():
        return None if has_reason else f"{name} needs a comment: what it is and why it is needed"
    wanted = benchmark_pins()[name]
    if clauses.strip() and not _CLAUSE.search(clauses):
        return f"{requirement!r} has no version clause that can be read"
    if all(_admits(relation, limit, wanted) for relation, limit in _CLAUSE.findall(clauses)):
        return None
    return f"{requirement!r} disagrees with the benchmark's {name}{wanted}"


def normalised(name: str) -> str:
    """Return a package's name as the index compares it.

    >>> normalised("Tensorflow_Text")
    'tensorflow-text'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _admits(relation: str, limit: str, wanted: str) -> bool:
    """Return whether a clause leaves what the benchmark has, e.g. `>=2.5` does `==2.5.1`."""
    if wanted.startswith(">="):
        # Which version is installed is open; only a floor that lies no higher changes nothing.
        return relation == ">=" and _version(limit) <= _version(wanted.removeprefix(">="))
    ours, theirs = _version(limit), _version(wanted.removeprefix("=="))
    if relation in ("==", "!=") and limit.endswith(".*"):
        return _begins(theirs, limit.removesuffix(".*")) == (relation == "==")
    return {
        "==": ours == theirs,
        "===": limit == wanted.removeprefix("=="),
        "!=": ours != theirs,
        "<=": theirs <= ours,
        ">=": theirs >= ours,
        "<": theirs < ours,
        ">": theirs > ours,
        "~=": theirs >= ours and _begins(theirs, limit.rpartition(".")[0]),
    }[relation]


def _begins(version: tuple[int, ...], prefix: str) -> bool:
    """Return whether a release begins with the numbers of a prefix, of which zeros count: 2.0 is not 2."""
    numbers = tuple(map(int, re.findall(r"\d+", prefix)))
    return (*version, *[0] * len(numbers))[: len(numbers)] == numbers


def _version(text: str) -> tuple[int, ...]:
    """Return a release's numbers without trailing zeros: 2.5.0 is 2.5."""
    numbers = [int(part) for part in re.findall(r"\d+", text)]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
