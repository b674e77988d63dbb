"""What a CPU does otherwise than an accelerator, undone."""

from __future__ import annotations

import pytest

from shampoo_core import gradients, grams
from shampoo_core.exchange import local
from shampoo_core.preconditioners import readiness
from shampoo_core.solvers import orthogonal_iteration, scaling


def imitate_an_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Nothing is done otherwise because the device is a CPU, where operations and looks cost little."""
    patch.setattr(grams, "ON_CPU", grams.ON_ACCELERATOR)
    patch.setattr(local, "_in_passes", lambda *_: False)
    patch.setattr(scaling, "_norm_is_slow", lambda *_: False)
    patch.setattr(readiness, "_looks_cost_nothing", lambda *_: False)
    patch.setattr(orthogonal_iteration, "prefers_products", lambda *_: True)
    patch.setattr(gradients.GradientGuard, "_are_seen_to_be_good", lambda *_: False)
