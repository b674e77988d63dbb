"""English prose that every Python installation carries: its documentation.

The language reference (`pydoc_data.topics`) and the docstrings of the standard library's
top-level modules. Every release of Python has its own text, hence its own sentences in its own order and
splits: results of two releases do not compare. `fingerprint` says which text a run has seen.
"""

import ast
import functools
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?:;,])\s+")
_EDGE_MARKS = "\"'`*()[].,;:!?"
_SEED = 30240


def _docstrings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


@functools.cache
def documents() -> tuple[str, ...]:
    """Return the documents: topics of the reference by title, then each file's docstrings.

    Parts of a document are separated by empty lines.

    Raises:
        RuntimeError: If this Python comes without its documentation or library sources.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(
            "this Python lacks pydoc_data, whose text the workload needs: install the complete "
            "standard library (on Debian: libpython3-stdlib)."
        ) from error
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in library.glob("*.py") if not file.name.startswith("_"))
    if len(files) < 50:
        raise RuntimeError(f"the standard library's sources are not in {library}.")
    texts = [topics[title] for title in sorted(topics)]
    texts += ["\n\n".join(_docstrings(file)) for file in files]
    return tuple(text for text in texts if text)


@functools.cache
def fingerprint() -> str:
    """Return a short hash of the texts, which is recorded beside results and targets."""
    return hashlib.sha256("\0".join(documents()).encode()).hexdigest()[:16]


def _clauses(text: str) -> Iterator[list[str]]:
    """Yield the parts between punctuation that consist of plain words, in lower case."""
    for paragraph in re.split(r"\n\s*\n", text):
        for clause in _SENTENCE_END.split(" ".join(paragraph.split())):
            words = [word.strip(_EDGE_MARKS) for word in clause.lower().split()]
            if words and all(_WORD.fullmatch(word) for word in words):
                yield words


@functools.cache
def sentences(min_words: int = 4, max_words: int = 14) -> tuple[str, ...]:
    """Return distinct clauses of plain words, shuffled by a fixed seed.

    Args:
        min_words: Shortest clause.
        max_words: Longest clause.
    """
    clauses = (words for text in documents() for words in _clauses(text))
    fitting = (" ".join(words) for words in clauses if min_words <= len(words) <= max_words)
    # A dictionary keeps the order of first occurrence.
    distinct = list(dict.fromkeys(fitting))
    random.Random(_SEED).shuffle(distinct)
    return tuple(distinct)
