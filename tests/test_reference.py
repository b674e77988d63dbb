"""The float64 references against the document, torch.optim and the identities they must obey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.algebra import Array
from reference.compare import assert_close, gradients, trajectory
from reference.method import Method
from reference.section11 import CASES, W0, Case

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**16)
FEW = settings(max_examples=25, deadline=None)


def torch_trajectory(
    make: Callable[..., torch.optim.Optimizer], start: Array, inputs: list[Array], **options: Any
) -> Array:
    parameter = torch.tensor(start.copy(), requires_grad=True)
    optimizer = make([parameter], **options)
    path = []
    for gradient in inputs:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
    return np.stack(path)


# --- the document -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_section_11(case: Case) -> None:
    method = getattr(reference, case.method)(W0, **case.options)
    if case.averaging:
        options = dict(case.averaging)
        method = getattr(reference, options.pop("method"))(method, **options)
    for gradient, lr in case.inputs():
        parameter = method.step(gradient, lr)
    assert_close(parameter.ravel(), case.expected, case.tolerance)
    if case.expected_x is not None:
        assert_close(method.evaluation.ravel(), case.expected_x, case.tolerance)


def test_section_11_is_complete() -> None:
    """14 parameter rows after three steps, 5 after five, 2 of v0.5; two rows add x."""
    assert len({case.name for case in CASES}) == len(CASES) == 14 + 5 + 2
    assert sum(case.expected_x is not None for case in CASES) == 2


# --- torch.optim, where the rule is the same --------------------------------------------------

TORCH_TWINS = [
    (
        torch.optim.AdamW,
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        reference.AdamW,
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ),
    (
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        reference.AdamW,
        {
            "lr": 0.02,
            "betas": (0.8, 0.95),
            "eps": 1e-6,
            "weight_decay": 0.1,
            "weight_decay_type": "l2",
        },
    ),
    (
        torch.optim.RMSprop,
        {"lr": 0.02, "alpha": 0.95, "eps": 1e-6},
        reference.RMSprop,
        {"lr": 0.02, "betas": (0.0, 0.95), "eps": 1e-6},
    ),
    (
        torch.optim.Adagrad,
        {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.1},
        reference.AdaGrad,
        {
            "lr": 0.02,
            "betas": (0.0, 1.0),
            "eps": 1e-6,
            "weight_decay": 0.1,
            "weight_decay_type": "l2",
        },
    ),
    (
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        reference.SGD,
        {
            "lr": 0.02,
            "betas": (0.0, 1.0),
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.1,
            "weight_decay_type": "l2",
        },
    ),
    (
        torch.optim.SGD,
        {"lr": 0.02, "momentum": 0.9},
        reference.SGD,
        {"lr": 0.02, "betas": (0.0, 1.0), "momentum": 0.9},
    ),
]


@pytest.mark.parametrize(
    ("theirs", "their_options", "ours", "our_options"),
    TORCH_TWINS,
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_equals_torch(
    theirs: Any, their_options: dict[str, Any], ours: Any, our_options: dict[str, Any]
) -> None:
    inputs = gradients((3, 4), 12)
    start = np.linspace(-1, 1, 12).reshape(3, 4)
    expected = torch_trajectory(theirs, start, inputs, **their_options)
    assert_close(trajectory(ours(start, **our_options), inputs), expected)


def test_nadam_numerator_equals_torch() -> None:
    """PyTorch divides the two terms of NAdam apart; recombined they must be the same numerator.

    With a huge ``momentum_decay`` torch's mu is beta1, and its first moment is
    ``(1-b) G / (1-b^t) + b M / (1-b^(t+1))``; ours is ``((1-b) G + b M) / (1-b^(t+1))`` or, in the
    v0.5 form, over ``1-b^t``. torch keeps the product of its mu in float32: hence 1e-6.
    """
    b, lr, eps = 0.8, 0.02, 1e-8
    inputs, start = gradients((3, 4), 10), np.zeros((3, 4))
    options: dict[str, Any] = {"lr": lr, "betas": (b, 0.95), "eps": eps}
    expected = torch_trajectory(torch.optim.NAdam, start, inputs, **options, momentum_decay=1e5)
    second = np.zeros((3, 4))
    exact = reference.AdamW(start, beta3=b**2, **options)
    faithful = reference.AdamW(start, beta3=b**2, v05_normaliser=True, **options)
    before = {"torch": start, "exact": start, "v05": start}
    for t, (gradient, theirs) in enumerate(zip(inputs, expected, strict=True), start=1):
        second = 0.95 * second + 0.05 * gradient**2
        scale = np.sqrt(second / (1 - 0.95**t)) + eps
        shift = (1 - b) * gradient * (1 / (1 - b**t) - 1 / (1 - b ** (t + 1)))
        after = {"torch": theirs, "exact": exact.step(gradient), "v05": faithful.step(gradient)}
        moment = {name: (before[name] - after[name]) / lr * scale for name in after}
        assert_close(moment["exact"] + shift, moment["torch"], 1e-6)
        assert_close(moment["v05"] * (1 - b**t), moment["exact"] * (1 - b ** (t + 1)), 1e-10)
        before = after


# --- identities -------------------------------------------------------------------------------


@FEW
@given(SHAPES, SEEDS)
def test_sgd_graft_keeps_the_norm(shape: tuple[int, ...], seed: int) -> None:
    method = reference.Shampoo(
        np.zeros(shape), lr=1.0, betas=(0.0, 0.9), eps=1e-6, grafting="sgd", ridge="absolute"
    )
    previous = np.zeros(shape)
    for gradient in gradients(shape, 3, seed):
        now = method.step(gradient)
        np.testing.assert_allclose(
            np.linalg.norm(now - previous), np.linalg.norm(gradient), rtol=1e-10
        )
        previous = now


@FEW
@given(SHAPES, SEEDS)
def test_eshampoo_with_all_axes_ignored_is_adam(shape: tuple[int, ...], seed: int) -> None:
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    inputs = gradients(shape, 5, seed)
    axes = range(len(shape))
    eshampoo = reference.EShampoo(np.ones(shape), ignored_axes=axes, **options)
    adam = reference.AdamW(np.ones(shape), **options)
    assert_close(trajectory(eshampoo, inputs), trajectory(adam, inputs))


@pytest.mark.parametrize(
    "method", [reference.Shampoo, reference.EShampoo, reference.PerFactorCorrected]
)
@pytest.mark.parametrize("grafting", [None, "adam"])
def test_before_start(method: Any, grafting: str | None) -> None:
    """Adam by graft or by identity basis; else the filtered gradient."""
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}
    inputs, start = gradients((3, 4), 6), np.ones((3, 4))
    graft = {"grafting": grafting, "grafting_beta2": 0.9, "grafting_eps": 1e-6} if grafting else {}
    tried = method(start, eps=1e-6, interval=10, **graft, **options)
    if grafting or method is reference.EShampoo:
        expected = torch_trajectory(torch.optim.AdamW, start, inputs, eps=1e-6, **options)
    else:
        expected = trajectory(reference.SGD(start, **options), inputs)
    assert_close(trajectory(tried, inputs), expected)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_shampoo_without_memory_is_spectral_descent(shape: tuple[int, int]) -> None:
    options: dict[str, Any] = {"betas": (0.0, 0.0), "bias_correction": False}
    for gradient in gradients(shape, 3):
        method = reference.Shampoo(np.zeros(shape), lr=1.0, eps=0.0, ridge="truncate", **options)
        method.rtol = 1e-10
        assert_close(-method.step(gradient), reference.polar(gradient), 1e-9)


TRANSPOSABLE: list[tuple[str, dict[str, Any]]] = [
    ("Shampoo", {"eps": 1e-6, "ridge": "absolute"}),
    ("Shampoo", {"eps": 0.0, "ridge": "truncate", "rtol": 1e-6, "grafting": "adam"}),
    ("EShampoo", {"eps": 1e-6, "start": 3, "second_moments": "transport", "interval": 3}),
    ("SOAP", {"interval": 2, "ignored_axes": ()}),
    ("MetaKLShampoo", {"eps": 1e-6, "exponent": 0.5, "ridge": "absolute"}),
    ("IdealKLShampoo", {"eps": 1e-6}),
    ("KLShampoo", {"interval": 2}),
    ("KLSOAP", {"interval": 2}),
    ("PerFactorCorrected", {"eps": 1e-6, "interval": 2, "kl": True}),
    ("Muon", {"scale": "none"}),
    ("AdamW", {}),
]


@pytest.mark.parametrize(("name", "options"), TRANSPOSABLE)
def test_transposed_problem(name: str, options: dict[str, Any]) -> None:
    """Square blocks: for others the null space of a factor has no basis of its own."""
    inputs, start = gradients((4, 4), 7), np.arange(16.0).reshape(4, 4)
    make = getattr(reference, name)
    straight = trajectory(make(start, lr=0.1, weight_decay=0.1, **options), inputs)
    turned = trajectory(
        make(start.T, lr=0.1, weight_decay=0.1, **options), [gradient.T for gradient in inputs]
    )
    assert_close(turned, straight.transpose(0, 2, 1), 1e-8)


@pytest.mark.parametrize("name", ["Shampoo", "EShampoo", "PerFactorCorrected"])
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_gradient_scale_is_irrelevant(name: str, scale: float) -> None:
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0}
    graft = {"grafting": "adam", "grafting_eps": 0.0, "interval": 2, "start": 2}
    make = getattr(reference, name)
    inputs = gradients((4, 4), 7)
    plain = trajectory(make(np.ones((4, 4)), **options, **graft), inputs)
    scaled = trajectory(make(np.ones((4, 4)), **options, **graft), [scale * g for g in inputs])
    assert_close(scaled, plain, 1e-8)


@pytest.mark.parametrize("name", ["Shampoo", "EShampoo", "IdealKLShampoo", "Muon"])
def test_ungrafted_direction_rotates_with_the_problem(name: str) -> None:
    """W -> U W V, G -> U G V gives U W' V: only a diagonal rule prefers a basis."""
    u, v = (np.linalg.qr(g)[0] for g in gradients((4, 4), 2, seed=7))
    options: dict[str, Any] = {} if name == "Muon" else {"eps": 1e-6}
    make = getattr(reference, name)
    inputs, start = gradients((4, 4), 5), np.ones((4, 4))
    plain = trajectory(make(start, lr=0.1, weight_decay=0.1, **options), inputs)
    turned = trajectory(
        make(u @ start @ v, lr=0.1, weight_decay=0.1, **options), [u @ g @ v for g in inputs]
    )
    assert_close(turned, u @ plain @ v, 1e-8)
    adam = reference.AdamW(start, lr=0.1, weight_decay=0.1)
    adam_turned = reference.AdamW(u @ start @ v, lr=0.1, weight_decay=0.1)
    difference = (
        trajectory(adam_turned, [u @ g @ v for g in inputs]) - u @ trajectory(adam, inputs) @ v
    )
    assert np.abs(difference).max() > 1e-2


@FEW
@given(st.integers(1, 4), SEEDS, st.booleans())
def test_one_element_is_adam_or_rmsprop(order: int, seed: int, bias_correction: bool) -> None:
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.0, 0.9), "eps": 0.0}
    inputs, start = gradients((1,) * order, 5, seed), np.ones((1,) * order)
    twin: type[Method] = reference.AdamW if bias_correction else reference.RMSprop
    expected = trajectory(twin(start, **options), inputs)
    shampoo = reference.Shampoo(start, bias_correction=bias_correction, **options)
    assert_close(trajectory(shampoo, inputs), expected, 1e-10)
    eshampoo = reference.EShampoo(start, bias_correction=bias_correction, **options)
    assert_close(trajectory(eshampoo, inputs), expected, 1e-10)
