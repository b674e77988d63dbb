"""Where the time of a step goes, by wrapping the functions that do each part of it.

    collect      gradients into stacks, and the guard
    statistics   Gram matrices into factors
    refresh      roots and bases, and what is carried into new bases
    graft        moments: momentum, Adam's direction or the step length
    apply        the rest of the preconditioner: products with roots or bases
    update       the rest of the step: averaging, decay, weights

Time spent in a part that another part called counts for the inner one alone.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from shampoo_core import DistributedShampoo
from shampoo_core.filtering import GradientFilter
from shampoo_core.gradients import GradientGuard
from shampoo_core.grafting import SecondMomentScaling
from shampoo_core.preconditioners import grafted
from shampoo_core.preconditioners.diagonal import Diagonal
from shampoo_core.preconditioners.eigenvalue_corrected import EigenvalueCorrected
from shampoo_core.preconditioners.factor_matrices import FactorMatrices
from shampoo_core.preconditioners.kl import KLShampoo
from shampoo_core.preconditioners.kl_factors import KLFactors
from shampoo_core.preconditioners.per_factor import PerFactorCorrected
from shampoo_core.preconditioners.shampoo import Shampoo
from shampoo_core.preconditioners.spectral import Spectral
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import KroneckerFactors

METHODS = (Shampoo, EigenvalueCorrected, KLShampoo, PerFactorCorrected, Spectral, Diagonal)
PARTS: dict[str, list[tuple[Any, str]]] = {
    "collect": [(StackSet, "gather"), (GradientGuard, "close_bad_blocks")],
    "statistics": [(KroneckerFactors, "absorb"), (KLFactors, "absorb")],
    "refresh": [
        (FactorMatrices, "stale"),
        (Shampoo, "_refresh_roots"),
        (EigenvalueCorrected, "_turn"),
        (KLShampoo, "_turn"),
        (PerFactorCorrected, "_refresh_bases"),
    ],
    "graft": [
        (GradientFilter, "filter"),
        (SecondMomentScaling, "absorb"),
        (SecondMomentScaling, "direction"),
        (grafted, "lengths_of"),
        (grafted, "lend_lengths"),
    ],
    "apply": [(method, "step") for method in METHODS],
    "update": [(DistributedShampoo, "step")],
}


class PhaseClock:
    """Seconds of the processor by part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is added to that of a part."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        return wrapper

    def _charge(self) -> None:
        """Give the time since the last call to the part that was running."""
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@contextlib.contextmanager
def phases() -> Iterator[PhaseClock]:
    """Measure the parts of all steps inside the block."""
    clock = PhaseClock()
    with contextlib.ExitStack() as patches:
        for part, places in PARTS.items():
            for owner, name in places:
                wrapped = clock.timed(part, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, wrapped))
        yield clock
