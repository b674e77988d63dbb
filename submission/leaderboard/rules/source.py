"""A Python file as the rules see it: its syntax tree, and what its names stand for."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTERS = {"__import__", "importlib.import_module"}


@dataclass(frozen=True, order=True)
class Offence:
    """A place that breaks a rule of the benchmark.

    Attributes:
        path: The file.
        line: Line in it, from 1; 0 is the file as a whole.
        rule: Short name of the rule.
        message: What is there and what is asked for.
    """

    path: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message} [{self.rule}]"


class Source:
    """A parsed file.

    Args:
        path: Its name in messages.
        text: Its content.

    Raises:
        SyntaxError: It is not Python.
    """

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.tree = ast.parse(text, path)
        self.nodes = list(ast.walk(self.tree))
        self._parents = {
            id(child): node for node in self.nodes for child in ast.iter_child_nodes(node)
        }

    def offence(self, node: ast.AST, rule: str, message: str) -> Offence:
        """Return an offence at a node."""
        return Offence(self.path, getattr(node, "lineno", 0), rule, message)

    def parent(self, node: ast.AST) -> ast.AST | None:
        """Return the node that holds `node`."""
        return self._parents.get(id(node))

    def strings(self) -> Iterator[tuple[ast.Constant, str]]:
        """Yield every string of the code, parts of f-strings included, docstrings left out."""
        documentation = {
            id(node.body[0].value)
            for node in self.nodes
            if isinstance(node, _DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in self.nodes:
            if isinstance(node, ast.Constant) and id(node) not in documentation:
                if isinstance(node.value, str):
                    yield node, node.value
                elif isinstance(node.value, bytes):
                    yield node, node.value.decode("latin-1")

    def imports(self) -> Iterator[tuple[ast.AST, str]]:
        """Yield the full name of everything imported, `from m import n` as `m.n`.

        Relative imports keep their dots. Imports through `importlib` with a literal name count.
        """
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node, alias.name
            elif isinstance(node, ast.ImportFrom):
                start = "." * node.level + (node.module + "." if node.module else "")
                for alias in node.names:
                    yield node, start + alias.name
            elif isinstance(node, ast.Call) and self.dotted(node.func) in IMPORTERS:
                name = node.args[0] if node.args else None
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield node, name.value

    def dotted(self, node: ast.AST) -> str | None:
        """Return the full name of what an expression stands for, e.g. `torch.nn.functional.relu`.

        Follows imports, `name = module.thing` and `getattr` with a literal; None where the
        expression is no chain of names. A name of unknown origin stands for itself.
        """
        return _dotted(node, self._names)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Full name by local name, wherever in the file it is bound."""
        names: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.split(".")[0]
                    names[local] = alias.name if alias.asname else local
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in self.nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = _dotted(node.value, names)
                if value and _first_name(node.value) in names:
                    names[node.targets[0].id] = value
        return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        value, name = node.value, node.attr
    elif isinstance(node, ast.Call) and _is_getattr(node):
        value, name = node.args[0], ast.literal_eval(node.args[1])
    else:
        return None
    owner = _dotted(value, names)
    return f"{owner}.{name}" if owner else None


def _first_name(node: ast.AST) -> str | None:
    """Return the name that a chain of attributes starts with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_getattr(node: ast.Call) -> bool:
    """Return whether this is `getattr(owner, "name", ...)`."""
    return (
        isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
        and isinstance(node.args[1].value, str)
    )
