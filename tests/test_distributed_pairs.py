"""Ranks of which two and two share the work among themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import METHODS
from quadratic import SHAPES, parameters
from ranks import assert_equal_on_ranks, on_ranks
from test_distributed_sharing import counted, optimizer_of, stepped

from shampoo_core import Distribution, WeightEMA
from shampoo_core.exchange.traffic import all_gather_bytes


def in_pairs() -> dict[str, Any]:
    """Four ranks, of which two and two share the work."""
    params = parameters()
    options = {**METHODS["staggered"], "averaging": WeightEMA(0.9)}
    optimizer = optimizer_of(params, **options, distributed=Distribution(ranks_per_group=2))
    with counted() as calls:
        stepped(params, optimizer, 5)
    assert_equal_on_ranks(list(params), "pairs")
    (engine,) = optimizer._engines[0]
    sent = optimizer.gather_state()
    return {
        "weights": [p.detach() for p in params],
        "blocks": [own.num_blocks for own in engine.division.by_rank],
        "bytes": calls[-1][2],
        "modelled": all_gather_bytes([own.numel for own in engine.division.by_rank], 8),
        "keys": {index: set(e) for index, e in optimizer.state_dict()["state"].items()},
        "sent": sent,
    }


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
def test_groups_of_ranks_share_the_work(tmp_path: Path) -> None:
    params = parameters()
    optimizer = optimizer_of(params, **METHODS["staggered"], averaging=WeightEMA(0.9))
    stepped(params, optimizer, 5)
    found = on_ranks(4, tmp_path, in_pairs)
    for of_rank in found:
        for a, b in zip(of_rank["weights"], params, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)
        assert len(of_rank["blocks"]) == 2
        assert of_rank["bytes"] == of_rank["modelled"]
    expected = {index: set(e) for index, e in optimizer.state_dict()["state"].items()}
    assert found[0]["keys"] == expected
    assert found[0]["sent"] > 0
    assert len(SHAPES) == len(expected)
