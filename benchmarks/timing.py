"""Seconds of a step on the shapes of real models, beside AdamW's and beside the products alone.

The floor is as many multiplications and additions as the method's matrix products have, in products of
square matrices: what is left when everything else costs nothing. Our step forms symmetric products by their
upper triangle, so that it does fewer; how many is another column. Candidates take turns, the floor among
them, so that a machine that slows down slows them all; compared are the shortest times, in seconds of the
processor on one thread, which other work distorts least.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import chosen, count, out_folder, parser_of
from benchmarks.models import workload_parameters
from benchmarks.peers import LATE, MakePeer, available, part_of_peers
from benchmarks.tables import DEFAULT_FOLDER, publish
from shampoo_core import DistributedShampoo, FixedRefresh, ShampooConfig
from shampoo_core.costs import plain_step_flops
from shampoo_core.counting import OperationCounter
from shampoo_core.preconditioners.shampoo import Shampoo

WORKLOADS = ("imagenet_resnet", "imagenet_vit", "librispeech_conformer", "ogbg")
TOO_LARGE = {"criteo1tb": "two optimizers would hold 16 GiB of memory for its embedding table"}
"""Not measured on a CPU."""
TAKES = f"any but criteo1tb, by default {', '.join(WORKLOADS)}"
INTERVALS = (20, 100)
RATE_SIDE = 1024
LARGE_NUMEL = 2**23 - 2**10
"""Of a float32 tensor a little below 32 MiB."""
LIMIT_TO_FLOOR = 1.15
FLOOR = "products alone"
BETAS = (0.9, 0.99)

CYCLE = 4
"""Every so many steps is a refresh where refreshes are measured; the first cycle is not looked at."""

Step = Callable[[], object]


def products(flops: float, device: str = "cpu", side: int = RATE_SIDE) -> Step:
    """A step of nothing but float32 products of square matrices, as near to ``flops`` as can be.

    Args:
        flops: Multiplications and additions.
        device: Of the matrices.
        side: Of the matrices, halved until there are eight products at least.
    """
    while 2.0 * side**3 > flops / 8:
        side //= 2
    left, right = torch.randn(2, side, side, device=device).unbind()
    result = torch.empty(side, side, device=device)
    count = round(flops / (2.0 * side**3))

    def step() -> None:
        for _ in range(count):
            torch.mm(left, right, out=result)

    return step


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, the candidates taking turns."""
    # The C library's allocator keeps what is freed up to the size of what it has seen freed, 32 MiB at
    # most. A process that trains has seen activations.
    activations = torch.ones(LARGE_NUMEL)
    del activations
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(_seconds(step))
    return seconds


def candidates(workload: str, floor: Step, *, refresh: bool, peers: str = "") -> dict[str, Step]:
    """Steps of AdamW, of the floor, of ours, and of the peers at hand where refreshes are measured.

    Args:
        workload: Official.
        floor: Products alone.
        refresh: Whether optimizers refresh, and peers are asked for.
        peers: What the name of a peer has to contain.
    """
    adamw = torch.optim.AdamW(workload_parameters(workload, "cpu"), betas=BETAS, foreach=True)
    optimizer = _ours(workload, ShampooConfig(), refresh=refresh)
    steps: dict[str, Step] = {"AdamW": adamw.step, FLOOR: floor, "ours": optimizer.step}
    if refresh:
        # As facebookresearch's; the other peers leave vectors to Adam, as "ours" does.
        everything = ShampooConfig(precondition_vectors=True)
        steps["ours, vectors too"] = _ours(workload, everything, refresh=True).step
        for name, make in available()[0].items():
            if peers in name:
                steps[name] = _theirs(workload, make)
    return steps


def method_flops(workload: str) -> float:
    """Of the products that define a plain step of Shampoo: Gram matrices and preconditioning in full."""
    (engine,) = DistributedShampoo(workload_parameters(workload), max_wave_numel=None)._engines[0]
    layouts = engine.stack_set.layouts
    return sum(layout.num_blocks * plain_step_flops(layout.block_shape) for layout in layouts)


def _ours(workload: str, config: ShampooConfig, *, refresh: bool) -> DistributedShampoo:
    optimizer = DistributedShampoo(
        workload_parameters(workload, "cpu"),
        betas=BETAS,
        preconditioner=config,
        refresh=FixedRefresh(CYCLE if refresh else 10**9, start=1),
    )
    if not refresh:
        _pass_over_refreshes(optimizer)
    return optimizer


def _pass_over_refreshes(optimizer: DistributedShampoo) -> None:
    """As if all had been refreshed twice, which takes seconds: identities take as long to multiply with.

    Before the second time nobody has asked whether any root is missing, for which the grafting method
    stands in.
    """
    optimizer.param_groups[0]["step"] = CYCLE
    for engine in optimizer._engines[0]:
        assert isinstance(engine.preconditioner, Shampoo)
        ready = engine.preconditioner.roots.ready
        for counts in ready.num_refreshes:
            counts.fill_(1)
        ready.ask()


def _theirs(workload: str, make: MakePeer) -> Step:
    parameters = workload_parameters(workload, "cpu")
    gradients = [parameter.grad for parameter in parameters]
    optimizer = make(parameters, CYCLE)

    def step() -> None:
        # One of them takes the gradients away, and would have nothing to do at its second step.
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


def time_workload(
    workload: str, cycles: int, *, refresh: bool, peers: str = ""
) -> list[dict[str, Any]]:
    """Rows of one workload: AdamW, ours, and the peers at hand.

    Args:
        workload: Official.
        cycles: How often three plain steps, and a refresh, are measured.
        refresh: Whether to measure steps that refresh everything: on a CPU these take seconds.
        peers: See `candidates`.
    """
    flops = method_flops(workload)
    steps = candidates(workload, products(flops), refresh=refresh, peers=peers)
    rounds = interleaved(steps, CYCLE * (1 + cycles))
    done = {name: _flops(steps[name]) / flops for name in steps if name.startswith("ours")}
    plain = {name: _shortest(name, seconds, plain=True) for name, seconds in rounds.items()}
    rows = []
    for name, seconds in plain.items():
        row: dict[str, Any] = {
            "workload": workload,
            "optimizer": name,
            "plain_ms": 1e3 * seconds,
            "to_adamw": seconds / plain["AdamW"],
            "to_floor": seconds / plain[FLOOR],
            "limit": LIMIT_TO_FLOOR if name == "ours" and workload in WORKLOADS else None,
            "arithmetic": done.get(name),
        }
        if refresh and name not in ("AdamW", FLOOR):
            refreshed = _shortest(name, rounds[name], plain=False)
            row["refresh_ms"] = 1e3 * refreshed
            for interval in INTERVALS:
                mean = seconds + (refreshed - seconds) / interval
                row[f"mean_{interval}_ms"] = 1e3 * mean
        rows.append(row)
    return rows


def _shortest(name: str, seconds: Sequence[float], *, plain: bool) -> float:
    """Of a candidate's plain steps, or of those that refresh, after the first cycle."""
    return min(
        duration
        for number, duration in enumerate(seconds, start=1)
        if number > CYCLE and ((number - LATE.get(name, 0)) % CYCLE != 0) == plain
    )


def _flops(step: Step) -> float:
    with OperationCounter() as counter:
        step()
    return counter.flops


def _seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


COLUMNS = {
    "workload": "workload",
    "optimizer": "optimizer",
    "plain_ms": "plain ms",
    "to_adamw": "to AdamW",
    "to_floor": "to floor",
    "limit": "limit",
    "arithmetic": "arithmetic",
    "refresh_ms": "refresh ms",
    **{f"mean_{interval}_ms": f"mean at {interval}" for interval in INTERVALS},
}


def run(
    workloads: Sequence[str] | None = None,
    folder: Path = DEFAULT_FOLDER,
    *,
    cycles: int = 2,
    refresh: bool = False,
    peers: str = "",
) -> list[Path]:
    """Print the table and write its JSON, for `WORKLOADS` if none are given; return the files written."""
    torch.set_num_threads(1)
    rows = [
        row
        for name in chosen(workloads, WORKLOADS, TOO_LARGE)
        for row in time_workload(name, cycles, refresh=refresh, peers=peers)
    ]
    missing = (
        available()[1] if refresh else ["refreshes and peers: not measured (ask for --refresh)"]
    )
    return publish(
        "Time: of a step with the default options, the shortest of candidates that take turns",
        rows,
        COLUMNS,
        folder,
        "\n".join(["arithmetic: products done, in units of the floor's.", *missing]),
    )


def run_affordable(workloads: Sequence[str] | None, folder: Path) -> list[Path]:
    """The table of few plain steps."""
    return run(workloads, folder, cycles=1)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = parser_of(__doc__, TAKES)
    parser.add_argument(
        "--cycles", type=count, default=2, help="three plain steps and a refresh each"
    )
    parser.add_argument("--refresh", action="store_true", help="refreshes and peers, too: minutes")
    parser.add_argument(
        "--peers", type=part_of_peers, default="", help="only those whose name has this"
    )
    options = parser.parse_args(arguments)
    run(
        options.workload,
        out_folder(options),
        cycles=options.cycles,
        refresh=options.refresh,
        peers=options.peers,
    )


if __name__ == "__main__":
    main()
