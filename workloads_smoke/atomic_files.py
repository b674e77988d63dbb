"""Write a file so that a reader, or a run that was killed, finds the old one or the new one whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from workloads_smoke.errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its name only when the block ends without an error.

    Args:
        path: The file to create or to replace.
        durable: Whether to wait until the disk holds the content, so that it survives a power cut
            too; without, it survives the death of the process.

    Yields:
        A binary file in the same folder, its name hidden and ending in `.partial`. An error in the
        block removes it; a kill leaves it behind, and the next write of `path` replaces it.

    Raises:
        UserError: The system refuses: the disk is full, or the folder is not writable any more.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # nor does a system that refuses to write always delete
            partial.unlink()
        # torch.save covers the system's error by one of its archive.
        refusal = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(refusal, OSError):
            raise UserError(
                f"{path} cannot be written: {refusal.strerror or refusal}; make room or give rights, then "
                "start again: what was written before is whole"
            ) from error
        raise
    if durable:
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a text file, UTF-8, in one go."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable; not every system can, and then it is as durable as can be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
