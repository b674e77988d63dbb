"""State of which one part alone is in few bits, to see what each costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest.mock import patch

from torch import Tensor

from shampoo_core import moments, statistics, storage
from shampoo_core.preconditioners import factor_matrices

Part = Literal["factors", "roots", "bases", "first", "second"]
"""Factors, their roots or bases, first and second moments."""


@contextmanager
def coded_alone(part: Part | None) -> Iterator[None]:
    """Let an optimizer that is made meanwhile keep everything but ``part`` dense; None changes nothing.

    No option of the library does that, so its stores are replaced where they are made.
    """

    def own(of: str, asked: Any) -> Any:
        return asked if of == part else "dense"

    def factor_store(stack_set: Any, sizes: Any, kept: Any) -> Any:
        return storage.factor_store(stack_set, sizes, own("factors", kept))

    def matrix_store(stack_set: Any, sizes: Any, kept: Any, kind: storage.MatrixKind) -> Any:
        return storage.matrix_store(stack_set, sizes, own(kind, kept), kind)

    def stack_store(
        initial: Sequence[Tensor], kept: Any, kind: storage.MomentKind, decay: float
    ) -> Any:
        return storage.stack_store(initial, own(kind, kept), kind, decay)

    with ExitStack() as replaced:
        if part is not None:
            replaced.enter_context(patch.object(statistics, "factor_store", factor_store))
            replaced.enter_context(patch.object(factor_matrices, "matrix_store", matrix_store))
            replaced.enter_context(patch.object(moments, "stack_store", stack_store))
        yield
