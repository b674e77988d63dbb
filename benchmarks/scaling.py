"""Cost against the width of a layer and against the number of ranks, as tables and one plot.

Counted on the "meta" device, milliseconds estimated from the stated rates of a device.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import DEFAULT_FOLDER, publish
from shampoo_core import EigenvalueCorrectedConfig, KLShampooConfig, ShampooConfig, SpectralConfig
from shampoo_core.model_shapes import NamedShape, named_model
from shampoo_core.plan import DEVICES, Placement, Plan, Request, make_plan
from shampoo_core.preconditioners.base import PreconditionerConfig

WIDTHS = (256, 512, 1024, 2048, 4096)
RANKS = (1, 2, 4, 8, 16, 32, 64)
NUM_LAYERS = 4
MODEL = "wmt"
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


def rank_rows() -> list[dict[str, Any]]:
    """One model on a growing number of ranks."""
    model = named_model(MODEL)
    return [
        {"ranks": ranks, "method": name, **_entries(model, config, ranks)}
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
        "state_mb": plan.state_bytes / 2**20,
        "operations": plan.plain_operations,
        "balance": plan.balance,
    }


def plot(widths: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw both; False where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, rows, key in ((panels[0], widths, "width"), (panels[1], ranks, "ranks")):
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
    panels[0].set_title(f"{NUM_LAYERS} square layers, one device", loc="left")
    panels[1].set_title(f"{MODEL}, refreshed every 100 steps", loc="left")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


COLUMNS = {
    "method": "method",
    "operations": "operations",
    "plain_ms": "plain ms",
    "mean_ms": "mean ms",
    "send_ms": "send ms",
    "state_mb": "state MB",
    "balance": "balance",
}


def run(workloads: Sequence[str], folder: Path = DEFAULT_FOLDER) -> None:
    """Print both tables, write them and the plot."""
    del workloads
    widths, ranks = width_rows(), rank_rows()
    title = f"Width: {NUM_LAYERS} square layers on one {DEVICE.name}, blocks of 1024"
    publish(title, widths, {"width": "width", **COLUMNS}, folder)
    drawn = plot(widths, ranks, folder / "scaling.png")
    publish(
        f"Ranks: {MODEL} on {DEVICE.name}, largest rank",
        ranks,
        {"ranks": "ranks", **COLUMNS},
        folder,
        f"plot: {folder / 'scaling.png'}" if drawn else "no plot: matplotlib is missing",
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    run([], parser.parse_args().out)


if __name__ == "__main__":
    main()
