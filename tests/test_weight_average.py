"""Averages of weights every so many steps: what they hold, and that other steps do not pay for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from quadratic import assert_same, gradient, optimizer_for, parameters
from ranks import on_ranks
from test_distributed_sharing import counted, stepped
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    LatestWeightAverage,
    WeightEMA,
)
from shampoo_core.counting import OperationCounter

INTERVAL = 3
RULES: dict[str, Any] = {
    "ema": WeightEMA(0.8, interval=INTERVAL),
    "latest": LatestWeightAverage(2, interval=INTERVAL),
}
SHAPES = [(6, 9), (40, 8), (5,)]


class PlainEMA:
    """What `WeightEMA` says, for one parameter."""

    def __init__(self, weights: Tensor) -> None:
        self.average = weights.clone()

    def contribute(self, weights: Tensor) -> None:
        self.average = 0.8 * self.average + 0.2 * weights

    def evaluated(self, weights: Tensor) -> Tensor:
        del weights
        return self.average


class PlainLatest:
    """What `LatestWeightAverage` says; copies of steps at which nothing moved are not there."""

    def __init__(self, weights: Tensor) -> None:
        del weights
        self.copies: dict[int, Tensor] = {}
        self.due = 0

    def contribute(self, weights: Tensor) -> None:
        self.copies[self.due % 2] = weights.clone()

    def evaluated(self, weights: Tensor) -> Tensor:
        copies = list(self.copies.values())
        return sum(copies[1:], copies[0]) / len(copies) if copies else weights


PLAIN: dict[str, Any] = {"ema": PlainEMA, "latest": PlainLatest}
MISSING = {(2, 0), (3, 0), (6, 1), (1, 2), (12, 1), (5, 2)}
"""Step and parameter without a gradient, or with one that is not finite."""


@pytest.mark.parametrize("how", ["missing", "not finite"])
@pytest.mark.parametrize("name", RULES)
def test_a_block_that_stands_still_when_it_is_due_contributes_nothing(name: str, how: str) -> None:
    params = parameters(SHAPES)
    optimizer = optimizer_for(params, averaging=RULES[name], weight_decay=0.1)
    plain = [PLAIN[name](parameter.detach()) for parameter in params]
    for step in range(1, 15):
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, index)
            if (step, index) in MISSING:
                parameter.grad = None if how == "missing" else parameter.grad / 0.0
        optimizer.step()
        if step % INTERVAL == 0:
            for index, (rule, parameter) in enumerate(zip(plain, params, strict=True)):
                if (step, index) not in MISSING:
                    rule.contribute(parameter.detach())
                if name == "latest":
                    rule.due += 1
        expected = [r.evaluated(p.detach()) for r, p in zip(plain, params, strict=True)]
        optimizer.eval()
        assert_same(params, expected, 1e-12)
        optimizer.train()


@pytest.mark.parametrize("name", RULES)
def test_the_average_of_a_late_parameter_starts_where_it_starts(name: str) -> None:
    """Unfrozen after four steps, and loaded with other weights before."""
    params = parameters(SHAPES)
    params[1].requires_grad_(False)
    optimizer = optimizer_for(params, averaging=RULES[name])
    plain = None
    for step in range(1, 12):
        if step == 5:
            params[1].requires_grad_(True)
            params[1].data.mul_(-2.0)
            plain = PLAIN[name](params[1].detach())
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, index) if parameter.requires_grad else None
        optimizer.step()
        if plain is not None and step % INTERVAL == 0:
            plain.contribute(params[1].detach())
            plain.due = getattr(plain, "due", 0) + 1
        expected = params[1].detach().clone()
        optimizer.eval()
        assert_same([params[1]], [expected if plain is None else plain.evaluated(expected)], 1e-12)
        optimizer.train()


def test_a_method_that_sits_out_its_first_step_has_an_average_of_the_first_weights() -> None:
    (parameter,) = parameters([(6, 9)])
    config = EigenvalueCorrectedConfig(lagged=True)
    optimizer = optimizer_for(
        [parameter], averaging=WeightEMA(0.8, interval=INTERVAL), preconditioner=config
    )
    plain = PlainEMA(parameter.detach())
    for step in range(1, 8):
        parameter.grad = gradient(parameter, step, 0)
        optimizer.step()
        if step % INTERVAL == 0:
            plain.contribute(parameter.detach())
    optimizer.eval()
    assert_same([parameter], [plain.average], 1e-12)


def operations(averaging: Any) -> list[int]:
    """Of six steps."""
    params = parameters(SHAPES)
    optimizer = optimizer_for(params, averaging=averaging, preconditioner=AdamConfig())
    counts = []
    for step in range(1, 7):
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, index)
        with OperationCounter() as counter:
            optimizer.step()
        counts.append(counter.num_operations)
    return counts


def test_steps_at_which_nothing_is_due_cost_nothing() -> None:
    """But for one vector of flags per set of stacks, of the exponential average."""
    without = operations(None)
    ema, latest = operations(RULES["ema"]), operations(RULES["latest"])
    assert [latest[step - 1] - without[step - 1] for step in (1, 2, 4, 5)] == [0] * 4
    assert [ema[step - 1] - without[step - 1] for step in (2, 4, 5)] == [1] * 3
    assert all(
        counts[step - 1] > without[step - 1] + 2 for counts in (ema, latest) for step in (3, 6)
    )


def sent_by_sharded_steps() -> list[int]:
    """Bytes that this rank sends in steps of sharded parameters."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [
        torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
        for shape in SHAPES
    ]
    optimizer = DistributedShampoo(
        params, max_block_size=16, averaging=WeightEMA(0.8, interval=INTERVAL), weight_decay=0.0
    )
    sent = []
    for _ in range(7):
        with counted() as calls:
            stepped(params, optimizer)
        sent.append(sum(size for _, _, size in calls))
    return sent[1:]  # at the first step ranks compare their weights, too


def test_weights_travel_only_at_steps_that_read_them(tmp_path: Path) -> None:
    """Gradients there and updates back; at due steps weights there as well."""
    for sent in on_ranks(2, tmp_path / "ranks", sent_by_sharded_steps):
        plain, due = sent[0], sent[1]
        assert sent == [plain, due, plain, plain, due, plain]
        assert due > plain
