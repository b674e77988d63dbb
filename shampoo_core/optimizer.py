"""`DistributedShampoo`: parameter groups, the step, and the state that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from shampoo_core.averaging import AveragingConfig, Descent
from shampoo_core.blocking import Cut, MergeDirection, Tile, merge_dimensions, tiles_of
from shampoo_core.checkpoint import (
    FORMAT_VERSION,
    block_views,
    check_entries,
    describe,
    differences,
)
from shampoo_core.config import MomentumNormaliser
from shampoo_core.engine import Engine
from shampoo_core.exchange.local import LocalExchange
from shampoo_core.grafting import GraftingConfig
from shampoo_core.groups import (
    CHANGEABLE,
    OWNER,
    check_group,
    check_parameters,
    constant_options,
    grafting_of,
    state_dtype,
    step_options,
)
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig
from shampoo_core.refresh import FixedRefresh, RefreshPolicy
from shampoo_core.stacks import StackSet
from shampoo_core.weight_decay import WeightDecayKind

TRAINING_WEIGHTS = "training_weights"
"""State entry that holds a parameter's training weights while it shows those to evaluate."""


class DistributedShampoo(torch.optim.Optimizer):
    """Shampoo and its relatives, blocked, batched by block shape.

    Every option but ``params`` can be overridden in a parameter group. ``lr`` and ``weight_decay`` are
    read at every step; the others when the group is added.

    Args:
        params: Parameters or parameter groups. Those that do not require a gradient get state when
            they first have one.
        lr: Learning rate, at least 0; in units of an Adam step under Adam grafting.
        betas: Decay of the filtered gradient, in [0, 1), and of the second moments, in [0, 1].
        eps: Added to the roots of second moments, positive.
        weight_decay: At least 0.
        beta3: Weight of the past in the filtered gradient; None means ``betas[0]``, and
            ``betas[0] ** 2`` looks one step ahead, as NAdam does.
        weight_decay_kind: ``"decoupled"``, ``"l2"``, ``"corrected"`` or ``"independent"``; see
            `shampoo_core.weight_decay`.
        max_block_size: Longest side of a block; None preconditions whole matrices.
        target_order: Dimensions left after merging small ones; None merges nothing.
        merge_direction: Which end merging starts from; see `merge_dimensions`.
        cut: How long sides are cut; see `cut_side`.
        preconditioner: The method.
        grafting: Where the step length comes from; ``"auto"`` leaves it to the preconditioner.
        refresh: When roots or bases are recomputed.
        averaging: Momentum on the direction, or which weights are evaluated; see
            `shampoo_core.averaging`. With one that averages, call `eval` before evaluating and
            `train` before the next step.
        bias_correction: Whether averages are divided by the weight of what they hold.
        momentum_normaliser: ``"algoperf_v05"`` divides a look-ahead gradient by 1 - beta1^t, as the
            v0.5 entry did; ``"exact"`` by the weight of what it holds.

    Raises:
        TypeError: An option is of the wrong type, or a parameter is complex.
        ValueError: An option is out of range.

    Source: Shi et al. 2023 (arXiv 2309.06497); ALGORITHMS.md sections 1 and 2 name the others.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        beta3: float | None = None,
        weight_decay_kind: WeightDecayKind = "decoupled",
        max_block_size: int | None = 1024,
        target_order: int | None = 2,
        merge_direction: MergeDirection = "right_to_left",
        cut: Cut = "balanced",
        preconditioner: PreconditionerConfig | None = None,
        grafting: GraftingConfig | Literal["auto"] | None = "auto",
        refresh: RefreshPolicy | None = None,
        averaging: AveragingConfig | None = None,
        bias_correction: bool = True,
        momentum_normaliser: MomentumNormaliser = "exact",
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            beta3=beta3,
            weight_decay_kind=weight_decay_kind,
            max_block_size=max_block_size,
            target_order=target_order,
            merge_direction=merge_direction,
            cut=cut,
            preconditioner=ShampooConfig() if preconditioner is None else preconditioner,
            grafting=grafting,
            refresh=FixedRefresh() if refresh is None else refresh,
            averaging=averaging,
            bias_correction=bias_correction,
            momentum_normaliser=momentum_normaliser,
        )
        self._exchange = LocalExchange()
        self._engines: list[list[Engine]] = []
        self._evaluates = False
        super().__init__(params, defaults)

    # --- groups -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see the class for the options.

        Raises:
            TypeError: An option is of the wrong type, or a parameter is complex.
            ValueError: An option is out of range or unknown.
        """
        unknown = set(param_group) - set(self.defaults) - {"params", "initial_lr", "param_names"}
        if unknown:
            raise ValueError(
                f"{OWNER}: unknown options {sorted(unknown)} in a parameter group; "
                f"known are {sorted(self.defaults)}"
            )
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_parameters(group["params"])
        # Schedulers overwrite lr at once, so that its peak has to be kept here.
        group["peak_lr"] = group["lr"]
        group["step"] = 0
        self._engines.append([])
        wanted = [i for i, p in enumerate(group["params"]) if p.requires_grad]
        self._allocate(len(self.param_groups) - 1, wanted)

    def _allocate(self, group_index: int, indices: Iterable[int]) -> None:
        """Allocate state for some parameters of a group, one engine per device and dtype."""
        group = self.param_groups[group_index]
        tiles: dict[tuple[torch.device, torch.dtype], list[Tile]] = {}
        for index in indices:
            parameter = group["params"][index]
            merged = merge_dimensions(
                tuple(parameter.shape),
                group["max_block_size"] or parameter.numel(),
                target_order=group["target_order"],
                direction=group["merge_direction"],
            )
            key = (parameter.device, state_dtype(parameter))
            tiles.setdefault(key, []).extend(
                tiles_of(index, merged, group["max_block_size"], group["cut"])
            )
        for (device, dtype), group_tiles in tiles.items():
            if not group_tiles:
                continue
            stack_set = StackSet(self._exchange.owned(group_tiles), dtype=dtype, device=device)
            preconditioner = group["preconditioner"].create(
                stack_set, constant_options(group), grafting_of(group), group["refresh"]
            )
            averaging = group["averaging"]
            rule = Descent(stack_set) if averaging is None else averaging.create(stack_set)
            engine = Engine(stack_set, preconditioner, rule, self._exchange)
            self._engines[group_index].append(engine)
            for index, views in block_views(engine).items():
                self.state[group["params"][index]].update(views)

    def _allocate_newcomers(self, group_index: int, gradients: list[Tensor | None]) -> None:
        """Allocate state for parameters that have a gradient for the first time."""
        parameters = self.param_groups[group_index]["params"]
        newcomers = [
            index
            for index, gradient in enumerate(gradients)
            if gradient is not None
            and parameters[index] not in self.state
            and parameters[index].numel() > 0
        ]
        if newcomers:
            self._allocate(group_index, newcomers)

    # --- step -------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Evaluates the loss and its gradients; called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: After `eval` without `train`.
        """
        if self._evaluates:
            raise RuntimeError(
                f"{OWNER}: the parameters hold the weights to evaluate; "
                "call optimizer.train() before the next step"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group_index, group in enumerate(self.param_groups):
            gradients = [parameter.grad for parameter in group["params"]]
            if all(gradient is None for gradient in gradients):
                continue
            self._allocate_newcomers(group_index, gradients)
            group["step"] += 1
            for engine in self._engines[group_index]:
                engine.step(group["params"], gradients, group["step"], step_options(group))
        return loss

    # --- weights to evaluate ----------------------------------------------------------------------

    @torch.no_grad()
    def eval(self) -> None:
        """Put the weights to evaluate into the parameters; the training weights are kept aside.

        Does nothing when they are there already. Without averaging both are the same.
        """
        if self._evaluates:
            return
        self._evaluates = True
        for group, engines in zip(self.param_groups, self._engines, strict=True):
            for engine in engines:
                shift = engine.evaluation_shift(group["params"])
                if shift is None:
                    continue
                for index in engine.stack_set.parameters:
                    parameter = group["params"][index]
                    self.state[parameter][TRAINING_WEIGHTS] = parameter.detach().clone()
                engine.shift(group["params"], shift)

    @torch.no_grad()
    def train(self) -> None:
        """Put the training weights back, bit by bit as they were; nothing if they are there."""
        self._evaluates = False
        for parameter, state in self.state.items():
            training = state.pop(TRAINING_WEIGHTS, None)
            if training is not None:
                parameter.copy_(training)

    def __getstate__(self) -> dict[str, Any]:
        """Everything: `torch.optim.Optimizer` would copy or pickle the groups without the engines."""
        return self.__dict__.copy()

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Complete state: plain tensors (views of the live ones) and numbers, no collective.

        Saved after `eval` it holds the training weights too.

        Returns:
            ``state``: per parameter index a flat dict, see `shampoo_core.checkpoint`;
            ``param_groups``: options in plain form, configurations as dicts.
        """
        state_dict = super().state_dict()
        state_dict["param_groups"] = [
            {name: describe(value) for name, value in group.items()}
            for group in state_dict["param_groups"]
        ]
        state_dict["evaluates"] = self._evaluates
        state_dict["format_version"] = FORMAT_VERSION
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state; nothing is changed unless all of it fits.

        Args:
            state_dict: From `state_dict` of an optimizer with the same groups and options. Learning
                rate, weight decay and step are taken from it.

        After a state saved in evaluation the parameters are taken to hold evaluated weights, and
        `train` brings the training weights back.

        Raises:
            ValueError: It is of another configuration or model; the message names the difference.
        """
        saved_groups = state_dict["param_groups"]
        self._check_groups(saved_groups)
        pairs: list[tuple[Tensor, Tensor]] = []
        kept_aside: dict[Tensor, Tensor] = {}
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            saved_states = [state_dict["state"].get(key, {}) for key in saved["params"]]
            known = [p in self.state for p in group["params"]]
            self._allocate(index, [i for i, s in enumerate(saved_states) if s and not known[i]])
            for position, (parameter, entries) in enumerate(
                zip(group["params"], saved_states, strict=True)
            ):
                own = _without_training_weights(self.state.get(parameter, {}))
                rest = _without_training_weights(entries)
                check_entries(f"{OWNER}: group {index}, parameter {position}", own, rest)
                pairs.extend((own[name], rest[name]) for name in own)
                if TRAINING_WEIGHTS in entries:
                    kept_aside[parameter] = entries[TRAINING_WEIGHTS].to(parameter, copy=True)
        with torch.no_grad():
            for target, source in pairs:
                target.copy_(source)
        for state in self.state.values():
            state.pop(TRAINING_WEIGHTS, None)
        for parameter, training in kept_aside.items():
            self.state[parameter][TRAINING_WEIGHTS] = training
        self._evaluates = state_dict["evaluates"]
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: saved[name] for name in CHANGEABLE if name in saved})

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        own_groups = self.state_dict()["param_groups"]
        if len(own_groups) != len(saved_groups):
            raise ValueError(
                f"{OWNER}: the checkpoint has {len(saved_groups)} parameter groups, "
                f"this optimizer {len(own_groups)}"
            )
        for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True)):
            if len(own["params"]) != len(saved["params"]):
                raise ValueError(
                    f"{OWNER}: group {index} has {len(saved['params'])} parameters in the "
                    f"checkpoint and {len(own['params'])} here"
                )
            found = differences(own, saved, except_for=("params", "param_names", *CHANGEABLE))
            if found:
                raise ValueError(
                    f"{OWNER}: group {index} of the checkpoint is of another configuration: "
                    + "; ".join(found)
                )


def _without_training_weights(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in entries.items() if name != TRAINING_WEIGHTS}
