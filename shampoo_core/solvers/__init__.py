"""Batched matrix functions of symmetric positive semi-definite matrices.

Start with :mod:`shampoo_core.solvers.base`: it states what all solvers promise.
"""

from __future__ import annotations

from shampoo_core.solvers.base import BasisResult, BasisSolver, RootResult, RootSolver
from shampoo_core.solvers.chebyshev import ChebyshevSolver
from shampoo_core.solvers.coupled_newton import CoupledNewtonSolver, HigherOrderNewtonSolver
from shampoo_core.solvers.criterion import off_diagonal_ratio
from shampoo_core.solvers.eigh import EighSolver
from shampoo_core.solvers.newton_db import NewtonDBSolver
from shampoo_core.solvers.orthogonal_iteration import OrthogonalIterationSolver
from shampoo_core.solvers.polar import orthogonalize

__all__ = [
    "BasisResult",
    "BasisSolver",
    "ChebyshevSolver",
    "CoupledNewtonSolver",
    "EighSolver",
    "HigherOrderNewtonSolver",
    "NewtonDBSolver",
    "OrthogonalIterationSolver",
    "RootResult",
    "RootSolver",
    "off_diagonal_ratio",
    "orthogonalize",
]
