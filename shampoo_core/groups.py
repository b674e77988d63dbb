"""Options of a parameter group: their defaults, their checks, and what of them a step needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from shampoo_core.averaging import StepOptions
from shampoo_core.blocking import Cut, MergeDirection
from shampoo_core.config import (
    GroupOptions,
    MomentumNormaliser,
    check_choice,
    check_count,
    check_flag,
    check_object,
    check_range,
)
from shampoo_core.grafting import GraftingConfig
from shampoo_core.weight_decay import (
    WEIGHT_DECAY_KINDS,
    check_peak,
    direction_decay,
    direction_shrink,
)

OWNER = "DistributedShampoo"

CHANGEABLE = ("lr", "weight_decay", "maximize")
"""Options that may change during training; a checkpoint sets them, as it does what is not an option:
the step, and what schedulers keep in a group. All others are part of the state's shape or meaning and
have to agree with the checkpoint's."""

CPU_WAVE_NUMEL = 2**21
"""Numbers in a wave by default on a CPU: stacks of as many are 8 MB, which the C library's allocator hands
out again and again, where larger ones come from the system, page by page, at every step."""

CPU_PORTION_NUMEL = 2**20
"""Numbers of factors that are refreshed at once by default on a CPU, which needs several times as many."""

LARGEST_WAVE_NUMEL = 2**27
"""Numbers in a wave by default elsewhere, half a GiB in float32: a step takes up to 1.9 GiB for a while,
however large the model. Products of as many numbers take thousands of times as long as the launches that
a wave adds."""

WITHOUT_MEANING = ("max_wave_numel",)
"""Options that neither results nor the state in a checkpoint depend on: they may differ from it, and
are not taken from it."""


def check_names(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse options that nobody knows.

    Raises:
        ValueError: There is one; the message names it and those that there are.
    """
    unknown = set(group) - set(defaults) - {"params", "initial_lr", "param_names"}
    if unknown:
        raise ValueError(
            f"{OWNER}: unknown options {sorted(unknown)} in a parameter group; "
            f"known are {sorted(defaults)}"
        )


def check_group(group: Mapping[str, Any]) -> None:
    """Check every option of a parameter group.

    Args:
        group: As handed to `torch.optim.Optimizer.add_param_group`, defaults filled in.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of range; the message names it, its value and the range.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(
            f"{OWNER}: lr must be a number or a tensor of one, got a tensor of shape {tuple(lr.shape)}; "
            "give parameters with rates of their own a group of their own"
        )
    check_range(OWNER, "lr", _plain(lr), low=0.0, high_open=True)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"{OWNER}: betas must be a pair of numbers, got {betas!r}")
    check_range(OWNER, "betas[0]", betas[0], low=0.0, high=1.0, high_open=True)
    check_range(OWNER, "betas[1]", betas[1], low=0.0, high=1.0)
    if group["beta3"] is not None:
        check_range(OWNER, "beta3", group["beta3"], low=0.0, high=1.0, high_open=True)
    # An element whose gradients were all zero would be 0 / 0 without eps.
    check_range(OWNER, "eps", group["eps"], low=0.0, low_open=True, high_open=True)
    check_range(OWNER, "weight_decay", _plain(group["weight_decay"]), low=0.0, high_open=True)
    check_choice(OWNER, "weight_decay_kind", group["weight_decay_kind"], WEIGHT_DECAY_KINDS)
    check_peak(OWNER, group["weight_decay_kind"], group["weight_decay"], group["lr"])
    check_block_sizes(group["max_block_size"])
    check_count(OWNER, "target_order", group["target_order"], optional=True)
    if group["max_wave_numel"] != "auto":
        check_count(OWNER, "max_wave_numel", group["max_wave_numel"], optional=True)
    check_choice(OWNER, "merge_direction", group["merge_direction"], get_args(MergeDirection))
    check_choice(OWNER, "cut", group["cut"], get_args(Cut))
    normalisers = get_args(MomentumNormaliser)
    check_choice(OWNER, "momentum_normaliser", group["momentum_normaliser"], normalisers)
    check_flag(OWNER, "bias_correction", group["bias_correction"])
    check_flag(OWNER, "maximize", group["maximize"])
    wanted = "one of the {} that shampoo_core exports"
    check_object(
        OWNER, "preconditioner", group["preconditioner"], "block_flops", wanted.format("methods")
    )
    check_object(OWNER, "refresh", group["refresh"], "due", wanted.format("refresh policies"))
    if group["grafting"] not in ("auto", None):
        check_object(
            OWNER,
            "grafting",
            group["grafting"],
            "create",
            wanted.format("graftings"),
            others=("block_flops", "reads_weights"),
        )
    if group["averaging"] is not None:
        check_object(
            OWNER, "averaging", group["averaging"], "reads_weights", wanted.format("averagings")
        )


def check_block_sizes(max_block_size: object) -> None:
    """Check one block size, or one for each parameter.

    Raises:
        TypeError: One is not a whole number.
        ValueError: One is smaller than 1.
    """
    if isinstance(max_block_size, tuple | list):
        for index, size in enumerate(max_block_size):
            check_count(OWNER, f"max_block_size[{index}]", size, optional=True)
    else:
        check_count(OWNER, "max_block_size", max_block_size, optional=True)


def block_size_of(group: Mapping[str, Any], index: int) -> int | None:
    """Longest side of a block of one of the group's parameters, None for any."""
    sizes = group["max_block_size"]
    size: int | None = sizes[index] if isinstance(sizes, tuple | list) else sizes
    return size


def check_parameters(group: Mapping[str, Any]) -> None:
    """Refuse what cannot be optimized, and options that do not fit the parameters.

    Raises:
        TypeError: A parameter is complex or not floating point; the message names its index.
        ValueError: There are more or fewer block sizes than parameters, or a parameter is there twice.
    """
    parameters, sizes = group["params"], group["max_block_size"]
    if isinstance(sizes, tuple | list) and len(sizes) != len(parameters):
        raise ValueError(
            f"{OWNER}: max_block_size has {len(sizes)} entries for the {len(parameters)} parameters of "
            "the group; give one for each, or a single number for all"
        )
    first_index: dict[Tensor, int] = {}
    for index, parameter in enumerate(parameters):
        if first_index.setdefault(parameter, index) != index:
            raise ValueError(
                f"{OWNER}: parameters {first_index[parameter]} and {index} of the group are the same "
                "tensor; give it once"
            )
        if parameter.is_complex():
            raise TypeError(
                f"{OWNER}: parameter {index} of the group is complex ({parameter.dtype}); "
                "keep a real torch.nn.Parameter of torch.view_as_real(values) in the model and apply "
                "torch.view_as_complex to it in forward"
            )
        if not parameter.is_floating_point():
            raise TypeError(
                f"{OWNER}: parameter {index} of the group has dtype {parameter.dtype}; "
                "only floating-point parameters can be optimized"
            )


def facts(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What ranks that share the work have to agree on, in words: options and parameters."""
    found = {"number of parameter groups": str(len(groups))}
    for index, group in enumerate(groups):
        parameters = group["params"]
        found[f"number of parameters of group {index}"] = str(len(parameters))
        for position, p in enumerate(parameters):
            frozen = "" if p.requires_grad else ", frozen"
            found[f"parameter {position} of group {index}"] = f"{tuple(p.shape)} {p.dtype}{frozen}"
        for name, value in group.items():
            if name not in ("params", "param_names"):
                # How a tensor is printed hangs on settings and on its device.
                plain = value.tolist() if isinstance(value, Tensor) else value
                # Addresses of objects without a name of their own differ between processes.
                found[f"{name} of group {index}"] = re.sub(" at 0x[0-9a-f]+", "", repr(plain))
    return found


def constant_options(group: Mapping[str, Any], portion_numel: int | None) -> GroupOptions:
    """Options fixed when the group's state is allocated.

    Args:
        group: A parameter group.
        portion_numel: From `portion_limit`.
    """
    return GroupOptions(
        betas=(group["betas"][0], group["betas"][1]),
        beta3=group["beta3"],
        eps=group["eps"],
        bias_correction=group["bias_correction"],
        momentum_normaliser=group["momentum_normaliser"],
        portion_numel=portion_numel,
    )


def check_rates(group: Mapping[str, Any]) -> None:
    """Check the options that are read anew at every step.

    Raises:
        TypeError: The learning rate or the weight decay is no number any more.
        ValueError: One is out of range, or weight decay was switched on that needs a peak rate, and there
            is none.
    """
    decay, lr = group["weight_decay"], group["lr"]
    if not isinstance(lr, Tensor):  # of one on a device nothing is known without waiting for it
        check_range(OWNER, "lr", _plain(lr), low=0.0, high_open=True)
    check_range(OWNER, "weight_decay", _plain(decay), low=0.0, high_open=True)
    check_peak(OWNER, group["weight_decay_kind"], decay, group["peak_lr"])


def step_options(group: Mapping[str, Any]) -> StepOptions:
    """Options read anew at every step, checked before by `check_rates`."""
    kind, decay, lr = group["weight_decay_kind"], group["weight_decay"], group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # factors that follow from it are to be numbers, too
    return StepOptions(
        step=group["step"],
        lr=lr,
        l2_decay=decay if kind == "l2" else 0.0,
        direction_decay=direction_decay(kind, decay, lr, group["peak_lr"]),
        direction_shrink=direction_shrink(kind, decay, lr),
    )


def _plain(number: Any) -> Any:
    """A number of NumPy, as a scheduler's arithmetic can leave behind, or of a tensor, as one of Python."""
    return number.item() if hasattr(number, "item") else number


def grafting_of(group: Mapping[str, Any]) -> GraftingConfig | None:
    """The group's grafting method, the preconditioner's own choice where it says "auto"."""
    if group["grafting"] == "auto":
        chosen: GraftingConfig | None = group["preconditioner"].default_grafting
        return chosen
    named: GraftingConfig | None = group["grafting"]
    return named


def wave_limit(
    asked: int | Literal["auto"] | None, device: torch.device, *, num_messages: int, numel: int
) -> int | None:
    """Most numbers that are stepped at once, None for all.

    Args:
        asked: The option ``max_wave_numel`` of a group.
        device: Of its state.
        num_messages: As of the exchange; of several, all together are to be no longer than two such waves.
        numel: Numbers that the rank with most of them steps; the same on all ranks.
    """
    if asked != "auto":
        return asked
    if device.type == "cpu" and not num_messages:
        return CPU_WAVE_NUMEL
    limit = 2 * LARGEST_WAVE_NUMEL // max(2, num_messages)
    return limit if numel > limit else None


def portion_limit(
    asked: int | Literal["auto"] | None, device: torch.device, limit: int | None
) -> int | None:
    """Most numbers of factors that are refreshed at once, None for all.

    Where all numbers are few enough to be stepped at once by default, those of their factors can be many
    more: refreshes are solved in portions all the same.

    Args:
        asked: The option ``max_wave_numel`` of a group.
        device: Of its state.
        limit: From `wave_limit`.
    """
    if asked != "auto":
        return limit
    if device.type == "cpu":
        return CPU_PORTION_NUMEL
    return LARGEST_WAVE_NUMEL if limit is None else limit


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype of a parameter's state and arithmetic: its own, but never below float32."""
    return torch.promote_types(parameter.dtype, torch.float32)
