"""No behaviour may hang on which workload is trained; the batch-size table is the one exception.

"Submissions may not identify (directly or indirectly) the specific benchmark workload to select
special-cased logic or hyperparameters" (AlgoPerf v0.6, docs/DOCUMENTATION.md, Disallowed
submissions).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from submission.leaderboard.rules.source import Offence, Source

RULE = "workload-name"
#: What the names of workloads, their variants and data sets have in common.
STEMS = ("cifar", "criteo", "fastmri", "fineweb", "imagenet", "librispeech", "mnist", "ogbg", "wmt")
#: File and variable of the one table in which names may stand.
TABLE_FILE, TABLE = "batch_sizes.py", "BATCH_SIZES"
_IDENTITY = {"__class__", "__module__", "__qualname__", "__dict__"}


def check(source: Source) -> Iterator[Offence]:
    """Yield the places that name a workload or ask what kind of workload it is."""
    allowed = _table_nodes(source)
    for constant, text in source.strings():
        if id(constant) not in allowed:
            yield from _named(source, constant, text)
    for node in source.nodes:
        for name in _identifiers(node):
            yield from _named(source, node, name)
        if _asks_for_the_class(source, node):
            message = "asks which workload this is; only its general attributes may be read"
            yield source.offence(node, RULE, message)


def _named(source: Source, node: ast.AST, text: str) -> Iterator[Offence]:
    stem = next((stem for stem in STEMS if stem in text.lower()), None)
    if stem is not None:
        message = f"{text!r} names a workload ({stem}), which only {TABLE} in {TABLE_FILE} may do"
        yield source.offence(node, RULE, message)


def _table_nodes(source: Source) -> set[int]:
    """Return the ids of all nodes of the batch-size table."""
    if source.path.rsplit("/", 1)[-1] != TABLE_FILE:
        return set()
    return {
        id(part)
        for node in source.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == TABLE
        for part in ast.walk(node)
    }


def _identifiers(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node itself spells out."""
    for field in ("id", "attr", "arg", "name", "asname", "module"):
        name = getattr(node, field, None)
        if isinstance(name, str):
            yield name


def _asks_for_the_class(source: Source, node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in _IDENTITY:
        return _is_the_workload(node.value)
    if isinstance(node, ast.Call) and source.dotted(node.func) in {"type", "isinstance", "vars"}:
        return bool(node.args) and _is_the_workload(node.args[0])
    return False


def _is_the_workload(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return bool(name.strip("_") == "workload")
