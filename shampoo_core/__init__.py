"""Distributed Shampoo: blocked, batched by block shape, every state in a checkpoint.

Everything a user needs is exported here; `DistributedShampoo` is the place to start reading. A schedule of
one's own is a `RefreshPolicy`, which is given `FactorStackSize`s and answers with `FactorSlice`s.
"""

from shampoo_core.averaging import (
    AveragingConfig,
    HeavyBall,
    LatestWeightAverage,
    PrimalAveraging,
    ScheduleFree,
    WeightEMA,
)
from shampoo_core.diagnostics import HealthReport, health_report, log_health
from shampoo_core.exchange.distribution import Distribution
from shampoo_core.grafting import AdaGradGrafting, AdamGrafting, RMSpropGrafting, SGDGrafting
from shampoo_core.optimizer import DistributedShampoo
from shampoo_core.preconditioners.diagonal import (
    AdaGradConfig,
    AdamConfig,
    RMSpropConfig,
    RowWiseAdaGradConfig,
    SGDConfig,
)
from shampoo_core.preconditioners.eigenvalue_corrected import EigenvalueCorrectedConfig
from shampoo_core.preconditioners.kl import KLShampooConfig
from shampoo_core.preconditioners.kl_soap import KLSOAPConfig
from shampoo_core.preconditioners.per_factor import PerFactorCorrectedConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig
from shampoo_core.preconditioners.spectral import SpectralConfig
from shampoo_core.refresh import (
    AdaptiveRefresh,
    FactorSlice,
    FactorStackSize,
    FixedRefresh,
    RefreshPolicy,
    StaggeredAdaptiveRefresh,
    StaggeredRefresh,
)
from shampoo_core.solvers import (
    ChebyshevSolver,
    CoupledNewtonSolver,
    EighSolver,
    HigherOrderNewtonSolver,
    NewtonDBSolver,
    OrthogonalIterationSolver,
)

__all__ = [
    "AdaGradConfig",
    "AdaGradGrafting",
    "AdamConfig",
    "AdamGrafting",
    "AdaptiveRefresh",
    "AveragingConfig",
    "ChebyshevSolver",
    "CoupledNewtonSolver",
    "DistributedShampoo",
    "Distribution",
    "EigenvalueCorrectedConfig",
    "EighSolver",
    "FactorSlice",
    "FactorStackSize",
    "FixedRefresh",
    "HealthReport",
    "HeavyBall",
    "HigherOrderNewtonSolver",
    "KLSOAPConfig",
    "KLShampooConfig",
    "LatestWeightAverage",
    "NewtonDBSolver",
    "OrthogonalIterationSolver",
    "PerFactorCorrectedConfig",
    "PrimalAveraging",
    "RMSpropConfig",
    "RMSpropGrafting",
    "RefreshPolicy",
    "RowWiseAdaGradConfig",
    "SGDConfig",
    "SGDGrafting",
    "ScheduleFree",
    "ShampooConfig",
    "SpectralConfig",
    "StaggeredAdaptiveRefresh",
    "StaggeredRefresh",
    "WeightEMA",
    "health_report",
    "log_health",
]
