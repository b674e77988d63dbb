"""Small helpers for comparing trajectories."""

from __future__ import annotations

from typing import Any

import numpy as np

from .algebra import Array


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Array]:
    """Independent standard normal gradients."""
    return list(np.random.default_rng(seed).normal(size=(steps, *shape)))


def trajectory(method: Any, inputs: list[Array]) -> Array:
    """The parameter after every step, (steps, ...)."""
    return np.stack([method.step(gradient) for gradient in inputs])


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Largest absolute difference <= ``tolerance``."""
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=tolerance)
