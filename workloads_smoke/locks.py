"""One process a trial: a folder that is in use is refused."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import logging

from workloads_smoke.errors import UserError


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold a folder for the time of the block; the system lets go of it when the process dies.

    The folder itself is locked: no file is left behind.

    Raises:
        UserError: Another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {folder}; wait until it has ended, or start elsewhere"
            ) from None
        except OSError as error:
            # Such as NFS, which locks no folders.
            logging.warning("%s cannot be locked (%s): start nothing else in it", folder, error)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sole_user_of_trials(folders: Iterable[Path]) -> Iterator[None]:
    """Hold all trials in some workloads' folders, so that these can be deleted together.

    Raises:
        UserError: Another process holds one.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            for trial in folder.glob("trial_*"):
                stack.enter_context(sole_user(trial))
        yield


def is_in_use(folder: Path) -> bool:
    """Whether a process holds a folder."""
    try:
        with sole_user(folder):
            return False
    except UserError:
        return True
