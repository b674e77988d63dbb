"""`DistributedShampoo`: parameter groups, the step, and the state that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_core.averaging import AveragingConfig
from shampoo_core.blocking import Cut, MergeDirection
from shampoo_core.checkpoint import (
    ARRIVALS,
    FORMAT_VERSION,
    TRAINING_WEIGHTS,
    changed_entries,
    check_evaluated,
    check_groups,
    describe,
    gather_states,
    has_all_state,
    with_outer_entries,
)
from shampoo_core.config import MomentumNormaliser
from shampoo_core.engine import Engine
from shampoo_core.exchange.choice import Exchanges, placed_like
from shampoo_core.exchange.distribution import Distribution, checked_distribution
from shampoo_core.grafting import GraftingConfig
from shampoo_core.group_engines import Fitted, GroupEngines, check_ready, check_unchanged, views_of
from shampoo_core.groups import OWNER, check_group, check_names, check_parameters, facts
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig
from shampoo_core.refresh import FixedRefresh, RefreshPolicy
from shampoo_core.state_hooks import WithStateHooks
from shampoo_core.status import Status
from shampoo_core.stepping import Task, deliver, dense, evaluation_shifts, updates
from shampoo_core.weight_decay import WeightDecayKind


class DistributedShampoo(WithStateHooks):
    """Shampoo and its relatives, blocked, batched by block shape.

    Every option but ``params`` can be overridden in a parameter group. ``lr``, ``weight_decay`` and
    ``maximize`` are read at every step; the others when the group is added.

    Args:
        params: Parameters or parameter groups. Those that do not require a gradient get state when
            they first have one.
        lr: Learning rate, at least 0; in units of an Adam step under Adam grafting; better no tensor on a
            GPU, for which the host may wait at every step.
        betas: Decay of the filtered gradient, in [0, 1), and of the second moments, in [0, 1].
        eps: Added to the roots of second moments, positive.
        weight_decay: At least 0.
        beta3: Weight of the past in the filtered gradient; None means ``betas[0]``, and
            ``betas[0] ** 2`` looks one step ahead, as NAdam does.
        weight_decay_kind: ``"decoupled"``, ``"decoupled_after"``, ``"l2"``, ``"corrected"`` or
            ``"independent"``; see `shampoo_core.weight_decay`.
        max_block_size: Longest side of a block; None preconditions whole matrices. A sequence has one
            for each parameter of a group.
        target_order: Dimensions left after merging small ones; None merges nothing.
        merge_direction: Which end merging starts from; see `merge_dimensions`.
        cut: How long sides are cut; see `cut_side`.
        preconditioner: The method.
        grafting: Where the step length comes from; ``"auto"`` leaves it to the preconditioner.
        refresh: When roots or bases are recomputed.
        averaging: Momentum on the direction, or which weights are evaluated (`shampoo_core.averaging`):
            then call `eval` before evaluating and `train` before the next step.
        bias_correction: Whether averages are divided by the weight of what they hold.
        momentum_normaliser: ``"algoperf_v05"`` divides a look-ahead gradient by 1 - beta1^t, as the
            v0.5 entry did; ``"exact"`` by the weight of what it holds.
        max_wave_numel: Bounds the memory that a step needs for a while: blocks are stepped in waves of at
            most so many numbers of a rank, due factors solved in portions of as many (or one block, one
            factor), and everything temporary of one is freed before the next. Takes 2 to 3 times the
            bytes of a wave, 3.5 at a refresh by `EighSolver`: half of the largest stack keeps a step below
            twice that. Costs some 40 operations and a message each way between ranks per wave, some 80
            and a host synchronisation per portion. None steps all at once; ``"auto"`` makes waves and
            portions of 2^27 numbers (waves of replicas: 2^28 of all ranks) where a group and rank has more;
            on one CPU of two million and of one, which are quicker. Changes results by rounding, no
            checkpoints.
        maximize: Whether to climb, as if the loss were negated.
        distributed: How ranks share the work; see `Distribution`. ``"auto"`` shares it among all
            ranks of the process group, if there is one, which have to hold the same model; None makes
            every rank work for itself. Not an option of a parameter group.

    With several ranks, `step`, `eval`, `gather_state` and adding a parameter group are collectives.

    Raises:
        TypeError: An option is of the wrong type, or a parameter is complex.
        ValueError: An option is out of range.

    Source: Shi et al. 2023 (arXiv 2309.06497); the modules of the methods name theirs.
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
        max_block_size: int | Sequence[int | None] | None = 1024,
        target_order: int | None = 2,
        merge_direction: MergeDirection = "right_to_left",
        cut: Cut = "balanced",
        preconditioner: PreconditionerConfig | None = None,
        grafting: GraftingConfig | Literal["auto"] | None = "auto",
        refresh: RefreshPolicy | None = None,
        averaging: AveragingConfig | None = None,
        bias_correction: bool = True,
        momentum_normaliser: MomentumNormaliser = "exact",
        max_wave_numel: int | Literal["auto"] | None = "auto",
        maximize: bool = False,
        distributed: Distribution | Literal["auto"] | None = "auto",
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
            max_wave_numel=max_wave_numel,
            maximize=maximize,
        )
        self._exchanges: Exchanges  # made when the groups are known
        self._owned: list[GroupEngines] = []
        self._status = Status()
        super().__init__(params, defaults)
        # Ranks that differ would wait for each other for ever: ask before anything else is sent.
        distribution = checked_distribution(OWNER, distributed)
        self._exchanges = Exchanges(OWNER, distribution, facts(self.param_groups))
        for group in self.param_groups:
            self._start(group)

    # --- groups -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; see the class for the options.

        Raises:
            TypeError: An option is of the wrong type, or a parameter is complex.
            ValueError: An option is out of range or unknown.
        """
        check_names(param_group, self.defaults)
        check_group({**self.defaults, **param_group})
        with ExitStack() as undo:
            undo.callback(self._drop_last_group, len(self.param_groups))
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            check_parameters(group)
            # Schedulers overwrite lr at once, so that its peak has to be kept here.
            group["peak_lr"] = float(group["lr"])
            group["step"] = 0
            if hasattr(self, "_exchanges"):
                self._exchanges.check_agreement(facts(self.param_groups))
                self._start(group)
            undo.pop_all()  # nothing was refused

    def _drop_last_group(self, keep: int) -> None:
        """Forget a group that was refused, if it is there already."""
        for parameter in (p for group in self.param_groups[keep:] for p in group["params"]):
            self.state.pop(parameter, None)
        del self.param_groups[keep:], self._owned[keep:]

    def _start(self, group: dict[str, Any]) -> None:
        """Allocate state for the parameters of a new group that require a gradient."""
        self._owned.append(GroupEngines(group, tuple(self.defaults), self._exchanges))
        self._show_state(self._owned[-1])

    def _show_state(self, own: GroupEngines) -> None:
        """Let ``state`` view the state of a group's engines, brought up to date; steps do not read it."""
        for index, views in views_of(own.engines).items():
            self.state[own.group["params"][index]].update(views)

    @property
    def _engines(self) -> list[list[Engine]]:
        """By parameter group."""
        return [own.engines for own in self._owned]

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
        if self._status.evaluates:
            raise RuntimeError(
                f"{OWNER}: the parameters hold the weights to evaluate; "
                "call optimizer.train() before the next step"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_replicas()
        self._status.gathered = None
        tasks: list[Task] = []
        check_ready(self._owned, self.param_groups)
        for own in self._owned:
            gradients = [dense(parameter.grad) for parameter in own.group["params"]]
            if any(gradient is not None for gradient in gradients):
                newcomers = own.newcomers(gradients)
                if newcomers:
                    own.allocate(newcomers)
                    self._show_state(own)
                own.group["step"] += 1
            tasks += [Task(engine, own.group, gradients) for engine in own.engines]
        deliver(tasks, updates)
        return loss

    @torch.compiler.disable
    def _check_replicas(self) -> None:
        """At the first step: raise where ranks hold different weights."""
        if not self._status.replicas_checked:
            self._exchanges.check_replicas([p for g in self.param_groups for p in g["params"]])
            self._status.replicas_checked = True

    # --- weights to evaluate ----------------------------------------------------------------------

    @torch.no_grad()
    def eval(self) -> None:
        """Put the weights to evaluate into the parameters; the training weights are kept aside.

        Does nothing when they are there already. Without averaging both are the same.
        """
        if self._status.evaluates:
            return
        check_unchanged(self._owned, self.param_groups)
        tasks = [
            Task(engine, own.group, [])
            for own in self._owned
            for engine in own.engines
            if engine.averages
        ]
        self._status.evaluates = True
        for engine, group, _ in tasks:
            for index in engine.division.whole.parameters:
                parameter = group["params"][index]
                if TRAINING_WEIGHTS in self.state[parameter]:
                    continue  # blocks of it are in several waves
                self.state[parameter][TRAINING_WEIGHTS] = parameter.detach().clone()
                if isinstance(parameter, DTensor):
                    self._status.gathered = None  # lacks the training weights of other ranks
        deliver(tasks, evaluation_shifts, exact=True)

    @torch.no_grad()
    def train(self) -> None:
        """Put the training weights back, bit by bit as they were; nothing if they are there."""
        self._status.evaluates = False
        for parameter, state in self.state.items():
            training = state.pop(TRAINING_WEIGHTS, None)
            if training is not None:
                parameter.copy_(training)

    def __getstate__(self) -> dict[str, Any]:
        """Everything: `torch.optim.Optimizer` would copy or pickle the groups without the engines."""
        # Schedulers put a step() of their own into the instance, which would step this one for a copy.
        return {name: value for name, value in self.without_hooks().items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over everything; unpickled tensors have memory of their own, views as well."""
        super().__setstate__(state)
        for own in self._owned:
            self._show_state(own)

    # --- checkpoints ------------------------------------------------------------------------------

    @torch.no_grad()
    def gather_state(self) -> int:
        """Complete rank 0's state, so that what it saves alone has everything; a collective.

        With several ranks each has the state of its own blocks. This sends a copy of the others' to
        the memory of rank 0's host, to be called by all ranks right before rank 0 saves; the next step
        drops it. Costs nothing with one rank. Not needed for `torch.distributed.checkpoint`.

        Returns:
            Bytes that were sent to rank 0; 0 on other ranks.
        """
        group = self._exchanges.group
        if group is None:
            return 0
        for own in self._owned:
            self._show_state(own)
        states = [self.state.get(p, {}) for g in self.param_groups for p in g["params"]]
        self._status.gathered = gather_states(states, group)
        return sum(tensor.nbytes for tensor in self._status.gathered.values())

    def state_dict(self) -> dict[str, Any]:
        """State as plain tensors (views of the live ones) and numbers, without a collective.

        Complete with one rank, and on rank 0 right after `gather_state`; otherwise that of the blocks
        that this rank owns. Saved after `eval` it holds the training weights too.

        Returns:
            ``state``: per parameter index a flat dict, see `shampoo_core.checkpoint`;
            ``param_groups``: options in plain form, configurations as dicts;
            ``complete``: whether the state of all blocks is there;
            ``evaluates``: whether it was saved after `eval`; ``format_version``.
        """
        check_unchanged(self._owned, self.param_groups)
        for own in self._owned:
            self._show_state(own)
        state_dict = super().state_dict()
        state_dict["param_groups"] = [
            describe({**group, **own.constants})
            for own, group in zip(self._owned, state_dict["param_groups"], strict=True)
        ]
        state_dict["complete"] = has_all_state(self._exchanges.group, self._status.gathered)
        # Dicts of its own: train() takes entries out of those of the optimizer.
        state = {index: dict(entries) for index, entries in state_dict["state"].items()}
        for (index, name), tensor in (self._status.gathered or {}).items():
            if name != TRAINING_WEIGHTS or self._status.evaluates:  # else train() has put them back
                state[index][name] = tensor
        state_dict["state"] = state
        state_dict["evaluates"] = self._status.evaluates
        state_dict["format_version"] = FORMAT_VERSION
        return self.hooked_behind(state_dict)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state; nothing is changed unless all of it fits.

        Args:
            state_dict: From `state_dict` of an optimizer with the same groups and options, on any
                number of ranks. Learning rate, weight decay and step are taken from it.

        ``torch.distributed.checkpoint.load`` reads into the state itself before it calls this: after its
        refusal of other options make a new optimizer.

        After a state saved in evaluation the parameters are taken to hold evaluated weights, and
        `train` brings the training weights back.

        Raises:
            ValueError: It is of another configuration or model, or incomplete; the message names the
                difference.
        """
        state_dict = with_outer_entries(OWNER, self.hooked(state_dict))
        saved_groups = state_dict["param_groups"]
        check_unchanged(self._owned, self.param_groups)
        constants = [describe(own.constants) for own in self._owned]
        check_groups(OWNER, constants, saved_groups, [len(g["params"]) for g in self.param_groups])
        fitted: list[Fitted] = []
        kept_aside: dict[Tensor, Tensor] = {}
        complete = state_dict["complete"]
        with self._exchanges.loads_unless_refused():
            for index, (own, saved) in enumerate(zip(self._owned, saved_groups, strict=True)):
                states = [state_dict["state"].get(key, {}) for key in saved["params"]]
                fitted.append(own.fitted(index, states, saved[ARRIVALS], is_complete=complete))
                for parameter, state in zip(own.group["params"], states, strict=True):
                    if state_dict["evaluates"] and TRAINING_WEIGHTS in state:
                        kept_aside[parameter] = placed_like(parameter, state[TRAINING_WEIGHTS])
            averaged = any(engine.averages for fit in fitted for engine in fit.engines)
            check_evaluated(OWNER, state_dict["evaluates"] and averaged, kept_aside)
        self.state.clear()
        for own, fit, saved in zip(self._owned, fitted, saved_groups, strict=True):
            with torch.no_grad():
                for target, source in fit.pairs:
                    target.copy_(source)
            own.adopt(fit.arrivals)
            for engine in own.engines:
                engine.resume(saved["step"])
            own.group.update(changed_entries(own.group, own.constants, saved))
            self._show_state(own)
        for parameter, training in kept_aside.items():
            self.state[parameter][TRAINING_WEIGHTS] = training
        self._status.evaluates = state_dict["evaluates"]
        self._status.gathered = None
        self._status.replicas_checked = False
        self.call_hooks_after_loading()
