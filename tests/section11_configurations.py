"""How shampoo_core is asked for each case of ALGORITHMS.md section 11."""

from __future__ import annotations

from typing import Any

from shampoo_core import (
    AdaGradGrafting,
    AdamGrafting,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    HeavyBall,
    PrimalAveraging,
    RMSpropGrafting,
    SGDGrafting,
    ShampooConfig,
)
from reference.section11 import Case

GRAFTINGS = {
    "adam": lambda o: AdamGrafting(o["grafting_beta2"], o["grafting_eps"]),
    "rmsprop": lambda o: RMSpropGrafting(o["grafting_beta2"], o["grafting_eps"]),
    "adagrad": lambda o: AdaGradGrafting(o["grafting_eps"]),
    "sgd": lambda o: SGDGrafting(),
}


def configuration(case: Case) -> dict[str, Any]:
    """Arguments of `DistributedShampoo` for a case."""
    options = dict(case.options)
    arguments: dict[str, Any] = {
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
    arguments |= _method(case, options)
    return arguments


def _method(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    if case.averaging.get("method") == "PrimalAveraging":
        averaging = PrimalAveraging(case.averaging["mu_x"], case.averaging["mu_y"])
        shampoo = ShampooConfig(ridge=options["eps"])
        return {"preconditioner": shampoo, "averaging": averaging}
    if case.method == "Shampoo":
        return {
            "preconditioner": ShampooConfig(ridge=options["eps"], exponent=options.get("exponent"))
        }
    if case.method == "EShampoo":
        return {"preconditioner": EigenvalueCorrectedConfig(second_moments="keep")}
    if case.method == "SOAP":
        soap = EigenvalueCorrectedConfig(
            second_moments="keep", lagged=True, factor_decay=options["factor_beta"]
        )
        return {"preconditioner": soap, "weight_decay_kind": "decoupled_after"}
    raise NotImplementedError(case.method)
