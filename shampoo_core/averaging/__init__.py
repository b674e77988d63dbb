"""Momentum and iterate averaging: what happens between a search direction and the weights.

A rule turns the direction P into the change of the training weights, and may keep other weights to be
evaluated. Every rule works on stacks and gates by block: a closed block neither moves nor averages.

| rule            | training weights y            | evaluated weights x                     |
|-----------------|-------------------------------|-----------------------------------------|
| Descent         | y - lr P                      | y                                       |
| HeavyBall       | y - lr (momentum of P)        | y                                       |
| ScheduleFree    | (1-b) z + b x                 | x <- (1-c) x + c z, c from the rates    |
| PrimalAveraging | (1-mu_y) z + mu_y x           | x <- mu_x x + (1-mu_x) z                |
| WeightEMA       | y - lr P                      | exponential moving average of y         |
| LatestWeight... | y - lr P                      | mean of the latest copies of y          |

with z <- z - lr P, the fast iterate.
"""

from shampoo_core.averaging.base import (
    AveragingConfig,
    AveragingRule,
    Descent,
    StepOptions,
    TrainingWeights,
    Update,
)
from shampoo_core.averaging.fast_iterate import PrimalAveraging, ScheduleFree
from shampoo_core.averaging.heavy_ball import HeavyBall
from shampoo_core.averaging.weight_average import LatestWeightAverage, WeightEMA

__all__ = [
    "AveragingConfig",
    "AveragingRule",
    "Descent",
    "HeavyBall",
    "LatestWeightAverage",
    "PrimalAveraging",
    "ScheduleFree",
    "StepOptions",
    "TrainingWeights",
    "Update",
    "WeightEMA",
]
