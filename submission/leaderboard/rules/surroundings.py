"""What the process around a run says of it: the command line, callers, other objects.

"Submissions may not identify (directly or indirectly) the specific benchmark workload" (AlgoPerf v0.6,
docs/DOCUMENTATION.md, Disallowed submissions). Their functions are handed what they may know; what
tells a workload's name besides stands in the flags of the harness, and in whatever calls them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from submission.leaderboard.rules.source import Offence, Source

RULE = "surroundings"
_TELLING = {
    "__main__",
    "gc.get_objects",
    "gc.get_referrers",
    "inspect.currentframe",
    "inspect.stack",
    "inspect.trace",
    "sys._current_frames",
    "sys._getframe",
    "sys.argv",
    "sys.orig_argv",
    "traceback.extract_stack",
    "traceback.walk_stack",
}
_FLAGS = "absl.flags.FLAGS"
#: Flags of the harness, and the method that returns all of them, that name the workload or its data.
_TELLING_FLAGS = {"data_dir", "experiment_dir", "experiment_name", "flag_values_dict", "workload"}
_PROCESS_FOLDER = "/proc/"


def check(source: Source) -> Iterator[Offence]:
    """Yield the places that look around for what a submission is not told."""
    for node, name in source.imports():
        if name in _TELLING:
            yield source.offence(node, RULE, _message(name))
    for node in source.nodes:
        used = source.dotted(node) if isinstance(node, ast.Attribute | ast.Call) else None
        if used in _TELLING:
            yield source.offence(node, RULE, _message(used))
        flag = _flag(source, node, used)
        if flag in _TELLING_FLAGS:
            yield source.offence(node, RULE, _message(f"{_FLAGS}.{flag}"))
        if used == "sys.modules" and not _is_looked_up(source, node):
            yield source.offence(node, RULE, _message("a search through sys.modules"))
    for constant, text in source.strings():
        if text.startswith(_PROCESS_FOLDER):
            yield source.offence(constant, RULE, _message(text))


def _message(name: str) -> str:
    return f"{name} can tell which workload this is; only what the functions are handed may be read"


def _flag(source: Source, node: ast.AST, used: str | None) -> str | None:
    """Return the flag, or what else of the harness's flags, that a node reads."""
    if used is not None and used.startswith(f"{_FLAGS}."):
        return used.removeprefix(f"{_FLAGS}.").split(".")[0]
    if isinstance(node, ast.Subscript) and source.dotted(node.value) == _FLAGS:
        return str(node.slice.value) if isinstance(node.slice, ast.Constant) else None
    return None


def _is_looked_up(source: Source, node: ast.AST) -> bool:
    """Return whether the modules are asked for one of them rather than gone through."""
    user = source.parent(node)
    if isinstance(user, ast.Attribute):
        return user.attr == "get"
    return isinstance(user, ast.Subscript | ast.Compare)
