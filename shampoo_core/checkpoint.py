"""State as plain tensors and numbers: what is written, how it is keyed, how it is checked and read.

The state of a parameter is a flat dict. ``block.<i>.<j>.<name>`` is the entry ``name`` of the block at
position (i, j) of the parameter's grid of blocks. Neither the stacking of blocks nor the number of ranks
shows in it, no collective is needed to make it, and ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_core.blocking import Shape
from shampoo_core.config import ADDED_LATER
from shampoo_core.engine import Engine
from shampoo_core.exchange.gathering import gather
from shampoo_core.groups import CHANGEABLE, WITHOUT_MEANING

LOGGER = logging.getLogger("shampoo_core")

FORMAT_VERSION = 2
"""2: parameter groups say whose state was allocated when (`ARRIVALS`)."""

ARRIVALS = "arrivals"
"""Entry of a parameter group: a number for each parameter, the same for those whose state was allocated
together, in the order of allocation; -1 where there is none yet. What ranks see of the state itself
differs; this they all have. A list of numbers, for torch's helpers take others apart."""

TRAINING_WEIGHTS = "training_weights"
"""State entry that holds a parameter's training weights while it shows those to evaluate."""


def block_views(engine: Engine) -> dict[int, dict[str, Tensor]]:
    """Views of an engine's state by parameter index and block, brought up to date."""
    views: dict[int, dict[str, Tensor]] = {}
    for layout, state in zip(engine.stack_set.layouts, engine.state(), strict=True):
        block = 0
        for tile in layout.tiles:
            of_parameter = views.setdefault(tile.parameter, {})
            for position in tile.grid_indices():
                prefix = block_name(position)
                for name, tensor in state.items():
                    of_parameter[f"{prefix}.{name}"] = tensor[block]
                block += 1
    return views


def block_name(position: Shape) -> str:
    """Prefix of the entries of the block at a position of the grid."""
    return ".".join(["block", *map(str, position)])


def _block_of(name: str) -> str:
    """``block.<i>.<j>`` of ``block.<i>.<j>.<name>``; names do not start with a digit."""
    parts = name.split(".")
    digits = itertools.takewhile(str.isdigit, parts[1:])
    return ".".join([parts[0], *digits])


def describe(value: object) -> Any:
    """Turn an option into plain numbers, strings, lists and dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: describe(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata == ADDED_LATER and getattr(value, f.name) == f.default)
        }
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):  # numpy's, too
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return repr(value)


def differences(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """One sentence for each of its own options in which a parameter group differs from the saved one."""
    found = []
    for name in sorted(own):
        if name not in saved:
            found.append(f"{name} is {own[name]!r} here and absent in the checkpoint")
        elif own[name] != saved[name]:
            found.append(f"{name} is {own[name]!r} here and {saved[name]!r} in the checkpoint")
    return found


def gather_states(
    states: Sequence[Mapping[str, Tensor]], group: dist.ProcessGroup
) -> dict[tuple[int, str], Tensor]:
    """Bring what rank 0 lacks to its host's memory; a collective.

    Args:
        states: The state of every parameter, in the order in which `state_dict` numbers them.
        group: All ranks.

    Returns:
        By number of the parameter and name; nothing on other ranks.
    """
    own = {
        (index, name): tensor
        for index, entries in enumerate(states)
        for name, tensor in without_training_weights(entries).items()
    }
    gathered = gather(own, group)
    for index, entries in enumerate(states):
        training = entries.get(TRAINING_WEIGHTS)
        if isinstance(training, DTensor):
            whole = training.full_tensor()
            if dist.get_rank(group) == 0:
                gathered[index, TRAINING_WEIGHTS] = whole.cpu()
    return gathered


_WHY_MISSING = (
    ". A full state dict of several ranks needs gather_state() before it is made; torch's checkpoint "
    "helpers restore what exists here: a parameter that had state when saved needs it before they load, "
    "from construction or from a gradient, and requires_grad"
)


def has_all_state(
    group: dist.ProcessGroup | None, gathered: Mapping[tuple[int, str], Tensor] | None
) -> bool:
    """Whether what this rank saves has the state of all blocks; warns on rank 0 where it has not.

    Args:
        group: All ranks; None where there is one.
        gathered: From `gather_states`, if that was called.
    """
    if group is None:
        return True
    if dist.get_rank(group) != 0:
        return False
    if gathered is None:
        _warn_of_incomplete_state()
    return gathered is not None


@functools.cache  # once a process
def _warn_of_incomplete_state() -> None:
    """Warn of checkpoints that one rank writes without having everything."""
    LOGGER.warning(
        "state_dict() on rank 0 has the state of its own blocks alone. A file that rank 0 writes alone, "
        "and a full_state_dict of torch.distributed.checkpoint.state_dict, need gather_state() on all "
        "ranks before; torch.distributed.checkpoint.save does not"
    )


def with_outer_entries(owner: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state with all of its outermost entries, or an error.

    ``torch.distributed.checkpoint.state_dict`` passes on ``state`` and ``param_groups`` alone; the others
    follow from them.

    Raises:
        ValueError: It is of another kind or version; the message says what it lacks.
    """
    outer = dict(state_dict)
    groups = outer.get("param_groups", ())
    if "state" in outer and groups and all(ARRIVALS in group for group in groups):
        entries = outer["state"].values()
        outer.setdefault("evaluates", any(TRAINING_WEIGHTS in of_one for of_one in entries))
        outer.setdefault("complete", None)  # who has what, they do not say
        outer.setdefault("format_version", FORMAT_VERSION)
    missing = {"state", "param_groups", "evaluates", "format_version"} - set(outer)
    if missing:
        raise ValueError(
            f"{owner}: not a state of this optimizer: it has no {', '.join(sorted(missing))}; "
            f"it has {', '.join(map(str, state_dict)) or 'nothing'}"
        )
    if outer["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{owner}: the checkpoint has format version {outer['format_version']}, this release "
            f"reads {FORMAT_VERSION}"
        )
    _check_keys(owner, outer)
    return outer


def _check_keys(owner: str, state_dict: Mapping[str, Any]) -> None:
    """Raise where state is of no parameter, or groups do not say whose there is, and of which step."""
    numbers = {number for group in state_dict["param_groups"] for number in group["params"]}
    unknown = [key for key in state_dict["state"] if key not in numbers]
    if unknown:
        raise ValueError(
            f"{owner}: the checkpoint has state of {unknown[0]!r}, which is the number of no parameter in "
            "its groups"
        )
    for index, group in enumerate(state_dict["param_groups"]):
        arrivals = group.get(ARRIVALS, ())
        if len(arrivals) != len(group["params"]) or not all(
            isinstance(number, int) and number >= -1 for number in arrivals
        ):
            raise ValueError(
                f"{owner}: {ARRIVALS} of group {index} of the checkpoint must be a whole number from -1 on "
                f"for each of its {len(group['params'])} parameters, got {arrivals!r}"
            )
        step = group.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(
                f"{owner}: step of group {index} of the checkpoint must be a whole number from 0 on, got "
                f"{step!r}; load a state as state_dict() made it"
            )


def check_groups(
    owner: str,
    own_groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    sizes: Sequence[int],
) -> None:
    """Raise unless saved parameter groups have as many parameters and the same constant options.

    Args:
        owner: For the message.
        own_groups: Constant options, described.
        saved_groups: From the checkpoint.
        sizes: Number of parameters of each group.

    Raises:
        ValueError: They do not; the message names the difference.
    """
    if len(own_groups) != len(saved_groups):
        raise ValueError(
            f"{owner}: the checkpoint has {len(saved_groups)} parameter groups, "
            f"this optimizer {len(own_groups)}"
        )
    for index, (own, saved, size) in enumerate(zip(own_groups, saved_groups, sizes, strict=True)):
        if size != len(saved["params"]):
            raise ValueError(
                f"{owner}: group {index} has {len(saved['params'])} parameters in the "
                f"checkpoint and {size} here"
            )
        meant = {name: value for name, value in own.items() if name not in WITHOUT_MEANING}
        found = differences(meant, saved)
        if found:
            raise ValueError(
                f"{owner}: group {index} of the checkpoint is of another configuration: "
                + "; ".join(found)
            )


def changed_entries(
    group: Mapping[str, Any], constants: Collection[str], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """What a saved parameter group sets in one here: all but parameters and constant options.

    That is learning rate, weight decay, step, and what schedulers keep in a group. Of the latter, what
    is of another type here than in the checkpoint stays: it may have been saved as a mere description.
    """
    return {
        name: copy.deepcopy(value)
        for name, value in saved.items()
        if name not in ("params", "param_names", ARRIVALS, *constants)
        and (name in (*CHANGEABLE, "step") or type(value) is type(group.get(name, value)))
    }


def check_evaluated(owner: str, evaluates: bool, training_weights: Collection[Tensor]) -> None:
    """Raise where parameters hold the weights to evaluate, and the training weights are lost.

    Raises:
        ValueError: They are.
    """
    if evaluates and not training_weights:
        raise ValueError(
            f"{owner}: the checkpoint was saved while the parameters held the weights to evaluate, "
            "and has no training weights; call train() before saving"
        )


def block_names(engines: Sequence[Engine], parameter: int) -> set[str]:
    """Prefixes of all blocks of a parameter, whoever owns them."""
    return {
        block_name(index)
        for engine in engines
        for layout in engine.division.whole.layouts
        for tile in layout.tiles
        if tile.parameter == parameter
        for index in tile.grid_indices()
    }


def without_training_weights(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of blocks alone."""
    return {name: tensor for name, tensor in entries.items() if name != TRAINING_WEIGHTS}


def matching_entries(
    owner: str,
    own: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    all_blocks: Collection[str],
    *,
    is_complete: bool | None,
) -> list[tuple[Tensor, Tensor]]:
    """Pair the state of a parameter's blocks with the saved one, or raise unless that fits.

    Args:
        owner: For the message.
        own: State of the blocks that this rank owns.
        saved: State of all blocks.
        all_blocks: Prefixes of all blocks, owned or not.
        is_complete: Whether the checkpoint has the state of all blocks; None if it does not say.

    Returns:
        Own and saved tensor of every entry.

    Raises:
        ValueError: A name is missing, unknown, or of another shape; the message names it.
    """
    own, saved = without_training_weights(own), without_training_weights(saved)
    own_blocks = {_block_of(name) for name in own}
    missing = sorted(set(own) - set(saved))
    unknown = sorted(
        name
        for name in set(saved) - set(own)
        if _block_of(name) in own_blocks or _block_of(name) not in all_blocks
    )
    if missing and is_complete is False:
        raise ValueError(
            f"{owner}: the checkpoint has no {missing[0]}: it was saved by one rank of several, with "
            "the state of its own blocks alone, or by several, together, of parameters that came at other "
            "times than here. Call gather_state() on all ranks before rank 0 saves, or save with "
            "torch.distributed.checkpoint, and load into an optimizer whose parameters came alike"
        )
    if missing or unknown:
        raise ValueError(
            f"{owner}: the checkpoint does not fit: "
            f"missing {missing[:3]}{'...' if len(missing) > 3 else ''}, "
            f"unknown {unknown[:3]}{'...' if len(unknown) > 3 else ''}"
            f"{'' if unknown else _WHY_MISSING}"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{owner}: {name} has shape {tuple(saved[name].shape)} in the checkpoint "
                f"and {tuple(tensor.shape)} here"
            )
    return [(tensor, saved[name]) for name, tensor in own.items()]
