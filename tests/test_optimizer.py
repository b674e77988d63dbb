"""The optimizer against AdamW and against one plain float64 matrix at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from quadratic import assert_same, gradient, optimizer_for, parameters, run

from shampoo_core import (
    AdamConfig,
    AdamGrafting,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    HeavyBall,
    SGDGrafting,
    ShampooConfig,
    SpectralConfig,
    StaggeredRefresh,
)

NEVER = FixedRefresh(10**6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_before_preconditioning_starts_it_is_adamw(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    optimizer = optimizer_for(ours, refresh=NEVER, **options)
    adamw = torch.optim.AdamW(theirs, **options)
    for step in range(1, 51):
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            left.grad = gradient(left, step, index)
            right.grad = left.grad.clone()
        optimizer.step()
        adamw.step()
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize("shape", [(20, 30), (33, 9), (4, 3, 3, 3), (40, 5, 5, 5), (17, 17)])
def test_blocks_agree_with_one_matrix_at_a_time(shape: tuple[int, ...], cut: str) -> None:
    (parameter,) = parameters([shape])
    options = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = optimizer_for(
        [parameter],
        cut=cut,
        eps=1e-10,
        refresh=FixedRefresh(4, start=6),
        preconditioner=ShampooConfig(rank_tolerance=1e-9),
        **options,
    )

    def plain(block: np.ndarray) -> Any:
        if block.ndim == 1:
            return reference.AdamW(block, eps=1e-10, **options)
        return reference.Shampoo(
            block, interval=4, start=6, ridge="truncate", rtol=1e-9, eps=0.0,
            grafting="adam", grafting_beta2=0.95, **options,
        )  # fmt: skip

    blocked = reference.Blocked(
        parameter.detach().numpy(), plain, max_block_size=16, target_order=2, cut=cut
    )
    for step in range(1, 31):
        parameter.grad = gradient(parameter, step, 0)
        blocked.step(parameter.grad.numpy())
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), blocked.parameter, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("sides", "axis"), [("first", 0), ("last", 1)])
def test_one_sided_preconditioning_has_the_exponent_of_one_factor(sides: str, axis: int) -> None:
    (parameter,) = parameters([(6, 9)])
    optimizer = optimizer_for(
        [parameter], weight_decay=0.0, refresh=FixedRefresh(3, 12), grafting=None,
        preconditioner=ShampooConfig(sides=sides, rank_tolerance=1e-9),  # type: ignore[arg-type]
    )  # fmt: skip
    oracle = reference.Shampoo(
        parameter.detach().numpy(), lr=0.01, interval=3, start=12, ridge="truncate", rtol=1e-9,
        eps=0.0, exponent={2: {axis: 0.5, 1 - axis: 0.0}},
    )  # fmt: skip
    for step in range(1, 25):
        parameter.grad = gradient(parameter, step, 0)
        optimizer.step()
        oracle.step(parameter.grad.numpy())
    np.testing.assert_allclose(parameter.detach().numpy(), oracle.parameter, rtol=0, atol=1e-9)


def test_long_axes_get_no_factor_by_rule() -> None:
    (parameter,) = parameters([(6, 40)])
    config = ShampooConfig(max_factor_dimension=10)
    optimizer = optimizer_for([parameter], max_block_size=None, preconditioner=config)
    names = {name for name in optimizer.state[parameter] if ".factors.axis" in name}
    assert names == {"block.0.0.factors.axis0"}
    run(optimizer, [parameter], range(1, 4))


def test_transposing_the_problem_transposes_the_answer() -> None:
    (upright,) = parameters([(12, 20)])
    lying = torch.nn.Parameter(upright.detach().T.contiguous())
    options = {"refresh": FixedRefresh(3, 1), "max_block_size": 32}
    first, second = optimizer_for([upright], **options), optimizer_for([lying], **options)
    for step in range(1, 12):
        upright.grad = gradient(upright, step, 0)
        lying.grad = upright.grad.T.contiguous()
        first.step()
        second.step()
    assert_same([upright], [lying.T], 1e-10)


def test_sgd_grafting_keeps_the_length_of_every_block() -> None:
    (parameter,) = parameters([(8, 12)])
    before = parameter.detach().clone()
    optimizer = optimizer_for(
        [parameter], lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, grafting=SGDGrafting(),
        refresh=FixedRefresh(1),
    )  # fmt: skip
    parameter.grad = gradient(parameter, 1, 0)
    optimizer.step()
    moved = torch.linalg.vector_norm(parameter.detach() - before)
    torch.testing.assert_close(moved, torch.linalg.vector_norm(parameter.grad))


def test_a_blocked_parameter_is_its_blocks_alone() -> None:
    (whole,) = parameters([(32, 16)])
    halves = [torch.nn.Parameter(half.clone()) for half in whole.detach().split(16)]
    one, two = (
        optimizer_for([whole], refresh=FixedRefresh(2)),
        optimizer_for(halves, refresh=FixedRefresh(2)),
    )
    for step in range(1, 9):
        whole.grad = gradient(whole, step, 0)
        for half, part in zip(halves, whole.grad.split(16), strict=True):
            half.grad = part.clone()
        one.step()
        two.step()
    assert_same([whole], [torch.cat(list(halves))])


def test_staggered_refresh_preconditions_every_block_within_an_interval() -> None:
    params = parameters([(48, 48)])
    optimizer = optimizer_for(params, refresh=StaggeredRefresh(5))
    run(optimizer, params, range(1, 6))
    done = [
        value
        for name, value in optimizer.state[params[0]].items()
        if name.split(".")[3:4] == ["refreshes"]
    ]
    assert len(done) == 18
    assert all(value == 1 for value in done)


def test_groups_override_everything() -> None:
    params = parameters()
    optimizer = optimizer_for(
        [
            {"params": params[:2], "lr": 0.5, "grafting": SGDGrafting(), "max_block_size": 8},
            {"params": params[2:], "preconditioner": ShampooConfig(exponent=0.5)},
        ],
        refresh=FixedRefresh(2),
    )
    expected = parameters()
    first = optimizer_for(
        expected[:2], lr=0.5, grafting=SGDGrafting(), max_block_size=8, refresh=FixedRefresh(2)
    )
    second = optimizer_for(
        expected[2:], preconditioner=ShampooConfig(exponent=0.5), refresh=FixedRefresh(2)
    )
    for step in range(1, 6):
        for index, (left, right) in enumerate(zip(params, expected, strict=True)):
            left.grad = gradient(left, step, index)
            right.grad = left.grad.clone()
        for each in (optimizer, first, second):
            each.step()
    assert_same(params, expected)


@pytest.mark.parametrize("method", [ShampooConfig(), EigenvalueCorrectedConfig()])
def test_parameters_of_a_group_may_have_blocks_of_their_own_size(method: Any) -> None:
    sizes = [16, 4, 8, None, 16, 8, 16]
    together, apart = parameters(), parameters()
    options: dict[str, Any] = {
        "preconditioner": method,
        "refresh": FixedRefresh(3, start=8),
    }  # by when factors have full rank
    optimizer = optimizer_for([{"params": together, "max_block_size": sizes}], **options)
    groups = [
        {"params": [weight], "max_block_size": size}
        for weight, size in zip(apart, sizes, strict=True)
    ]
    expected = optimizer_for(groups, **options)
    run(optimizer, together, range(1, 15))
    run(expected, apart, range(1, 15))
    assert_same(together, apart, 1e-10)
    resumed = parameters()
    again = optimizer_for([{"params": resumed, "max_block_size": tuple(sizes)}], **options)
    again.load_state_dict(optimizer.state_dict())
    assert all(
        torch.equal(entry, again.state[new][name])
        for old, new in zip(together, resumed, strict=True)
        for name, entry in optimizer.state[old].items()
    )


def test_block_sizes_that_do_not_fit_are_named_and_add_no_group() -> None:
    optimizer = optimizer_for(parameters())
    message = r"max_block_size has 2 entries for the 3 parameters of the group; give one for each"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(
            {"params": parameters([(3, 3), (4,), (2, 2)]), "max_block_size": [2, 3]}
        )
    with pytest.raises(ValueError, match=r"max_block_size\[1\] must be at least 1, got 0"):
        optimizer.add_param_group({"params": parameters([(3,), (4,)]), "max_block_size": [2, 0]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"max_block_size is \[.*\] here and 16 in the checkpoint"):
        optimizer_for(
            [{"params": parameters(), "max_block_size": [16, 8, 8, 8, 8, 8, 8]}]
        ).load_state_dict(optimizer.state_dict())


def test_a_parameter_without_gradient_is_left_alone_with_all_its_state() -> None:
    params = parameters()
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params, range(1, 4))
    before = params[0].detach().clone()
    state = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
    for index, parameter in enumerate(params):
        parameter.grad = None if index == 0 else gradient(parameter, 4, index)
    optimizer.param_groups[0]["step"] += 2  # to step 6, so that this one refreshes nothing
    optimizer.step()
    assert torch.equal(params[0], before)
    moments = [name for name in state if "roots" not in name and "refreshes" not in name]
    for name in moments:
        assert torch.equal(optimizer.state[params[0]][name], state[name]), name
    assert not torch.equal(params[3].detach(), parameters()[3].detach())


def test_gradients_that_come_and_go_match_each_parameter_alone() -> None:
    together, alone = parameters([(6, 6), (6, 6)]), parameters([(6, 6), (6, 6)])
    joint = optimizer_for(together, refresh=NEVER)
    single = [optimizer_for([parameter], refresh=NEVER) for parameter in alone]
    for step in range(1, 13):
        for index, (left, right) in enumerate(zip(together, alone, strict=True)):
            absent = (step + index) % 3 == 0
            left.grad = None if absent else gradient(left, step, index)
            right.grad = None if absent else left.grad
            if not absent:
                single[index].step()
        joint.step()
    assert_same(together, alone, 1e-12)


def test_frozen_parameters_cost_nothing_until_they_are_unfrozen() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params[1:], range(1, 4))
    assert params[0] not in optimizer.state
    before = params[0].detach().clone()
    params[0].requires_grad_(True)
    run(optimizer, params, range(4, 8))
    assert params[0] in optimizer.state
    assert not torch.equal(params[0], before)


def test_memory_layout_and_added_groups_do_not_change_the_result() -> None:
    plain, last = parameters([(6, 5, 3, 3), (9, 4)]), parameters([(6, 5, 3, 3), (9, 4)])
    last[0].data = last[0].data.to(memory_format=torch.channels_last)
    one = optimizer_for(plain, refresh=FixedRefresh(2))
    other = optimizer_for(last[:1], refresh=FixedRefresh(2))
    other.add_param_group({"params": last[1:]})
    run(one, plain, range(1, 7))
    run(other, last, range(1, 7))
    assert_same(plain, last, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_single_precision_state(dtype: torch.dtype) -> None:
    params, full = parameters(dtype=dtype), parameters(dtype=torch.float32)
    for left, right in zip(params, full, strict=True):
        right.data.copy_(left.data)
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    reference_run = optimizer_for(full, refresh=FixedRefresh(2))
    for index, (left, right) in enumerate(zip(params, full, strict=True)):
        left.grad = gradient(left, 1, index)
        right.grad = left.grad.float()
    optimizer.step()
    reference_run.step()
    for parameter in params:
        floating = [v for v in optimizer.state[parameter].values() if v.is_floating_point()]
        assert floating
        assert all(value.dtype == torch.float32 for value in floating)
    assert_same([p.float() for p in params], [p.to(dtype).float() for p in full], 0.04)


def test_one_process_needs_no_process_group_and_closures_work() -> None:
    params = parameters([(4, 4)])
    optimizer = optimizer_for(params)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options",
    [
        {"refresh": FixedRefresh(3)},
        {"preconditioner": EigenvalueCorrectedConfig(), "refresh": FixedRefresh(3, 1)},
        {"weight_decay": 0.1, "weight_decay_kind": "l2", "max_wave_numel": 300},
        {"preconditioner": SpectralConfig(), "averaging": HeavyBall(0.9)},
    ],
)
def test_climbing_is_descending_on_negated_gradients(options: dict[str, Any]) -> None:
    """Also where it is switched on later; missing gradients stay missing."""
    climbing, descending = parameters(), parameters()
    optimizers = optimizer_for(climbing, **options), optimizer_for(descending, **options)
    for step in range(1, 8):
        climbs = step > 2
        optimizers[0].param_groups[0]["maximize"] = climbs
        for index, (up, down) in enumerate(zip(climbing, descending, strict=True)):
            grad = None if index == step else gradient(down, step, index)
            down.grad = grad
            up.grad = grad if grad is None or not climbs else -grad
        for optimizer in optimizers:
            optimizer.step()
    assert_same(climbing, descending)
    resumed = optimizer_for(climbing, **options)
    resumed.load_state_dict(optimizers[0].state_dict())
    assert resumed.param_groups[0]["maximize"]
    torch_weight, weight = parameters([(4,)])[0], parameters([(4,)])[0]
    adamw = torch.optim.AdamW([torch_weight], lr=0.01, maximize=True)
    ours = optimizer_for([weight], preconditioner=AdamConfig(), maximize=True)
    for step in range(3):
        torch_weight.grad = weight.grad = gradient(weight, step, 0)
        adamw.step()
        ours.step()
    assert_same([weight], [torch_weight], 1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr must lie in [0.0, inf), got -0.1"),
        ({"lr": float("nan")}, ValueError, "lr must lie in [0.0, inf), got nan"),
        ({"betas": (1.0, 0.9)}, ValueError, "betas[0] must lie in [0.0, 1.0), got 1.0"),
        ({"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
        ({"eps": 0.0}, ValueError, "eps must lie in (0.0, inf), got 0.0"),
        ({"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must lie in [0.0, inf), got -1.0"),
        ({"max_block_size": 0}, ValueError, "max_block_size must be at least 1, got 0"),
        (
            {"max_block_size": 2.5},
            TypeError,
            "max_block_size must be a whole number or None, got 2.5",
        ),
        ({"cut": "evenly"}, ValueError, "cut must be one of ['balanced', 'greedy'], got 'evenly'"),
        ({"weight_decay_kind": "L2"}, ValueError, "weight_decay_kind must be one of"),
        ({"preconditioner": "shampoo"}, TypeError, "preconditioner must be one of the methods"),
        ({"refresh": 10}, TypeError, "refresh must be one of the refresh policies"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        DistributedShampoo(parameters(), **options)
    assert message in str(caught.value)


def test_other_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"complex.*torch\.view_as_real"):
        DistributedShampoo([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"unknown options \['learning_rate'\]"):
        DistributedShampoo([{"params": parameters(), "learning_rate": 0.1}])
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        FixedRefresh(0)
    with pytest.raises(ValueError, match=r"AdamGrafting: eps must lie in \(0.0, inf\), got -1.0"):
        AdamGrafting(eps=-1.0)
    with pytest.raises(ValueError, match=r"ShampooConfig: exponent must lie in \(0.0, inf\)"):
        ShampooConfig(exponent={2: -0.5})


def test_empty_and_scalar_parameters_are_fine() -> None:
    params = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.tensor(1.0))]
    optimizer = optimizer_for(params)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert params[1] < 1.0
