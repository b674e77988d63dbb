"""The engines of an optimizer side by side: one step, or one look at the weights to evaluate, of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_core.engine import Engine
from shampoo_core.exchange.base import Decay, Exchange, Request, Result
from shampoo_core.groups import step_options
from shampoo_core.solvers.precision import without_autocast


class Task(NamedTuple):
    """An engine's part of what all engines do."""

    engine: Engine
    group: dict[str, Any]
    """Its parameter group."""
    gradients: Sequence[Tensor | None]
    """By parameter of the group; where there are none at all, nothing steps."""


Results = Callable[[Exchange, list[Task]], Iterator[Result]]


def dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient as a dense tensor, made once for all waves that its blocks are in."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def deliver(tasks: Sequence[Task], results: Results, *, exact: bool = False) -> None:
    """Let engines work one after the other and exchanges deliver the results, all they have at once.

    All of it is done in the dtypes of the state, whatever autocast surrounds the call.
    What an engine that works alone collects and computes is delivered, and freed, before the next one
    begins.
    """
    rounds: dict[tuple[Exchange, Engine | None], list[Task]] = {}
    for task in tasks:
        alone = task.engine if task.engine.alone else None
        rounds.setdefault((task.engine.exchange, alone), []).append(task)
    # A user's autocast is for forward passes: here it would round products, or refuse to mix dtypes.
    with without_autocast(task.engine.division.whole.device for task in tasks):
        for (exchange, _), together in rounds.items():
            exchange.deliver(results(exchange, together), exact=exact)


def updates(exchange: Exchange, tasks: list[Task]) -> Iterator[Result]:
    """One step of every engine whose group has a gradient."""
    options = [step_options(task.group) for task in tasks]
    requests = [
        Request(
            task.engine.division,
            task.group["params"],
            task.gradients,
            task.engine.reads_weights(chosen),
        )
        for task, chosen in zip(tasks, options, strict=True)
    ]
    answers = exchange.collect(requests)
    for task, chosen, collected in zip(tasks, options, answers, strict=True):
        engine, group, gradients = task
        update = None
        if any(gradient is not None for gradient in gradients):
            if group["maximize"] and collected.gradients:  # none where others own all blocks
                torch._foreach_neg_(collected.gradients)
            update = engine.step(collected, gradients, group["step"], chosen)
        decay = Decay(engine.decay_left(chosen), chosen.lr)
        yield Result(engine.division, update, group["params"], collected.weights, decay)


def evaluation_shifts(exchange: Exchange, tasks: list[Task]) -> Iterator[Result]:
    """What brings training weights to those to evaluate."""
    requests = [Request(engine.division, group["params"], None, True) for engine, group, _ in tasks]
    for (engine, group, _), collected in zip(tasks, exchange.collect(requests), strict=True):
        shift = engine.evaluation_shift(collected.weights)
        yield Result(engine.division, shift, group["params"], collected.weights)
