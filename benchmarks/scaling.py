"""Cost against the width of a layer and against the number of ranks, as tables and one plot.

Counted on the "meta" device, milliseconds estimated from the stated rates of a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.counts import MIB
from benchmarks.flags import chosen, out_folder, parser_of
from benchmarks.tables import DEFAULT_FOLDER, of_several, publish
from shampoo_core import EigenvalueCorrectedConfig, KLShampooConfig, ShampooConfig, SpectralConfig
from shampoo_core.model_shapes import NamedShape, named_model
from shampoo_core.plan import DEVICES, Placement, Plan, Request, make_plan
from shampoo_core.preconditioners.base import PreconditionerConfig

WIDTHS = (256, 512, 1024, 2048, 4096)
RANKS = (1, 2, 4, 8, 16, 32, 64)
NUM_LAYERS = 4
DEFAULT_WORKLOAD = "wmt"
TAKES = f"any, for the number of ranks, by default {DEFAULT_WORKLOAD}; widths are of no model"
DEVICE = DEVICES["v100"]
METHODS: dict[str, PreconditionerConfig] = {
    "shampoo": ShampooConfig(),
    "eigenvalue-corrected": EigenvalueCorrectedConfig(),
    "KL-Shampoo": KLShampooConfig(),
    "spectral": SpectralConfig(),
}


def width_rows() -> list[dict[str, Any]]:
    """Some square layers of growing width, in blocks of 1024."""
    rows = []
    for width in WIDTHS:
        layers = [NamedShape(f"layer_{i}", (width, width)) for i in range(NUM_LAYERS)]
        for name, config in METHODS.items():
            rows.append({"width": width, "method": name, **_entries(layers, config, 1)})
    return rows


def rank_rows(workload: str) -> list[dict[str, Any]]:
    """One model on a growing number of ranks."""
    model = named_model(workload)
    return [
        {"workload": workload, "ranks": ranks, "method": name, **_entries(model, config, ranks)}
        for name, config in METHODS.items()
        for ranks in RANKS
    ]


def _entries(
    model: Sequence[NamedShape], config: PreconditionerConfig, ranks: int
) -> dict[str, Any]:
    plan: Plan = make_plan(Request(model, Placement(ranks), DEVICE, config=config))
    return {
        "plain_ms": plan.plain_ms,
        "mean_ms": plan.mean_ms,
        "send_ms": plan.send_ms,
        "state_mib": plan.state_bytes / MIB,
        "operations": plan.plain_operations,
        "balance": plan.balance,
    }


def plot(
    widths: Sequence[dict[str, Any]], ranks: Mapping[str, Sequence[dict[str, Any]]], path: Path
) -> list[Path]:
    """Draw the rows of widths, and those of ranks by workload; the file, or none without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("Agg")
    from matplotlib import pyplot

    drawn: list[tuple[str, str, Sequence[dict[str, Any]]]] = [
        (f"{NUM_LAYERS} square layers, one device", "width", widths),
        *((f"{name}, refreshed every 100 steps", "ranks", rows) for name, rows in ranks.items()),
    ]
    size = (5 * len(drawn), 4)
    figure, panels = pyplot.subplots(1, len(drawn), figsize=size, layout="constrained")
    for panel, (title, key, rows) in zip(panels, drawn, strict=True):
        for name in METHODS:
            own = [row for row in rows if row["method"] == name]
            panel.plot(
                [row[key] for row in own], [row["mean_ms"] for row in own], marker="o", label=name
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(key)
        panel.set_ylabel(f"mean step, ms (estimated, {DEVICE.name})")
        panel.grid(alpha=0.3)
        panel.set_title(title, loc="left")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return [path]


COLUMNS = {
    "method": "method",
    "operations": "operations",
    "plain_ms": "plain ms",
    "mean_ms": "mean ms",
    "send_ms": "send ms",
    "state_mib": "state MiB",
    "balance": "balance",
}


def run(workloads: Sequence[str] | None = None, folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Print both tables, write them and the plot.

    Args:
        workloads: On growing numbers of ranks; None is WMT.
        folder: For JSON and plot.

    Returns:
        Files that were written.
    """
    names = chosen(workloads, [DEFAULT_WORKLOAD])
    widths, ranks = width_rows(), {name: rank_rows(name) for name in names}
    title = f"Width: {NUM_LAYERS} square layers on one {DEVICE.name}, blocks of 1024"
    note = "of no model, whatever --workload is"
    written = publish(title, widths, {"width": "width", **COLUMNS}, folder, note)
    drawn = plot(widths, ranks, folder / "scaling.png")
    written += publish(
        f"Ranks: {', '.join(names)} on {DEVICE.name}, largest rank",
        [row for rows in ranks.values() for row in rows],
        of_several(names, {"ranks": "ranks", **COLUMNS}),
        folder,
        f"plot: {folder / 'scaling.png'}" if drawn else "no plot: matplotlib is missing",
    )
    return written + drawn


def main() -> None:
    """Command line."""
    options = parser_of(__doc__, TAKES).parse_args()
    run(options.workload, out_folder(options))


if __name__ == "__main__":
    main()
