"""The tables of docs/plans.md: ``python -m shampoo_core.plan.tables > docs/plans.md``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from shampoo_core.model_shapes import (
    REFERENCE_STEP_MS,
    TRANSFORMERS,
    NamedShape,
    named_model,
    num_elements,
)
from shampoo_core.plan.devices import DEVICES
from shampoo_core.plan.layout import Placement, Sharding
from shampoo_core.plan.planning import Plan, Request, make_plan

MIB = 2**20
MACHINES = (("v100", 8, 16.0), ("a100", 4, 40.0))
"""Device, number of devices, GiB of each: the benchmark's reference machine, and a newer one."""
WORLD_SIZES = (64, 128, 256, 512, 1024)
GROUP_SIZES = {"transformer_1b": 8, "transformer_70b": 64}
"""Ranks of a replica under HSDP."""
OVERHEAD_PERCENT = 2.0

INTRODUCTION = """# Plans

Made by `python -m shampoo_core.plan.tables`; `python -m shampoo_core.plan` plans any other case.
Shampoo with stored roots, Adam graft, blocks of 1024, float32, factors dense, every factor refreshed once
in 100 steps, refreshes staggered for as many ranks as share them (`StaggeredRefresh(ranks=...)`). Bytes are
of the rank that needs most, milliseconds of the one with the largest load, and of refreshes of the one that
all wait for. Bytes are counted on the optimizer itself and exact; milliseconds are estimates from stated
rates of the device (`shampoo_core/plan/devices.py`), good to a factor of two or so. Memory is
parameters, gradients, DDP's buckets of gradients (which `gradient_as_bucket_view=True` would save), state,
communication and temporary tensors, without activations; up to 2^27 numbers of a rank (under DDP 2^28 of
all ranks) step at once, more in waves of as many, and smaller waves (`max_wave_numel`) would need less.
Sharded weights stay with the ranks that hold them, which decay them; replicas of HSDP share the work, here
all of them. `Distribution(ranks_per_group=...)` lets fewer do so: such a group takes what a world of its
size does, which is quicker where blocks are few, for what goes to other replicas does not get less with
their number, and is padded to the longest; the planner says for how many it is quickest. Lookup tables (a
side of 65,536 or more) are stepped by Adam."""


def official_rows(device: str, num_devices: int, memory_gib: float) -> Iterator[list[str]]:
    """One row per official workload on one machine."""
    for workload, step_ms in REFERENCE_STEP_MS.items():
        request = Request(
            named_model(workload),
            Placement(num_devices),
            DEVICES[device],
            memory_gib,
            step_ms=step_ms,
            overhead_percent=OVERHEAD_PERCENT,
        )
        plan = make_plan(request)
        interval = plan.shortest_interval
        yield [
            workload,
            f"{plan.num_parameters / 1e6:,.1f}",
            f"{plan.num_blocks} / {len(plan.stacks)}",
            *_common(plan),
            f"{plan.refresh_peak_gib:.2f}",
            f"{step_ms:.0f}",
            f"{plan.overhead_percent:.1f} %",
            "none" if interval is None else str(interval),
        ]


def transformer_rows(model: str, parameters: Sequence[NamedShape]) -> Iterator[list[str]]:
    """One row per world size and sharding, on H100 with 80 GB."""
    shardings: tuple[Sharding, ...] = ("fsdp2", "hsdp")
    for sharding in shardings:
        for world_size in WORLD_SIZES:
            placement = Placement(world_size, sharding, GROUP_SIZES[model])
            plan = make_plan(Request(parameters, placement, DEVICES["h100"], 74.5))
            name = sharding if sharding == "fsdp2" else f"hsdp, groups of {placement.group_size}"
            fits = "yes" if plan.fits else "no"
            yield [str(world_size), name, *_common(plan), fits]


def _common(plan: Plan) -> list[str]:
    return [
        f"{plan.state_bytes / MIB:,.0f}",
        f"{plan.balance:.3f}",
        f"{max(plan.sent_bytes_per_rank) / MIB:,.0f}",
        f"{plan.plain_ms:.1f}",
        f"{plan.staggered_ms:.1f}",
        f"{plan.mean_ms:.1f}",
        f"{plan.peak_gib:.2f}",
    ]


COMMON_HEADINGS = (
    "state MiB", "balance", "sent MiB", "plain ms", "dearest ms", "mean ms", "peak GiB",
)  # fmt: skip


def markdown(headings: Sequence[str], rows: Iterator[list[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def document() -> str:
    """All of docs/plans.md."""
    parts = [INTRODUCTION]
    official = [
        "workload", "million parameters", "blocks / shapes", *COMMON_HEADINGS,
        "all at once GiB", "V100 step ms", "overhead", f"interval for {OVERHEAD_PERCENT:g} %",
    ]  # fmt: skip
    parts.append(
        "`balance` is the largest modelled load of a rank over the mean; `dearest` the step of a "
        "staggered interval with most work; `mean` includes communication; `V100 step` what a training "
        "step may take on the reference machine, 8 x V100 (the benchmark's runtime limit over its step "
        "hint; finewebedu_lm's is of a later release of the benchmark); `overhead` is of that step, on "
        f"either machine, and `interval` keeps it at {OVERHEAD_PERCENT:g} %, one step less does not. On "
        "the A100s, whose own steps are shorter, both are too good."
    )
    for device, num_devices, memory in MACHINES:
        parts.append(f"## {num_devices} x {device.upper()} {memory:.0f} GB, replicated (DDP)")
        parts.append(markdown(official, official_rows(device, num_devices, memory)))
    for model in TRANSFORMERS:
        parameters = named_model(model)
        size = num_elements(parameters) / 1e9
        parts.append(f"## Transformer with {size:.1f} billion parameters on H100 80 GB")
        headings = ["ranks", "sharding", *COMMON_HEADINGS, "fits"]
        parts.append(markdown(headings, transformer_rows(model, parameters)))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line; takes no arguments and some minutes."""
    parser = argparse.ArgumentParser(
        prog="python -m shampoo_core.plan.tables",
        description="Print docs/plans.md: plans of the official workloads and of large transformers. "
        "Takes some minutes.",
    )
    parser.parse_args(arguments)
    sys.stdout.write(document() + "\n")


if __name__ == "__main__":
    main()
