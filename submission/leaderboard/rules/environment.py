"""Environment variables may be read, never set.

"Submitters are not permitted to modify (or add) environment variables for the software
dependencies" (AlgoPerf v0.6, docs/DOCUMENTATION.md, Environment Variables).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from submission.leaderboard.rules.source import Offence, Source

RULE = "environment"
_MAPPINGS = {"os.environ", "os.environb"}
_SETTERS = {"os.putenv", "os.unsetenv"}
#: Ways around these names.
_BACK_DOORS = {"os.*", "os.__dict__", "posix"}
_OPENERS = {"delattr", "setattr", "vars"}
_READING = {"get", "keys", "items", "values", "copy"}


def check(source: Source) -> Iterator[Offence]:
    """Yield the places that set an environment variable, or hand the environment to who could."""
    for node, name in source.imports():
        if name in _MAPPINGS | _SETTERS:
            yield source.offence(node, RULE, f"import os and write {name}, so that its use is seen")
        if name in _BACK_DOORS or name.startswith("posix."):
            yield source.offence(node, RULE, f"{name}: import os itself, so that its use is seen")
    for node in source.nodes:
        is_name = isinstance(node, ast.Attribute | ast.Name | ast.Call)
        used = source.dotted(node) if is_name else None
        if used in _SETTERS or (used in _MAPPINGS and not _is_read_only(source, node)):
            yield source.offence(node, RULE, f"{used}: environment variables must not be set")
        if used in _BACK_DOORS or _opens_the_module(source, node):
            yield source.offence(node, RULE, "hides which variables and functions of os are used")


def _opens_the_module(source: Source, node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and source.dotted(node.func) in _OPENERS
        and bool(node.args)
        and source.dotted(node.args[0]) == "os"
    )


def _is_read_only(source: Source, node: ast.AST) -> bool:
    """Return whether the environment is looked up here and nothing else."""
    user = source.parent(node)
    if isinstance(user, ast.Subscript):
        return isinstance(user.ctx, ast.Load)
    if isinstance(user, ast.Attribute):
        return user.attr in _READING
    return isinstance(user, ast.Compare)
