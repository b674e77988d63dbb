"""Adam in one pass: against the formula, and where steps take it and where they must not."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quadratic import gradient, optimizer_for, parameters, run
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_core import (
    AdaGradConfig,
    AdamConfig,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
    RMSpropConfig,
    RMSpropGrafting,
    ScheduleFree,
    ShampooConfig,
    StaggeredRefresh,
)
from shampoo_core.fused_adam import average_and_scale
from shampoo_core.gradients import GradientGuard

TAKEN: dict[str, dict[str, Any]] = {
    "adam": {"preconditioner": AdamConfig()},
    "uncorrected": {"preconditioner": AdamConfig(), "bias_correction": False},
    "without momentum": {"preconditioner": AdamConfig(), "betas": (0.0, 0.9)},
    "looking ahead": {"preconditioner": AdamConfig(), "beta3": 0.5},
    "last gradient": {"preconditioner": AdamConfig(), "beta3": 0.0},
    "looking ahead as v0.5": {
        "preconditioner": AdamConfig(), "beta3": 0.5, "momentum_normaliser": "algoperf_v05",
    },
    "large eps": {"preconditioner": AdamConfig(), "eps": 0.1},
    "rmsprop": {"preconditioner": RMSpropConfig()},
    "schedule-free": {
        "preconditioner": AdamConfig(), "betas": (0.0, 0.9), "averaging": ScheduleFree(),
    },
    "shampoo": {},
    "shampoo, packed": {"preconditioner": ShampooConfig(storage="packed")},
    "shampoo, l2": {"weight_decay": 0.1, "weight_decay_kind": "l2"},
    "shampoo, rmsprop graft": {"grafting": RMSpropGrafting()},
    "eigenvalue-corrected": {"preconditioner": EigenvalueCorrectedConfig()},
    "soap": {"preconditioner": EigenvalueCorrectedConfig(lagged=True)},
    "per-factor": {"preconditioner": PerFactorCorrectedConfig()},
    "kl-soap": {"preconditioner": KLSOAPConfig()},
    "kl-soap without momentum": {"preconditioner": KLSOAPConfig(), "betas": (0.0, 0.9)},
}  # fmt: skip
LEFT: dict[str, dict[str, Any]] = {
    "a sum": {"preconditioner": AdaGradConfig()},
    "another exponent": {"preconditioner": EigenvalueCorrectedConfig(exponent=0.25)},
    "coded": {"preconditioner": ShampooConfig(storage="8bit")},
}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*arguments, **(keywords or {}))


@contextmanager
def expecting(passes: range) -> Iterator[None]:
    """How often the kernel may be called inside the block."""
    with _Operations() as operations:
        yield
    assert operations.names["_fused_adamw_"] in passes, operations.names


SOME, NONE = range(1, 9), range(1)


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.3, 0.9, 0.999]),
    st.sampled_from([0.5, 0.99]),
    st.sampled_from([1e-8, 0.1]),
)
def test_it_is_the_formula(sizes: list[int], beta1: float, beta2: float, eps: float) -> None:
    """For any length: torch's kernel takes the numbers beyond a multiple of 16 in another way."""
    generator = torch.Generator().manual_seed(sum(sizes))
    gradients, averages, squares, directions = (
        [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        for _ in range(4)
    )
    squares = [s.square() for s in squares]
    gains = [g.square() for g in gradients]
    expected_averages = [
        beta1 * m + (1 - beta1) * g for m, g in zip(averages, gradients, strict=True)
    ]
    expected_squares = [beta2 * v + (1 - beta2) * g for v, g in zip(squares, gains, strict=True)]
    expected = [
        m / (v.sqrt() + eps) for m, v in zip(expected_averages, expected_squares, strict=True)
    ]
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        made = [
            [tensor.to(dtype, copy=True) for tensor in some]
            for some in (gradients, averages, squares, directions)
        ]
        average_and_scale(*made, betas=(beta1, beta2), eps=eps)
        for actual, wanted in zip(
            made, (gradients, expected_averages, expected_squares, expected), strict=True
        ):
            torch.testing.assert_close(actual, [w.to(dtype) for w in wanted], rtol=rtol, atol=rtol)


@given(st.integers(0, 70), st.sampled_from([torch.float32, torch.float64]))
def test_a_direction_may_be_put_where_the_gradient_is(size: int, dtype: torch.dtype) -> None:
    """To the last bit what it is elsewhere, for any length and magnitude."""
    generator = torch.Generator().manual_seed(size)
    gradient, average, square = torch.randn(3, size, generator=generator, dtype=dtype).unbind()
    gradient = gradient * 10.0 ** (30 * torch.rand(size, generator=generator, dtype=dtype) - 15)
    ways = []
    for in_place in (False, True):
        g, m, v = gradient.clone(), average.clone(), square.square()
        p = g if in_place else torch.zeros_like(g)
        average_and_scale([g], [m], [v], [p], betas=(0.9, 0.99), eps=1e-8)
        ways.append((m, v, p))
    assert all(map(torch.equal, *ways))


def test_without_momentum_gradients_are_their_own_average() -> None:
    gradients = [torch.randn(37), torch.randn(3, 16)]
    before = [g.clone() for g in gradients]
    squares, directions = ([torch.zeros_like(g) for g in gradients] for _ in range(2))
    average_and_scale(gradients, gradients, squares, directions, betas=(0.0, 0.75), eps=1e-8)
    assert all(map(torch.equal, gradients, before))
    torch.testing.assert_close(directions, [2 * g.sign() for g in gradients])


def test_it_may_be_imported_in_inference_mode() -> None:
    """As by a function that evaluates, the first to need it."""
    spec = importlib.util.find_spec(average_and_scale.__module__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with torch.inference_mode():
        spec.loader.exec_module(module)
    gradients, averages, squares = ([torch.ones(3)] for _ in range(3))
    module.average_and_scale(gradients, averages, squares, gradients, betas=(0.9, 0.99), eps=1e-8)
    torch.testing.assert_close(gradients, [torch.ones(3)])


@pytest.mark.parametrize("name", TAKEN)
def test_a_step_in_one_pass_is_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"refresh": FixedRefresh(4, 2), **TAKEN[name]}
    ways = []
    for passes in (SOME, NONE):
        if passes is NONE:
            monkeypatch.setattr(GradientGuard, "_are_seen_to_be_good", lambda *_: False)
        params = parameters()
        optimizer = optimizer_for(params, **options)
        run(optimizer, params, range(1, 3))
        with expecting(passes):
            run(optimizer, params, range(3, 4))
        run(optimizer, params, range(4, 9))
        states = [optimizer.state[p][k] for p in params for k in sorted(optimizer.state[p])]
        ways.append([*(p.detach() for p in params), *states])
    torch.testing.assert_close(*ways, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LEFT)
def test_other_formulas_do_not_take_it(name: str) -> None:
    params = parameters()
    optimizer = optimizer_for(params, **LEFT[name])
    with expecting(NONE):
        run(optimizer, params, range(1, 4))


@pytest.mark.parametrize(
    "config", [ShampooConfig(), PerFactorCorrectedConfig()], ids=["shampoo", "per-factor"]
)
def test_a_refresh_of_much_comes_before_the_direction(config: Any) -> None:
    """Both take memory; a refresh of few factors takes little."""
    for refresh, passes in ((FixedRefresh(4), NONE), (StaggeredRefresh(100), SOME)):
        params = parameters(((20, 30), (17, 17), (40, 9)))
        optimizer = optimizer_for(params, preconditioner=config, refresh=refresh)
        run(optimizer, params, range(1, 4))
        with expecting(passes):
            run(optimizer, params, range(4, 5))


@pytest.mark.parametrize("what", ["missing", "not finite"])
def test_a_closed_block_keeps_it_away_while_weights_differ(what: str) -> None:
    """Until weights of averages are alike again, to the last bit."""
    params = parameters()
    optimizer = optimizer_for(params, betas=(0.9, 0.5))
    run(optimizer, params, range(1, 3))
    for index, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 3, index)
    params[1].grad = None if what == "missing" else params[1].grad * torch.inf
    with expecting(NONE):
        optimizer.step()
    with expecting(NONE):
        run(optimizer, params, range(4, 5))
    run(optimizer, params, range(5, 70))
    with expecting(SOME):
        run(optimizer, params, range(70, 71))


def test_without_corrections_weights_do_not_matter() -> None:
    params = parameters()
    optimizer = optimizer_for(params, grafting=RMSpropGrafting())
    run(optimizer, params, range(1, 3))
    params[1].grad = torch.full_like(params[1], torch.nan)
    optimizer.step()
    with expecting(SOME):
        run(optimizer, params, range(4, 5))


@pytest.mark.parametrize("sides", ["first", "last"])
def test_gradients_of_other_strides_are_stepped_alike(
    sides: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacks that were rotated along some of many axes can be views that lie otherwise in memory."""
    config = EigenvalueCorrectedConfig(sides=sides, max_factor_dimension=5)
    ways = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(GradientGuard, "_are_seen_to_be_good", lambda *_: False)
        params = parameters(((4, 3, 5, 6), (6, 7)))
        optimizer = optimizer_for(params, preconditioner=config, refresh=FixedRefresh(2))
        run(optimizer, params, range(1, 7))
        ways.append([p.detach() for p in params])
    torch.testing.assert_close(*ways, rtol=1e-9, atol=1e-11)


def test_weights_that_somebody_wrote_to_keep_it_away() -> None:
    """As where one parameter starts anew: with the weights of another its step was too long."""
    params = parameters()
    optimizer = optimizer_for(params, preconditioner=AdamConfig(), weight_decay=0.0)
    run(optimizer, params, range(1, 6))
    before = params[1].detach().clone()
    for tensor in optimizer.state[params[1]].values():
        tensor.zero_()
    with expecting(NONE):
        run(optimizer, params, range(6, 7))
    steps = (params[1].detach() - before).abs()
    torch.testing.assert_close(steps, torch.full_like(steps, optimizer.param_groups[0]["lr"]))
