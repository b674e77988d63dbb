"""The reference numbers of ALGORITHMS.md section 11 as data, for these references and shampoo_core.

Inputs are 2 x 3 matrices, not merged (target order 2) and not cut. ``options`` are arguments of the
reference class named by ``method``; where ``averaging`` is given it wraps that method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .algebra import Array

FP64_TOLERANCE = 6e-8  # values are printed with 7 decimals
FP32_TOLERANCE = 3e-6  # the row that comes from a float32 package; also asked of shampoo_core

W0: Array = np.array([[1.0, 2.0, -1.0], [3.0, -4.0, 0.5]])
G1: Array = np.array([[0.1, -0.2, 0.3], [0.4, 0.05, -0.1]])
G2: Array = np.array([[-0.2, 0.1, 0.15], [0.05, 0.3, 0.25]])
G3: Array = np.array([[0.3, 0.2, -0.1], [-0.15, 0.1, 0.05]])
GRADIENTS: tuple[Array, ...] = (G1, G2, G3, 0.5 * G1 + G2, G3 - G2)

STEPPED_LR = (0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Case:
    """One run and its result.

    Attributes:
        name: Unique, as in the document.
        method: Class name in this package.
        options: Its arguments but the parameter.
        steps: How many of GRADIENTS it sees.
        expected: The training weights afterwards (y under averaging), row-major.
        expected_x: The evaluation weights afterwards, where the document gives them.
        learning_rates: One per step, or empty for the constant ``options["lr"]``.
        averaging: Empty, or class name and arguments of the wrapper.
        tolerance: Largest absolute difference for the float64 reference.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    steps: int
    expected: tuple[float, ...]
    expected_x: tuple[float, ...] | None = None
    learning_rates: tuple[float, ...] = ()
    averaging: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = FP64_TOLERANCE

    def inputs(self) -> list[tuple[Array, float | None]]:
        """(gradient, lr) of every step; lr None where it stays at ``options["lr"]``."""
        rates = self.learning_rates or (None,) * self.steps
        return list(zip(GRADIENTS[: self.steps], rates, strict=True))


_SHAMPOO: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "interval": 1, "start": 1}
_V05: dict[str, Any] = {
    "lr": 0.1,
    "eps": 1e-8,
    "ridge": "shift_after",
    "weight_decay": 0.1,
    "weight_decay_type": "decoupled",
    "interval": 2,
    "start": 2,
}


def _after_three(
    name: str, expected: tuple[float, ...], method: str = "Shampoo", **changes: Any
) -> Case:
    return Case(name, method, _SHAMPOO | changes, 3, expected)


def _decay(kind: str, expected: tuple[float, ...]) -> Case:
    options = _SHAMPOO | {"weight_decay": 0.1, "weight_decay_type": kind}
    return Case(f"decay {kind}", "Shampoo", options, 3, expected, learning_rates=STEPPED_LR)


CASES: tuple[Case, ...] = (
    _after_three(
        "plain",
        (0.9689239, 2.0607276, -1.1859178, 2.8185442, -4.1175480, 0.4791877),
    ),
    _after_three(
        "beta2 = 1",
        (0.9732433, 2.0602338, -1.1502073, 2.8465581, -4.0802326, 0.4954582),
        betas=(0.9, 1.0),
    ),
    _after_three(
        "exponent 1/2",
        (0.9152247, 2.1965460, -1.5622627, 2.5237803, -4.3659953, 0.4291528),
        exponent=0.5,
    ),
    _after_three(
        "Adam graft",
        (0.8862323, 2.1070791, -1.2547749, 2.7741738, -4.2583458, 0.5392982),
        grafting="adam",
        grafting_beta2=0.99,
        grafting_eps=1e-8,
        interval=2,
        start=2,
    ),
    _after_three(
        "RMSprop graft",
        (0.5089239, 3.0064857, -3.4145552, 0.5022295, -5.2234050, 0.4872955),
        grafting="rmsprop",
        grafting_beta2=0.99,
        grafting_eps=1e-8,
    ),
    _after_three(
        "AdaGrad graft",
        (0.9509613, 2.1006615, -1.2410821, 2.7505098, -4.1219345, 0.4989102),
        grafting="adagrad",
        grafting_eps=1e-8,
    ),
    _after_three(
        "beta3 = .81 (NAdam form)",
        (0.9661548, 2.0284077, -1.1562145, 2.8544895, -4.1248640, 0.4652263),
        beta3=0.81,
    ),
    _decay("l2", (0.9462522, 1.9297557, -1.1075948, 2.8623911, -3.9254330, 0.5033347)),
    _decay("decoupled", (0.9614058, 2.0268683, -1.1047240, 2.8180684, -3.9821193, 0.5003138)),
    _decay("corrected", (0.9653619, 2.0352036, -1.1091579, 2.8297751, -3.9984137, 0.5024209)),
    _after_three(
        "momentum .9, dampening .1, Nesterov",
        (0.9238246, 2.1929358, -1.4798783, 2.5111924, -4.2585041, 0.4827485),
        momentum=0.9,
        dampening=0.1,
        nesterov=True,
    ),
    Case(
        "GPA",
        "Shampoo",
        _SHAMPOO | {"weight_decay": 0.1, "weight_decay_type": "decoupled"},
        3,
        (0.9871000, 2.0174060, -1.0437724, 2.9362373, -4.0022365, 0.5031011),
        (0.9935235, 2.0150404, -1.0285345, 2.9657795, -4.0072658, 0.5037979),
        learning_rates=STEPPED_LR,
        # Not decay_at="z" (three stored sequences): see AveragedMethod.
        averaging={
            "method": "PrimalAveraging",
            "mu_x": 0.9,
            "mu_y": 0.8,
            "decay_at": "z_holding_y",
        },
    ),
    _after_three(
        "EShampoo",
        (0.7487463, 3.1726891, -2.0265994, 2.9311803, -4.7372076, 0.8889402),
        "EShampoo",
    ),
    _after_three(
        "Meta-style KL, exponent 1/4",
        (0.9919284, 2.0913277, -1.1490422, 2.8866045, -4.0372540, 0.5433558),
        "MetaKLShampoo",
    ),
    *(
        Case(
            f"SOAP, weight decay {weight_decay}",
            "SOAP",
            {
                "lr": 0.1,
                "betas": (0.9, 0.99),
                "factor_beta": 0.95,
                "eps": 1e-8,
                "interval": 1,
                "weight_decay": weight_decay,
            },
            5,
            expected,
        )
        for weight_decay, expected in (
            (0.0, (1.0213011, 1.7619066, -1.2356235, 2.9648741, -4.2705380, 0.3404602)),
            (0.1, (0.9797201, 1.6888207, -1.1888087, 2.8487593, -4.1066044, 0.3268722)),
        )
    ),
    Case(
        "KL-Shampoo",
        "KLShampoo",
        {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "interval": 1, "weight_decay": 0.0},
        5,
        (0.9975652, 1.9916695, -1.0051804, 2.9991717, -4.0149148, 0.4892502),
        tolerance=FP32_TOLERANCE,
    ),
    Case(
        "Schedule-Free AdamW",
        "ScheduleFreeAdamW",
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8},
        5,
        (0.9006615, 1.9542909, -1.1502034, 2.9014522, -4.2889955, 0.4498191),
    ),
    Case(
        "Schedule-Free AdamW, warm-up, decay",
        "ScheduleFreeAdamW",
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "warmup_steps": 3, "weight_decay": 0.1},
        5,
        (0.8860091, 1.8132153, -1.0439073, 2.8933901, -4.1106607, 0.3769538),
        (0.8983707, 1.8227610, -1.0479190, 2.8947636, -4.1152363, 0.3752497),
    ),
    Case(
        "v0.5 A: Adam graft, NAdam",
        "Shampoo",
        _V05
        | {
            "betas": (0.9, 0.99),
            "beta3": 0.81,
            "v05_normaliser": True,
            "grafting": "adam",
            "grafting_beta2": 0.99,
            "grafting_eps": 1e-8,
        },
        5,
        (0.6681056, 2.0032161, -1.4044420, 2.4931615, -4.3614660, 0.4822982),
    ),
    Case(
        "v0.5 B: SGD graft, Nesterov EMA",
        "Shampoo",
        _V05
        | {
            "betas": (0.0, 0.99),
            "grafting": "sgd",
            "momentum": 0.9,
            "dampening": 0.9,
            "nesterov": True,
        },
        5,
        (0.9714380, 1.9634118, -1.0035198, 2.9307495, -3.9557032, 0.4838824),
    ),
)
