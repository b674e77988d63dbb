"""What updates look like on their way between ranks: relative to a power of two, block by block."""

from __future__ import annotations

import pytest
import torch
from test_stacks import stack_set_of

from shampoo_core.exchange.wire import BlockFloat

PRECISION = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-5, 1.0, 1e5, 1e30])
def test_blocks_of_any_size_keep_their_digits(dtype: torch.dtype, scale: float) -> None:
    """Wherever a block lies in float32, and whatever it lies beside."""
    torch.manual_seed(0)
    tensors = [scale * torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5, 4)]
    whole = stack_set_of(tensors, 5)
    stacks = whole.gather(tensors)
    wire = BlockFloat(dtype)
    message = torch.empty(wire.length(whole), dtype=dtype)
    wire.write(whole, stacks, message)
    assert message.isfinite().all()
    for read, stack in zip(wire.read(whole, message), stacks, strict=True):
        largest = stack.abs().amax((1, 2), keepdim=True)
        assert ((read - stack).abs() <= PRECISION[dtype] * largest).all()
