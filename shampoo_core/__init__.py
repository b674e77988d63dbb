"""Distributed Shampoo: blocked, batched by block shape, every state in a checkpoint.

Everything a user needs is exported here; `DistributedShampoo` is the place to start reading.
"""

from shampoo_core.averaging import HeavyBall, PrimalAveraging, ScheduleFree, WeightEMA
from shampoo_core.grafting import AdaGradGrafting, AdamGrafting, RMSpropGrafting, SGDGrafting
from shampoo_core.optimizer import DistributedShampoo
from shampoo_core.preconditioners.eigenvalue_corrected import EigenvalueCorrectedConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig
from shampoo_core.refresh import AdaptiveRefresh, FixedRefresh, StaggeredRefresh
from shampoo_core.solvers import EighSolver

__all__ = [
    "AdaGradGrafting",
    "AdamGrafting",
    "AdaptiveRefresh",
    "DistributedShampoo",
    "EigenvalueCorrectedConfig",
    "EighSolver",
    "FixedRefresh",
    "HeavyBall",
    "PrimalAveraging",
    "RMSpropGrafting",
    "SGDGrafting",
    "ScheduleFree",
    "ShampooConfig",
    "StaggeredRefresh",
    "WeightEMA",
]
