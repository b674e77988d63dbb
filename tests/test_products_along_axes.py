"""Products along the axes of blocks: those of einsum, wherever the result is put."""

from __future__ import annotations

import string

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo_core.live_memory import LiveMemory
from shampoo_core.statistics import multiply_along_axes

SIDES = st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4)


def expected_of(stack: Tensor, matrices: list[Tensor | None]) -> Tensor:
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            letters = string.ascii_lowercase[: stack.dim() - 1]
            result = letters.replace(letters[axis], "z")
            stack = torch.einsum(f"N{letters},N{letters[axis]}z->N{result}", stack, matrix)
    return stack


@given(st.integers(1, 3), SIDES, st.sampled_from(["nowhere", "elsewhere", "in place"]))
def test_products_along_axes(count: int, axes: list[tuple[int, bool]], where: str) -> None:
    shape = [side for side, _ in axes]
    stack = torch.randn(count, *shape, dtype=torch.float64)
    matrices = [
        torch.randn(count, side, side, dtype=torch.float64) if has else None for side, has in axes
    ]
    expected, before = expected_of(stack, matrices), stack.clone()
    out = {"nowhere": None, "elsewhere": torch.full_like(stack, torch.nan), "in place": stack}[
        where
    ]
    result = multiply_along_axes(stack, matrices, out)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    if where != "in place":
        assert torch.equal(stack, before)
    num_products = sum(has for _, has in axes)
    if out is not None and num_products > (1 if where == "elsewhere" else 2):
        assert result.data_ptr() == out.data_ptr()


def test_a_place_for_the_result_saves_one() -> None:
    """Of blocks with three axes, too, whose three products take memory in turns."""
    for shape, without in (((2, 8, 8), 2), ((2, 8, 8, 8), 2)):
        stack = torch.randn(shape)
        matrices = [torch.randn(2, 8, 8) for _ in shape[1:]]
        for out, products in ((None, without), (torch.empty_like(stack), without - 1)):
            with LiveMemory() as memory:
                multiply_along_axes(stack, list(matrices), out)
            assert memory.peak == products * stack.nbytes, (shape, products)
