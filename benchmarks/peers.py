"""Other people's optimizers, if they are installed: never needed, never installed by us.

Each is asked for what its own documentation names as its default, at our block size and interval.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

Parameters = Sequence[torch.nn.Parameter]
BLOCK_SIZE = 1024


def _distributed_shampoo(parameters: Parameters, interval: int) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("distributed_shampoo")
    made: torch.optim.Optimizer = package.DistributedShampoo(
        parameters,
        lr=1e-3,
        betas=(0.9, 0.99),
        epsilon=1e-12,
        max_preconditioner_dim=BLOCK_SIZE,
        precondition_frequency=interval,
        start_preconditioning_step=interval,
        grafting_config=package.AdamPreconditionerConfig(beta2=0.99, epsilon=1e-8),
    )
    return made


def _soap(parameters: Parameters, interval: int) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("soap")
    made: torch.optim.Optimizer = package.SOAP(
        parameters,
        betas=(0.9, 0.99),
        precondition_frequency=interval,
        max_precond_dim=BLOCK_SIZE,
        merge_dims=True,
    )
    return made


def _heavyball(parameters: Parameters, interval: int) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("heavyball")
    package.utils.compile_mode = None  # eager like all others here
    made: torch.optim.Optimizer = package.SOAP(
        parameters,
        lr=1e-3,
        precondition_frequency=interval,
        max_precond_dim=BLOCK_SIZE,
        compile_step=False,
    )
    return made


def _pytorch_optimizer(parameters: Parameters, interval: int) -> torch.optim.Optimizer:
    package: Any = importlib.import_module("pytorch_optimizer")
    made: torch.optim.Optimizer = package.ScalableShampoo(
        parameters,
        block_size=BLOCK_SIZE,
        start_preconditioning_step=interval,
        preconditioning_compute_steps=interval,
    )
    return made


MakePeer = Callable[[Parameters, int], torch.optim.Optimizer]
"""From parameters and the refresh interval to an optimizer."""

PEERS: dict[str, MakePeer] = {
    "facebookresearch Distributed Shampoo": _distributed_shampoo,
    "SOAP (reference)": _soap,
    "heavyball SOAP": _heavyball,
    "pytorch_optimizer ScalableShampoo": _pytorch_optimizer,
}

LATE = {"SOAP (reference)": 1}
"""Refreshes come so many steps after multiples of the interval, for the first step only begins."""


def available() -> tuple[dict[str, MakePeer], list[str]]:
    """The peers that can be imported, and a line for each that cannot."""
    found, missing = {}, []
    for name, make in PEERS.items():
        try:
            make([torch.nn.Parameter(torch.zeros(2, 2))], 2)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            missing.append(f"{name}: not measured ({type(error).__name__}: {error})")
        else:
            found[name] = make
    return found, missing


def part_of_peers(text: str) -> str:
    """The type of a flag that chooses peers by a part of their names."""
    if not any(text in name for name in PEERS):
        raise argparse.ArgumentTypeError(f"must be part of one of {list(PEERS)}, got {text!r}")
    return text
