"""Public interfaces of torch only.

"Submissions may use public APIs in JAX and PyTorch from within the submission function APIs"
(AlgoPerf v0.6, docs/DOCUMENTATION.md, Disallowed submissions). The one exception are the list
operations `torch._foreach_*`: torch's manual describes them (torch, Foreach Operations), they launch
torch's own kernels, and entries on the leaderboard are written with them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from submission.leaderboard.rules.source import Offence, Source

RULE = "private-torch"
_DOCUMENTED = re.compile(r"torch\._foreach_\w+")
_IN_TEXT = re.compile(r"torch(\.\w+)*\._[a-z]\w*")


def check(source: Source) -> Iterator[Offence]:
    """Yield imports and uses of what torch keeps to itself."""
    for node, name in source.imports():
        if _is_private(name):
            yield source.offence(node, RULE, f"{name} is private to torch")
    for node in source.nodes:
        if isinstance(node, ast.Attribute | ast.Call):
            used = source.dotted(node)
            # The innermost private step is reported; what hangs below it repeats it.
            if used and _is_private(used) and used.rsplit(".", 1)[-1].startswith("_"):
                yield source.offence(node, RULE, f"{used} is private to torch")
    for constant, text in source.strings():
        if _IN_TEXT.search(text) and not _DOCUMENTED.fullmatch(text):
            yield source.offence(constant, RULE, f"{text!r} names what is private to torch")


def _is_private(name: str) -> bool:
    """Return whether a full name leads through something private of torch."""
    first, *rest = name.split(".")
    if first != "torch" or _DOCUMENTED.fullmatch(name):
        return False
    return any(part.startswith("_") and not part.endswith("__") for part in rest)
