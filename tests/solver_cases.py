"""The solvers that tests go through, and batches of healthy matrices for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hard_matrices import with_spectrum
from torch import Tensor

from shampoo_core.solvers import (
    BasisSolver,
    ChebyshevSolver,
    CoupledNewtonSolver,
    EighSolver,
    HigherOrderNewtonSolver,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    RootSolver,
)

SOLVERS: list[RootSolver] = [
    EighSolver(),
    EighSolver(double_precision=True),
    OrthogonalIterationSolver(),
    CoupledNewtonSolver(),
    HigherOrderNewtonSolver(),
    NewtonDBSolver(),
    ChebyshevSolver(),
]
BASIS_SOLVERS: list[BasisSolver] = [EighSolver(), OrthogonalIterationSolver()]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


def batch(num_matrices: int, dtype: torch.dtype = torch.float32, side: int = 24) -> Tensor:
    """Different healthy matrices, condition about 100."""
    spectrum = np.arange(1, side + 1) ** -1.5 + 1e-3
    stack = np.stack([with_spectrum(spectrum, seed) for seed in range(num_matrices)])
    return torch.from_numpy(stack).to(dtype)
