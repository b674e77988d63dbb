"""The architecture as a test: who may import whom, how long a file may be, what docstrings promise."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import shampoo_core

PACKAGE = Path(shampoo_core.__file__).parent
ROOT = PACKAGE.parent

LAYERS = (
    ("config", "blocking", "fused_adam", "grams", "state_hooks", "status"),
    ("state", "costs", "live_memory"),
    ("counting", "model_shapes", "refresh"),
    ("stacks",),
    ("gradients", "solvers", "storage"),
    ("moments",),
    ("filtering",),
    ("grafting", "statistics", "weight_decay"),
    ("preconditioners", "averaging"),
    ("exchange",),
    ("engine",),
    ("groups",),
    ("allocation", "stepping", "checkpoint"),
    ("group_engines",),
    ("optimizer",),
    ("diagnostics", "plan"),
    ("__init__",),
)
"""Rooms from the ground up: a module imports only from rows above its own, or its own package."""


LONGEST_FILE = 400
"""Lines: one sitting."""


def room(path: Path) -> str:
    """The module or sub-package of shampoo_core that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            assert name.split(".")[0] not in {"submission", "workloads_smoke", "algoperf"}, path
            if name.startswith("shampoo_core."):
                rooms.add(name.split(".")[1])
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_a_module_imports_only_what_stands_below_it(path: Path) -> None:
    level = {name: row for row, names in enumerate(LAYERS) for name in names}
    own = room(path)
    assert own in level, f"{own} has no place in LAYERS"
    for other in imported_rooms(path) - {own}:
        assert level[other] < level[own], f"{own} imports {other}"


def test_no_file_is_longer_than_a_sitting() -> None:
    packages = (PACKAGE, ROOT / "submission", ROOT / "workloads_smoke", ROOT / "benchmarks")
    for path in (path for package in packages for path in package.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= LONGEST_FILE, path


def test_workloads_never_import_the_submission() -> None:
    for path in (ROOT / "workloads_smoke").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "submission" for name in names), path


@pytest.mark.parametrize("package", ["exchange", "preconditioners"])
def test_a_guide_names_every_module(package: str) -> None:
    guide = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text())) or ""
    modules = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__"}
    assert not modules - set(re.findall(r"\w+", guide))


NOT_MADE_BY_USERS = {"HealthReport"}
PROTOCOLS = {"AveragingConfig", "RefreshPolicy"}
TUPLES = {"FactorSlice", "FactorStackSize"}


@pytest.mark.parametrize(
    "name", sorted(set(shampoo_core.__all__) - NOT_MADE_BY_USERS - PROTOCOLS - TUPLES)
)
def test_class_docstrings_name_exactly_the_arguments(name: str) -> None:
    """Documented arguments and those of the constructor are the same, so that neither drifts."""
    exported = getattr(shampoo_core, name)
    arguments = [p for p in inspect.signature(exported).parameters if p != "self"]
    # An argument that a base class takes is documented there, once.
    bases = inspect.getmro(exported) if inspect.isclass(exported) else (exported,)
    text = "\n".join(base.__doc__ or "" for base in bases)
    missing = [argument for argument in arguments if f"{argument}:" not in text]
    assert not missing, f"{name} does not document {missing}"
