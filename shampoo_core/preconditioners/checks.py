"""Checks at the door of options that several methods share: solvers, grafting, what keeps roots finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shampoo_core.config import check_object, check_range
from shampoo_core.grafting import GraftingConfig
from shampoo_core.preconditioners.axes import ExponentOverride, Sides, inverse_exponents
from shampoo_core.solvers import BasisSolver, RootSolver
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import FactorAxis


def check_regularizers(
    owner: str, rank_tolerance: float | None, ridge: float, relative_ridge: float
) -> None:
    """Raise unless the numbers are such as solvers take: a truncation or ridges, not both.

    Raises:
        TypeError: One is not a number.
        ValueError: One is out of range, or both kinds are given.
    """
    for name, value in (("ridge", ridge), ("relative_ridge", relative_ridge)):
        check_range(owner, name, value, low=0.0, high_open=True)
    if rank_tolerance is None:
        return
    check_range(owner, "rank_tolerance", rank_tolerance, low=0.0, high=1.0, high_open=True)
    if ridge > 0.0 or relative_ridge > 0.0:
        raise ValueError(
            f"{owner}: rank_tolerance={rank_tolerance} together with ridge={ridge}, "
            f"relative_ridge={relative_ridge}: a ridge takes the place of truncation, "
            "give one of them"
        )


def check_basis_solver(owner: str, solver: BasisSolver) -> None:
    """Raise unless ``solver`` is an object that computes eigenbases.

    Raises:
        TypeError: It is something else.
    """
    wanted = "a solver that computes eigenbases, EighSolver() or OrthogonalIterationSolver()"
    check_object(owner, "solver", solver, "bases", wanted)


def check_root_solver(owner: str, solver: RootSolver, exponents: ExponentOverride) -> None:
    """Raise unless ``solver`` is an object that computes roots with the given exponents.

    Raises:
        TypeError: It is something else.
        ValueError: Its method cannot do one of the exponents.
    """
    wanted = "a solver that computes inverse roots, such as EighSolver()"
    check_object(owner, "solver", solver, "inverse_roots", wanted)
    if exponents is None:
        return
    for exponent in exponents.values() if isinstance(exponents, Mapping) else (exponents,):
        _check_exponent(owner, solver, exponent, "")


def check_default_exponents(
    owner: str,
    solver: RootSolver,
    stack_set: StackSet,
    axes: Sequence[FactorAxis],
    override: ExponentOverride,
    sides: Sides,
) -> None:
    """Raise unless ``solver`` can do the exponent of every factor.

    Args:
        owner: Class whose argument is checked, for the message.
        solver: Checked by `check_root_solver`.
        stack_set: Geometry.
        axes: From `preconditioned_axes`.
        override: See `inverse_exponents`.
        sides: Likewise.

    Raises:
        ValueError: Its method cannot do one of them; the message names a block.
    """
    exponents = inverse_exponents(stack_set, axes, override, sides)
    for axis, exponent in zip(axes, exponents, strict=True):
        shape = stack_set.layouts[axis.stack].block_shape
        why = f", of blocks {shape}; a smaller target_order makes them matrices"
        _check_exponent(owner, solver, exponent, why)


def refuse_grafting(config: object, grafting: GraftingConfig | None, reason: str) -> None:
    """Raise unless ``grafting`` is None.

    Raises:
        ValueError: Grafting was asked for.
    """
    if grafting is not None:
        raise ValueError(
            f"{type(config).__name__}: grafting must be None or 'auto', got {grafting!r}; {reason}"
        )


def _check_exponent(owner: str, solver: RootSolver, exponent: float, why: str) -> None:
    try:
        solver.check_exponent(exponent)
    except ValueError as error:
        raise ValueError(f"{owner}: solver={solver!r}: {error}{why}") from error
