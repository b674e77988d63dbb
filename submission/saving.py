"""Whether the run saves checkpoints, for what has to be done before rank 0 can."""

from __future__ import annotations

from absl import flags


def checkpoints_are_saved() -> bool:
    """Return what the harness was told by `--save_checkpoints`; True where nobody was asked."""
    values = flags.FLAGS
    if "save_checkpoints" not in values or not values.is_parsed():
        return True
    return bool(values["save_checkpoints"].value)
