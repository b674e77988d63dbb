"""A parameter group and the engines that step it, held together."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from shampoo_core.allocation import make_engines
from shampoo_core.checkpoint import (
    ARRIVALS,
    block_names,
    block_views,
    matching_entries,
    without_training_weights,
)
from shampoo_core.engine import Engine
from shampoo_core.exchange.choice import Exchanges
from shampoo_core.groups import CHANGEABLE, OWNER, check_rates, state_dtype
from shampoo_core.refresh import SMALLEST_SHARE

LOGGER = logging.getLogger("shampoo_core")


Arrivals = Mapping[tuple[int, ...], list[Engine]]
"""Parameters whose state was allocated together, and their engines."""


class Fitted(NamedTuple):
    """Engines, and tensors of their state each with the saved one that it is to become."""

    arrivals: Arrivals
    engines: list[Engine]
    """All of these."""
    pairs: list[tuple[Tensor, Tensor]]


class GroupEngines:
    """The engines of a parameter group, and what of the group their state was made for.

    Attributes:
        group: The group as `torch.optim.Optimizer` holds it.
        constants: Options that cannot change any more, as they were when the group was added. Schedulers
            that cycle momentum overwrite ``betas`` in the group, which then says nothing of the state.
        engines: In the order in which they were made; see `adopt`.
    """

    engines: list[Engine]

    def __init__(self, group: dict[str, Any], options: Sequence[str], exchanges: Exchanges) -> None:
        """Allocate state for the parameters that require a gradient.

        Args:
            group: A parameter group, checked.
            options: Names of all options.
            exchanges: Say how each parameter is distributed.
        """
        self.group = group
        self.constants = {name: group[name] for name in options if name not in CHANGEABLE}
        self._exchanges = exchanges
        self._parameters: tuple[Tensor, ...] = tuple(group["params"])
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._overwritten: set[str] = set()
        self._warn_of_coarse_weights()
        self.adopt({})
        self.allocate([i for i, p in enumerate(self._parameters) if p.requires_grad])
        self._warn_of_waiting_ranks()

    def adopt(self, arrivals: Arrivals) -> None:
        """Step the group with these engines from now on."""
        self._arrivals = dict(arrivals)
        self._known = {index for indices in arrivals for index in indices}
        self.engines = [engine for engines in arrivals.values() for engine in engines]
        number_of = {index: number for number, some in enumerate(arrivals) for index in some}
        self.group[ARRIVALS] = [number_of.get(i, -1) for i in range(len(self._parameters))]

    def allocate(self, indices: Sequence[int]) -> None:
        """Allocate this rank's share of the state of some more parameters, by index in the group."""
        if indices:
            self.adopt({**self._arrivals, tuple(indices): self._make(indices)})

    def newcomers(self, gradients: Sequence[Tensor | None]) -> list[int]:
        """Indices of parameters that have a gradient for the first time."""
        return [
            index
            for index, gradient in enumerate(gradients)
            if gradient is not None and index not in self._known and gradient.numel() > 0
        ]

    def is_of(self, group: Mapping[str, Any]) -> bool:
        """Whether this is the group, with the parameters that it was added with."""
        parameters = group["params"]
        return (
            group is self.group
            and len(parameters) == len(self._parameters)
            and all(map(operator.is_, parameters, self._parameters))
        )

    def check_shapes(self) -> None:
        """Compare the shapes of parameters with those that blocks were made for.

        Raises:
            RuntimeError: One has got another shape.
        """
        shapes = [parameter.shape for parameter in self._parameters]
        if shapes == self._shapes:  # in every step, so in one comparison
            return
        index = next(i for i, shape in enumerate(shapes) if shape != self._shapes[i])
        raise RuntimeError(
            f"{OWNER}: parameter {index} of a group has shape {tuple(shapes[index])} and had "
            f"{tuple(self._shapes[index])} when it was added, which its state belongs to; make a new "
            "optimizer after a model has changed"
        )

    def warn_of_overwritten_options(self) -> None:
        """Warn, once of each, of options that were changed in the group to no effect."""
        for name, value in self.constants.items():
            now = self.group[name]
            if now is not value and now != value and name not in self._overwritten:
                self._overwritten.add(name)
                LOGGER.warning(
                    "%s: %s of a parameter group was set to %r and stays %r: it is read when the group is "
                    "added%s",
                    *(OWNER, name, now, value),
                    ". Schedulers that cycle momentum take cycle_momentum=False"
                    if name == "betas"
                    else "",
                )

    def _warn_of_coarse_weights(self) -> None:
        """Warn where rounded training weights would lead evaluated ones away, which are made of them."""
        averaging = self.group["averaging"]
        if averaging is None or not averaging.extrapolates:
            return
        coarse = {str(p.dtype) for p in self._parameters if p.dtype != state_dtype(p)}
        if coarse:
            LOGGER.warning(
                "%s: averaging %s evaluates weights beyond the training weights, and rounding hides small "
                "steps of parameters in %s: evaluated weights drift the other way. Keep parameters in "
                "float32, under autocast if need be, or take WeightEMA",
                *(OWNER, type(averaging).__name__, ", ".join(sorted(coarse))),
            )

    def _warn_of_waiting_ranks(self) -> None:
        """Warn, on the first rank, where ranks would wait for the few that have something to refresh."""
        refresh = self.group["refresh"]
        together = getattr(refresh, "ranks", None)
        has_factors = hasattr(self.group["preconditioner"], "storage")
        divisions = [engine.division for engine in self.engines]
        num_owners = max((len(division.by_rank) for division in divisions), default=1)
        if together is None or not has_factors or together >= num_owners or divisions[0].rank:
            return
        layouts = [layout for division in divisions for layout in division.whole.layouts]
        matrices = [one for one in layouts if len(one.block_shape) > 1]  # vectors have no factor
        work = sum(one.num_blocks * sum(float(d) ** 3 for d in one.block_shape) for one in matrices)
        if work <= SMALLEST_SHARE:  # all at once, so that all have work
            return
        LOGGER.warning(
            "%s: %s makes few factors due at a step, and all %d ranks that share the work wait for their "
            "owners; give it ranks=%d",
            *(OWNER, refresh, num_owners, num_owners),
        )

    def described(self) -> dict[str, Any]:
        """The group with the options that its state was made with."""
        return {**self.group, **self.constants}

    def fitted(
        self,
        number: int,
        states: Sequence[Mapping[str, Tensor]],
        arrivals: Sequence[int],
        *,
        is_complete: bool | None,
    ) -> Fitted:
        """Engines that a saved state fits: of parameters that had state then, allocated together as then.

        One that had none yet comes in with its next gradient, as it did then. Nothing is changed yet, see
        `adopt`.

        Args:
            number: Of the group, for messages.
            states: Saved state by parameter.
            arrivals: Saved with the group; the same on all ranks, which need the same engines.
            is_complete: Whether the state is that of all ranks; None if nobody knows, as of torch's
                helpers, which leave out what is frozen here.

        Raises:
            ValueError: It does not fit; the message names the parameter and the entry.
        """
        left_out = set()
        if is_complete is None:
            left_out = {i for i, p in enumerate(self._parameters) if not p.requires_grad}
        arrived = {i for i, number in enumerate(arrivals) if number >= 0} - left_out
        # What ranks read each for itself is of the blocks that they own here.
        is_of_ranks = self._exchanges.group is not None and (
            not is_complete or self._were_read_by_ranks(states)
        )
        if is_of_ranks and self._known - left_out == arrived:
            fitting = self._arrivals
        else:
            together = (
                tuple(i for i in sorted(arrived) if arrivals[i] == number)
                for number in sorted({arrivals[i] for i in arrived})
            )
            fitting = {some: self._arrivals.get(some) or self._make(some) for some in together}
        engines = [engine for some in fitting.values() for engine in some]
        views = views_of(engines)
        pairs = []
        for index, state in enumerate(states):
            if index in left_out and not without_training_weights(state):
                continue
            pairs += matching_entries(
                f"{OWNER}: group {number}, parameter {index}",
                views.get(index, {}),
                state,
                block_names(engines, index),
                is_complete=is_complete,
            )
        return Fitted(fitting, engines, pairs)

    def _were_read_by_ranks(self, states: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether of a complete state each rank was given its own blocks alone; the same on all ranks.

        As by `torch.distributed.checkpoint.load`. Where one rank has all blocks it cannot tell.
        """
        if not any(engine.division.is_shared for engine in self.engines):
            return False
        views = views_of(self.engines)
        return all(
            without_training_weights(state).keys() <= views.get(index, {}).keys()
            for index, state in enumerate(states)
        )

    def _make(self, indices: Sequence[int]) -> list[Engine]:
        return list(make_engines(self.described(), indices, self._exchanges))


def check_unchanged(owned: Sequence[GroupEngines], groups: Sequence[Mapping[str, Any]]) -> None:
    """Compare parameter groups with what engines were made for.

    Raises:
        RuntimeError: A group or a parameter in one is another, or has another shape, so that the state is
            not its own.
    """
    if len(owned) != len(groups) or not all(map(GroupEngines.is_of, owned, groups)):
        raise RuntimeError(
            f"{OWNER}: a parameter group, or a parameter in one, was removed or replaced, and the state "
            "belongs to what was there; add groups by add_param_group(), freeze parameters that are to "
            "stay by requires_grad_(False), or make a new optimizer"
        )
    for own in owned:
        own.check_shapes()
        own.warn_of_overwritten_options()


def check_ready(owned: Sequence[GroupEngines], groups: Sequence[Mapping[str, Any]]) -> None:
    """Check all that a step goes by, before any group has taken its part of it.

    Raises:
        RuntimeError: See `check_unchanged`.
        TypeError: See `check_rates`.
        ValueError: Likewise.
    """
    check_unchanged(owned, groups)
    for own in owned:
        check_rates(own.group)


def views_of(engines: Sequence[Engine]) -> dict[int, dict[str, Tensor]]:
    """Views of the state of engines by parameter; empty for parameters whose blocks others own."""
    views: dict[int, dict[str, Tensor]] = {}
    for engine in engines:
        for index in engine.division.whole.parameters:
            views.setdefault(index, {})
        for index, entries in block_views(engine).items():
            views[index].update(entries)
    return views
