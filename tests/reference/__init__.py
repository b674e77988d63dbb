"""Plain float64 references of every rule in ALGORITHMS.md: one parameter, no blocks, no batching.

Independent of ``shampoo_core`` on purpose. A class per method with ``step(gradient, lr=None)``
returning the new parameter, state in named attributes, plain numbers as arguments. ALGORITHMS.md, here and
in other tests, is the design document that gives every rule with its sources; it is kept outside the
repository.
"""

from .averaging import (
    LatestWeightAverage,
    PrimalAveraging,
    ScheduleFree,
    ScheduleFreeAdamW,
    WeightEMA,
)
from .blocked import Blocked, block_slices, chunk_sizes, merge_dims
from .diagonal import SGD, AdaGrad, AdamW, RMSprop, RowWiseAdaGrad
from .eigenvalue_corrected import SOAP, EShampoo
from .kl import KLSOAP, IdealKLShampoo, KLShampoo, MetaKLShampoo, PerFactorCorrected
from .method import FilteredGradient, Method
from .shampoo import Shampoo
from .spectral import Muon, newton_schulz, polar

__all__ = [
    "KLSOAP",
    "SGD",
    "SOAP",
    "AdaGrad",
    "AdamW",
    "Blocked",
    "EShampoo",
    "FilteredGradient",
    "IdealKLShampoo",
    "KLShampoo",
    "LatestWeightAverage",
    "MetaKLShampoo",
    "Method",
    "Muon",
    "PerFactorCorrected",
    "PrimalAveraging",
    "RMSprop",
    "RowWiseAdaGrad",
    "ScheduleFree",
    "ScheduleFreeAdamW",
    "Shampoo",
    "WeightEMA",
    "block_slices",
    "chunk_sizes",
    "merge_dims",
    "newton_schulz",
    "polar",
]
