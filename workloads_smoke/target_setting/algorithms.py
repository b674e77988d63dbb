"""The four standard algorithms that set targets, and the points at which each is tried.

The benchmark sets its targets with AdamW, NAdamW, Nesterov and heavy-ball momentum (Dahl et al.
2023, section 4.3); all from torch.optim here, with decoupled weight decay for the first two.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from workloads_smoke.spec import LossType

SEARCH_SEED = 1


@dataclass(frozen=True)
class Point:
    """A setting of one algorithm.

    Attributes:
        learning_rate: At the top of the schedule.
        one_minus_beta1: One minus the momentum.
        one_minus_beta2: One minus the decay of second moments; unused by momentum methods.
        weight_decay: Decoupled for the Adam family, L2 for the others.
        label_smoothing: Only other than zero with softmax cross-entropy.
    """

    learning_rate: float
    one_minus_beta1: float
    one_minus_beta2: float
    weight_decay: float
    label_smoothing: float

    def as_dict(self) -> dict[str, float]:
        """Return the setting for a JSON file."""
        return asdict(self)


Range = tuple[float, float]


@dataclass(frozen=True)
class Algorithm:
    """How to build an optimizer from a point, and the log-uniform ranges of its points."""

    build: Callable[[Iterable[nn.Parameter], Point], torch.optim.Optimizer]
    learning_rate: Range
    one_minus_beta1: Range
    one_minus_beta2: Range
    weight_decay: Range


def _adamw(parameters: Iterable[nn.Parameter], point: Point) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=point.learning_rate,
        betas=(1 - point.one_minus_beta1, 1 - point.one_minus_beta2),
        weight_decay=point.weight_decay,
    )


def _nadamw(parameters: Iterable[nn.Parameter], point: Point) -> torch.optim.Optimizer:
    return torch.optim.NAdam(
        parameters,
        lr=point.learning_rate,
        betas=(1 - point.one_minus_beta1, 1 - point.one_minus_beta2),
        weight_decay=point.weight_decay,
        decoupled_weight_decay=True,
    )


def _momentum(nesterov: bool) -> Callable[[Iterable[nn.Parameter], Point], torch.optim.Optimizer]:
    def build(parameters: Iterable[nn.Parameter], point: Point) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=point.learning_rate,
            momentum=1 - point.one_minus_beta1,
            weight_decay=point.weight_decay,
            nesterov=nesterov,
        )

    return build


_ADAM_RANGES: tuple[Range, Range, Range, Range] = (
    (5e-4, 3e-2),
    (0.05, 0.3),
    (1e-3, 2e-2),
    (1e-3, 0.5),
)
_MOMENTUM_RANGES: tuple[Range, Range, Range, Range] = (
    (3e-2, 3.0),
    (0.03, 0.3),
    (1e-3, 1e-3),
    (1e-7, 1e-3),
)

ALGORITHMS = {
    "adamw": Algorithm(_adamw, *_ADAM_RANGES),
    "nadamw": Algorithm(_nadamw, *_ADAM_RANGES),
    "nesterov": Algorithm(_momentum(nesterov=True), *_MOMENTUM_RANGES),
    "heavy_ball": Algorithm(_momentum(nesterov=False), *_MOMENTUM_RANGES),
}


def search_points(algorithm: str, count: int, loss_type: LossType) -> list[Point]:
    """Return the first points of a scrambled Sobol sequence over an algorithm's ranges.

    Args:
        algorithm: A key of `ALGORITHMS`.
        count: Number of points.
        loss_type: Decides whether label smoothing is searched over {0, 0.1}.
    """
    ranges = ALGORITHMS[algorithm]
    unit = torch.quasirandom.SobolEngine(5, scramble=True, seed=SEARCH_SEED).draw(count)
    smoothing = 0.1 if loss_type is LossType.SOFTMAX_CROSS_ENTROPY else 0.0
    points = []
    for row in unit.tolist():
        logs = (ranges.learning_rate, ranges.one_minus_beta1, ranges.one_minus_beta2)
        rate, beta1, beta2 = (_log_between(u, *r) for u, r in zip(row[:3], logs, strict=True))
        decay = _log_between(row[3], *ranges.weight_decay)
        points.append(Point(rate, beta1, beta2, decay, smoothing if row[4] > 0.5 else 0.0))
    return points


def _log_between(unit: float, low: float, high: float) -> float:
    return float(f"{low * (high / low) ** unit:.4g}")
