"""The collectives that this package uses, under the names they have in every supported torch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def start_all_gather(output: Tensor, message: Tensor, group: dist.ProcessGroup) -> Any:
    """Put the messages of all ranks, of equal length, one after the other into ``output``.

    Returns:
        What to ``wait()`` for before ``output`` is read.
    """
    # torch 2.13 deprecates the old name; 2.5 does not know the new one.
    if hasattr(dist, "all_gather_single"):
        return dist.all_gather_single(output, message, group=group, async_op=True)
    return dist.all_gather_into_tensor(output, message, group=group, async_op=True)
