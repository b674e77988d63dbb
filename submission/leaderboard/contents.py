"""What belongs into the entry's folder: everything `submission.py` imports of ours, and no more.

In this repository the library stands beside the submission, as a package of its own. On the
leaderboard one folder holds everything, and it is imported as `submissions.external_tuning.NAME`
or wherever else it is mounted; a top-level name of ours could collide with another entry's. So the
copies import the library by its place relative to them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CORE, ENTRY = "shampoo_core", "submission"
ENTRY_FILE = "submission.py"
#: The repository, or whatever folder holds both packages.
ROOT = Path(__file__).resolve().parents[2]

_FROM_CORE = re.compile(rf"^(\s*from )({CORE})((?:\.\w+)*)(?= import\b)", re.MULTILINE)


@dataclass(frozen=True)
class Module:
    """A file of ours and its place in the entry's folder.

    Attributes:
        source: The file.
        place: Its path in the folder: the submission's files lie at the top, the library below.
    """

    source: Path
    place: Path

    def text(self) -> str:
        """Return the file's text with imports of the library made relative.

        Raises:
            ValueError: The library is imported in a form that has no relative equivalent.
        """
        # From the library's own files up to its top, from the submission's files up to the folder.
        up = len(self.place.parts) - (self.place.parts[0] == CORE)
        top = "." * up if self.place.parts[0] == CORE else "." * up + CORE

        def relative(match: re.Match[str]) -> str:
            return match[1] + (top + match[3] if top.endswith(CORE) else top + match[3][1:])

        text = _FROM_CORE.sub(relative, self.source.read_text(encoding="utf-8"))
        for name in _imported_names(ast.parse(text)):
            if name.split(".")[0] in (CORE, ENTRY):
                raise ValueError(
                    f"{self.source} imports {name} by its full name; in the entry's folder only "
                    f"`from {CORE}... import ...` and relative imports can be resolved"
                )
        return text


def entry_modules(root: Path = ROOT) -> list[Module]:
    """Return the files that `submission.py` needs, itself first.

    Args:
        root: Folder with the packages `submission` and `shampoo_core`.
    """
    found: dict[Path, Module] = {}
    waiting = [root / ENTRY / ENTRY_FILE]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        inside_core = file.is_relative_to(root / CORE)
        found[file] = Module(file, file.relative_to(root if inside_core else root / ENTRY))
        waiting += _files_imported_by(file, root)
    return list(found.values())


def third_party_packages(modules: list[Module]) -> list[str]:
    """Return the top-level names of packages that are neither ours nor Python's own, sorted."""
    names = {
        name.split(".")[0]
        for module in modules
        for name in _imported_names(ast.parse(module.source.read_text(encoding="utf-8")))
    }
    return sorted(names - sys.stdlib_module_names - {CORE, ENTRY, ""})


def _files_imported_by(file: Path, root: Path) -> Iterator[Path]:
    """Yield the files of ours that a file imports, the `__init__.py` on their way included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            start = file.parents[node.level - 1]
        elif (node.module or "").split(".")[0] in (CORE, ENTRY):
            start = root
        else:
            continue
        target = start.joinpath(*(node.module or "").split("."))
        packages = [target, *target.parents]
        yield from (
            folder / "__init__.py"
            for folder in packages
            if folder.is_relative_to(root / CORE) or folder == root / ENTRY
            if (folder / "__init__.py").is_file()
        )
        for path in (target, *(target / alias.name for alias in node.names)):
            if path.with_suffix(".py").is_file():
                yield path.with_suffix(".py")


def _imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of modules that absolute imports ask for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
