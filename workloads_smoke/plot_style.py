"""What the plots share: colours, fonts, panels and legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workloads_smoke.scoring.scoreboard import Scoreboard

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
TARGET_DASH: Any = (0, (4, 3))
MEAN_DASH: Any = (0, (3, 2))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#5f6368"
PANEL = (4.6, 3.3)  # inches
DOTS_PER_INCH = 150

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#202124",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.solid_capstyle": "round",
}


@contextmanager
def style() -> Iterator[None]:
    """Our look for the figures drawn inside; the caller's settings come back afterwards."""
    with mpl.rc_context(STYLE):
        yield


def submission_colours(board: Scoreboard) -> dict[str, str]:
    """Colour by submission, the same in every plot and whatever the ranking.

    Beyond as many as there are colours come shades of them.
    """
    return {
        name: _shade(COLOURS[i % len(COLOURS)], i // len(COLOURS))
        for i, name in enumerate(sorted(board.submissions, key=_reference_last(board)))
    }


def _shade(colour: str, turn: int) -> str:
    """The colour itself, then darker ones; black becomes lighter."""
    kept = 0.55**turn
    end = 0.7 if colour == "#000000" else 0.0
    red, green, blue = (kept * part + (1 - kept) * end for part in to_rgb(colour))
    return to_hex((red, green, blue)).upper()


def _reference_last(board: Scoreboard) -> Callable[[str], tuple[bool, str]]:
    return lambda name: (name == board.reference, name)


def grid(num_panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels, up to three beside each other."""
    columns = min(3, num_panels) if num_panels != 4 else 2
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[num_panels:]:
        spare.set_visible(False)
    return figure, panels[:num_panels]


def submission_legend(
    figure: Figure, board: Scoreboard, colours: dict[str, str], *extra: Line2D
) -> None:
    """Explain colours above the panels, best submission first; ``extra`` entries follow."""
    handles = [Line2D([], [], color=colours[n], linewidth=2.2, label=n) for n in board.submissions]
    outside_legend(figure, [*handles, *extra], "outside upper center")


def outside_legend(
    figure: Figure,
    handles: Sequence[Line2D],
    where: Literal["outside upper center", "outside lower center"],
) -> None:
    """Put a legend above or below all panels."""
    # A handle takes about 0.6 inches, a character of its label 0.09.
    widest = 0.6 + 0.09 * max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(figure.get_figwidth() / widest))
    figure.legend(handles=list(handles), loc=where, ncols=min(len(handles), fitting))
