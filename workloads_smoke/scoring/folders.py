"""Folders for results, never one that exists."""

from __future__ import annotations

from pathlib import Path


def fresh_folder(parent: Path, stem: str) -> Path:
    """Make the first folder of ``stem-001``, ``stem-002``, ... that does not exist yet."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{stem}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
