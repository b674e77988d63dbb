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
#: Calls that tell what their first argument is; a workload's text holds the name of its class.
_TELLING_CALLS = {
    "ascii",
    "dir",
    "format",
    "inspect.getfile",
    "inspect.getmembers",
    "inspect.getmodule",
    "inspect.getsource",
    "isinstance",
    "repr",
    "str",
    "type",
    "vars",
}


def check(source: Source) -> Iterator[Offence]:
    """Yield the places that name a workload or ask what kind of workload it is."""
    allowed = _table_nodes(source)
    workloads = _names_of_the_workload(source)
    for constant, text in source.strings():
        if id(constant) not in allowed:
            yield from _named(source, constant, text)
    for node in source.nodes:
        for name in _identifiers(node):
            yield from _named(source, node, name)
        if _asks_for_the_class(source, node, workloads) or _spells_out(node, workloads):
            message = "asks which workload this is; only its general attributes may be read"
            yield source.offence(node, RULE, message)
        if _compares_with_a_literal(node, workloads):
            message = "compares an attribute of the workload with what only some workloads have"
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


def _names_of_the_workload(source: Source) -> set[str]:
    """Return `workload` and whatever else of this file's variables and attributes it is kept in."""
    names = {"workload"}
    for node in source.nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if _is_one_of(node.value, names):
                names.update(_last_name(target) for target in targets)
    return names - {""}


def _asks_for_the_class(source: Source, node: ast.AST, workloads: set[str]) -> bool:
    if isinstance(node, ast.Attribute):
        return _is_special(node.attr) and _is_one_of(node.value, workloads)
    if not (isinstance(node, ast.Call) and node.args and _is_one_of(node.args[0], workloads)):
        return False
    called = source.dotted(node.func)
    if called == "getattr" and len(node.args) > 1:
        name = node.args[1]
        return isinstance(name, ast.Constant) and _is_special(str(name.value))
    return called in _TELLING_CALLS


def _spells_out(node: ast.AST, workloads: set[str]) -> bool:
    """Return whether the workload itself becomes part of a text."""
    if isinstance(node, ast.FormattedValue):
        return _is_one_of(node.value, workloads)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and _is_text(node.left):
        values = node.right.elts if isinstance(node.right, ast.Tuple) else [node.right]
        return any(_is_one_of(value, workloads) for value in values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        called = node.func.attr == "format" and _is_text(node.func.value)
        return called and any(_is_one_of(value, workloads) for value in node.args)
    return False


def _compares_with_a_literal(node: ast.AST, workloads: set[str]) -> bool:
    """Return whether an attribute is compared for equality with a text or a number above 1."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return (
        any(isinstance(side, ast.Attribute) and _is_one_of(side.value, workloads) for side in sides)
        and all(
            isinstance(operator, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for operator in node.ops
        )
        and any(_is_distinctive(part) for side in sides for part in _parts(side))
    )


def _parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]


def _is_distinctive(node: ast.expr) -> bool:
    value = node.value if isinstance(node, ast.Constant) else None
    return value > 1 if isinstance(value, int | float) else isinstance(value, str) and value != ""


def _is_special(name: str) -> bool:
    """Return whether Python itself gives objects an attribute of this name, such as `__class__`."""
    return name.startswith("__") and name.endswith("__")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_one_of(node: ast.AST, names: set[str]) -> bool:
    return _last_name(node) in names


def _last_name(node: ast.AST) -> str:
    """Return `name` of `name` and of `owner.name`, without leading underscores; else nothing."""
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return str(name).strip("_")
