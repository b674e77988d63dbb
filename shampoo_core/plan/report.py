"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from shampoo_core.plan.advice import Change
from shampoo_core.plan.planning import Plan, RankMemory, Request

MIB = 2**20
STACKS_SHOWN = 6


def report(
    title: str, request: Request, plan: Plan, changes: Sequence[Change], quickest: Change | None
) -> str:
    """All of a plan for a reader.

    Args:
        title: What was planned.
        request: The question.
        plan: The answer.
        changes: What would help, if it does not fit.
        quickest: How many ranks should share the work, if not as many as do.
    """
    return "\n".join(
        [
            title,
            "",
            *_blocks(request, plan),
            "",
            *_memory(plan),
            "",
            *_time(request, plan),
            *_quickest(quickest),
            "",
            *_verdict(request, plan, changes),
        ]
    )


def _blocks(request: Request, plan: Plan) -> list[str]:
    shown = list(plan.stacks.items())
    stacks = ", ".join(f"{count} of {shape}" for shape, count in shown[:STACKS_SHOWN])
    rest = f", {len(shown) - STACKS_SHOWN} more shapes" if len(shown) > STACKS_SHOWN else ""
    return [
        f"{plan.num_parameters:,} parameters in {plan.num_blocks} blocks of {len(shown)} shapes",
        f"  {stacks}{rest}",
        *_tables(request, plan),
        f"  largest load of a rank over the mean: {plan.balance:.3f}",
    ]


def _tables(request: Request, plan: Plan) -> list[str]:
    if not plan.num_tables:
        return []
    return [
        f"  parameters with a side of {request.table_rows:,} or more, in a group of their own stepped by "
        f"Adam: {plan.num_tables}"
    ]


def _memory(plan: Plan) -> list[str]:
    staggered, at_once = plan.staggered_memory, plan.at_once_memory
    return [
        "Memory of a rank, for tensors of 4 bytes, without activations",
        *_lines(
            {
                "parameters and gradients": 2 * plan.parameter_bytes,
                "gradient buckets of DDP": plan.bucket_bytes,
            }
        ),
        f" rank {staggered.rank}, which needs most when refreshes are staggered",
        *_lines(
            {
                "state": staggered.state,
                **_beside(staggered),
                "temporary, plain step": staggered.plain,
                "temporary, dearest step": staggered.staggered,
            }
        ),
        f" rank {at_once.rank}, which needs most when everything is refreshed at once",
        *_lines(
            {
                "state": at_once.state,
                **_beside(at_once),
                "temporary, plain step": at_once.plain,
                "temporary, refresh of everything": at_once.refresh,
            }
        ),
        " of all ranks",
        *_lines(
            {
                "state, largest": plan.state_bytes,
                "state, smallest": min(plan.state_bytes_per_rank),
            }
        ),
    ]


def _beside(memory: RankMemory) -> dict[str, int]:
    parts = {
        "index tables of its storage": memory.tables,
        "temporary, while blocks travel": memory.travel,
    }
    return {name: size for name, size in parts.items() if size}


def _lines(sizes: dict[str, int]) -> list[str]:
    return [f"  {name:<34}{size / MIB:>12,.1f} MiB" for name, size in sizes.items()]


def _time(request: Request, plan: Plan) -> list[str]:
    device = request.device.name
    lines = [
        f"Time of a step on the rank with the largest load, estimated from the rates of {device};",
        f"staggered by {_staggered(request)}, ranks wait for the slowest at every step",
        f"  plain            {plan.plain_ms:>10.2f} ms  {plan.plain_flops / 1e9:>12,.0f} GFLOP"
        f"  {plan.plain_operations:>6} operations",
        f"  dearest staggered{plan.staggered_ms:>10.2f} ms",
        f"  all refreshed    {plan.refresh_ms:>10.2f} ms  {plan.refresh_flops / 1e9:>12,.0f} GFLOP"
        f"  {plan.refresh_operations:>6} operations",
        f"  sending          {plan.send_ms:>10.2f} ms  "
        f"{max(plan.sent_bytes_per_rank) / MIB:>12,.1f} MiB sent",
        f"  mean, refreshed every {plan.refresh_interval} steps: {plan.mean_ms:.2f} ms staggered, "
        f"{plan.mean_at_once_ms:.2f} ms if everything is refreshed at once",
    ]
    if plan.overhead_percent is not None:
        lines.append(
            f"  {plan.overhead_percent:.1f} % of a training step of {request.step_ms:g} ms"
        )
        wanted = f"{request.overhead_percent:g} %"
        if plan.shortest_interval is None:
            lines.append(f"  no refresh interval keeps it at {wanted}: {plan.no_interval}")
        else:
            lines.append(
                f"  a refresh interval of {plan.shortest_interval} keeps it at {wanted}, "
                "one step less does not"
            )
    return lines


def _quickest(change: Change | None) -> list[str]:
    if change is None:
        return []
    return [
        f"  quicker with Distribution({change.what}): {change.mean_ms:.2f} ms, "
        f"{change.peak_gib:.3g} GiB staggered"
    ]


def _staggered(request: Request) -> str:
    ranks = request.placement.num_owners
    return f"StaggeredRefresh({f'ranks={ranks}' if ranks > 1 else ''})"


def _verdict(request: Request, plan: Plan, changes: Sequence[Change]) -> list[str]:
    needed = (
        f"needs {plan.peak_gib:.3g} GiB staggered, {plan.refresh_peak_gib:.3g} GiB if everything is "
        f"refreshed at once, of {plan.memory_gib:.3g} GiB"
    )
    if plan.fits:
        spare = plan.memory_gib - plan.peak_gib
        how = f" with refresh={_staggered(request)}, not with the default"
        how = "" if plan.fits_at_once else how
        return [f"Fits{how}: {needed}; {spare:.3g} GiB to spare for activations"]
    lines = [
        f"Does not fit: {needed}. What would help{':' if changes else ' is more memory alone'}"
    ]
    lines += [
        f"  {change.what:<28}{change.peak_gib:>9.3g} GiB, mean step {change.mean_ms:.2f} ms"
        f"{'' if change.fits else '  (still too large)'}"
        for change in changes
    ]
    return lines
