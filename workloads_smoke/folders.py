"""May a folder be made where a flag says so: looked at before anything is done."""

from pathlib import Path

from workloads_smoke.errors import UserError


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder whose place, or whose way there, is taken by a file; makes nothing.

    Args:
        folder: Where results shall go; need not exist.
        flag: Name of the flag that says so, with its dashes.

    Raises:
        UserError: A file is in the way.
    """
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            raise UserError(f"{flag}: {path} is no folder; move it away or name another folder")
