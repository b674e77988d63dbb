"""May a folder be made where a flag says so: looked at before anything is done."""

import tempfile
from pathlib import Path

from workloads_smoke.errors import UserError


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written to; leaves nothing behind.

    Args:
        folder: Where results shall go; need not exist.
        flag: Name of the flag that says so, with its dashes.

    Raises:
        UserError: A file is in the way, or the system refuses.
    """
    for path in (folder, *folder.parents):
        if path.is_dir():
            _try_to_write(path, flag)
            return
        if path.exists() or path.is_symlink():
            raise UserError(f"{flag}: {path} is no folder; move it away or name another folder")


def check_deletable(folder: Path) -> None:
    """Refuse to delete what a link leads to; what lies elsewhere may be more than these results.

    Raises:
        UserError: The folder is a symbolic link.
    """
    if folder.is_symlink():
        raise UserError(
            f"--overwrite deletes no folder behind a symbolic link, and {folder} is one to"
            f" {folder.resolve()}; remove the link, or name another folder"
        )


def _try_to_write(folder: Path, flag: str) -> None:
    """Rights alone do not tell: root has them all, and some systems make no folders."""
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}: nothing can be written in {folder} ({error.strerror}); name another folder"
        ) from error
