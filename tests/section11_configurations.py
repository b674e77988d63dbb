"""How shampoo_core is asked for each case of ALGORITHMS.md section 11."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from reference.section11 import Case
from torch import Tensor

from shampoo_core import (
    AdaGradGrafting,
    AdamConfig,
    AdamGrafting,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    HeavyBall,
    KLShampooConfig,
    PrimalAveraging,
    RMSpropGrafting,
    ScheduleFree,
    SGDGrafting,
    ShampooConfig,
)
from shampoo_core.solvers import BasisResult, EighSolver, OrthogonalIterationSolver

Options = dict[str, Any]

GRAFTINGS = {
    "adam": lambda o: AdamGrafting(o["grafting_beta2"], o["grafting_eps"]),
    "rmsprop": lambda o: RMSpropGrafting(o["grafting_beta2"], o["grafting_eps"]),
    "adagrad": lambda o: AdaGradGrafting(o["grafting_eps"]),
    "sgd": lambda o: SGDGrafting(),
}


@dataclass(frozen=True)
class UnsortedIterationSolver:
    """``Q <- qr(A Q).Q`` with the columns as they stand, as the published KL-Shampoo code has it.

    Unsorted columns converge slower than those of `OrthogonalIterationSolver`, or not at all.
    """

    warm_starts: ClassVar[bool] = True

    def without_fallback(self) -> UnsortedIterationSolver:
        """It has none."""
        return self

    def basis(self, matrices: Tensor, warm_start: Tensor | None = None) -> BasisResult:
        """See `shampoo_core.solvers.BasisSolver`; all matrices are accepted."""
        if warm_start is None:
            return EighSolver().basis(matrices)
        basis = torch.linalg.qr(torch.bmm(matrices, warm_start)).Q
        values = (basis * torch.bmm(matrices, basis)).sum(-2)
        return BasisResult(basis, values, torch.ones(len(basis), dtype=torch.bool))

    def bases(
        self,
        batches: Sequence[Tensor],
        warm_starts: Sequence[Tensor] | None = None,
        *,
        overwrite: bool = False,
    ) -> list[BasisResult]:
        """See `shampoo_core.solvers.BasisSolver`; does not overwrite."""
        del overwrite
        starts = [None] * len(batches) if warm_starts is None else warm_starts
        return [self.basis(*pair) for pair in zip(batches, starts, strict=True)]


def configuration(case: Case) -> Options:
    """Arguments of `DistributedShampoo` for a case."""
    options = dict(case.options)
    arguments: Options = {
        "lr": options["lr"],
        "betas": options["betas"],
        "eps": options["eps"],
        "weight_decay": options.get("weight_decay", 0.0),
        "weight_decay_kind": options.get("weight_decay_type", "decoupled"),
        "beta3": options.get("beta3"),
        "grafting": None,
        "refresh": FixedRefresh(options.get("interval", 1), options.get("start", 1)),
    }
    if options.get("v05_normaliser"):
        arguments["momentum_normaliser"] = "algoperf_v05"
    if "grafting" in options:
        arguments["grafting"] = GRAFTINGS[options["grafting"]](options)
    if "momentum" in options:
        arguments["averaging"] = HeavyBall(
            options["momentum"], options["dampening"], options["nesterov"]
        )
    if case.averaging.get("method") == "PrimalAveraging":
        arguments["averaging"] = PrimalAveraging(
            case.averaging["mu_x"], case.averaging["mu_y"], case.averaging["decay_at"]
        )
    return arguments | METHODS[case.method](options)


def schedule(case: Case, step: int) -> dict[str, float]:
    """What the caller sets before a step, counted from 1: warm-up, and how SOAP corrects for bias."""
    lr: float = case.learning_rates[step - 1] if case.learning_rates else case.options["lr"]
    decay: float = case.options.get("weight_decay", 0.0)
    if case.method == "SOAP" and step > 1:
        # Its code has the correction in the step size, and eps beside the uncorrected root.
        beta1, beta2 = case.options["betas"]
        correction = (1.0 - beta2 ** (step - 1)) ** 0.5 / (1.0 - beta1 ** (step - 1))
        return {"lr": lr * correction, "weight_decay": decay / correction}
    return {"lr": lr * min(1.0, step / case.options.get("warmup_steps", 1)), "weight_decay": decay}


def _shampoo(options: Options) -> Options:
    return {"preconditioner": ShampooConfig(ridge=options["eps"], exponent=options.get("exponent"))}


def _meta_kl_shampoo(options: Options) -> Options:
    return {"preconditioner": ShampooConfig(ridge=options["eps"], statistics="whitened")}


def _eshampoo(options: Options) -> Options:
    return {"preconditioner": EigenvalueCorrectedConfig(second_moments="keep")}


def _soap(options: Options) -> Options:
    soap = EigenvalueCorrectedConfig(
        solver=OrthogonalIterationSolver(max_iterations=1),
        second_moments="permute",
        lagged=True,
        factor_decay=options["factor_beta"],
    )
    return {
        "preconditioner": soap,
        "weight_decay_kind": "decoupled_after",
        "bias_correction": False,
    }


def _kl_shampoo(options: Options) -> Options:
    kl = KLShampooConfig(solver=UnsortedIterationSolver(), second_moments="keep", lagged=True)
    return {
        "preconditioner": kl,
        "weight_decay_kind": "decoupled_after",
        "bias_correction": False,
    }


def _schedule_free_adamw(options: Options) -> Options:
    interpolation, beta2 = options["betas"]
    return {
        "preconditioner": AdamConfig(),
        "averaging": ScheduleFree(interpolation),
        "betas": (0.0, beta2),
    }


METHODS: dict[str, Callable[[Options], Options]] = {
    "Shampoo": _shampoo,
    "MetaKLShampoo": _meta_kl_shampoo,
    "EShampoo": _eshampoo,
    "SOAP": _soap,
    "KLShampoo": _kl_shampoo,
    "ScheduleFreeAdamW": _schedule_free_adamw,
}
