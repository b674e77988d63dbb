"""Bytes that a step sends: the model that plans quote and tests compare with what was sent.

Counted is what one rank has to put on the wire, in numbers of the communication dtype and including
padding. A collective that is cleverer or clumsier than its definition sends less or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def all_gather_bytes(numbers_per_rank: Sequence[int], bytes_per_number: int) -> int:
    """What each rank sends so that all ranks get all updates of replicated parameters.

    Every rank hands its segment to all others; segments are as long as the longest, for a collective
    wants them equal.

    Args:
        numbers_per_rank: Numbers in the blocks that each rank of a group owns.
        bytes_per_number: Of the communication dtype.
    """
    return (len(numbers_per_rank) - 1) * max(numbers_per_rank) * bytes_per_number


def all_to_all_bytes(
    pieces: Mapping[tuple[int, int], int], num_ranks: int, bytes_per_number: int
) -> tuple[list[int], list[int]]:
    """What each rank sends to bring sharded gradients to owners, and updates back to holders.

    Args:
        pieces: Numbers held by one rank in blocks owned by another, by (holder, owner); what a rank
            holds of its own blocks travels nowhere and may be left out.
        num_ranks: Of the group.
        bytes_per_number: Of the communication dtype.

    Returns:
        By rank: bytes towards owners, per tensor that is collected (gradients, and weights where a step
        reads them), and bytes of updates back to holders.
    """
    to_owners, to_holders = [0] * num_ranks, [0] * num_ranks
    for (holder, owner), numbers in pieces.items():
        if holder != owner:
            to_owners[holder] += numbers * bytes_per_number
            to_holders[owner] += numbers * bytes_per_number
    return to_owners, to_holders
