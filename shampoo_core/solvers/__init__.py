"""Batched matrix functions of symmetric positive semi-definite matrices.

Start with :mod:`shampoo_core.solvers.base`: it states what all solvers promise.
"""

from shampoo_core.solvers.base import BasisResult, BasisSolver, RootResult, RootSolver
from shampoo_core.solvers.eigh import EighSolver

__all__ = ["BasisResult", "BasisSolver", "EighSolver", "RootResult", "RootSolver"]
