"""Plots of a scoreboard: training curves, performance profiles, step times; one PNG each.

Colours are Okabe and Ito's, which people with any colour vision tell apart; no plot relies on
colour alone: studies differ by marker, profiles by dash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from matplotlib.transforms import ScaledTranslation

from workloads_smoke.atomic_files import atomic_write
from workloads_smoke.plot_style import (
    DASHES,
    DOTS_PER_INCH,
    GREY,
    MARKERS,
    MEAN_DASH,
    PANEL,
    TARGET_DASH,
    grid,
    outside_legend,
    style,
    submission_colours,
    submission_legend,
)
from workloads_smoke.scoring.logs import SECONDS, STEP, Trial
from workloads_smoke.scoring.scoreboard import Scoreboard
from workloads_smoke.scoring.step_times import step_times, times_every_step
from workloads_smoke.scoring.targets import Target

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plot:
    """One finished plot: file name without suffix, a caption for the report, how to draw it."""

    name: str
    caption: str
    draw: Callable[[Scoreboard], Figure]


def write_plots(board: Scoreboard, folder: Path) -> dict[str, Path]:
    """Write every plot as PNG.

    Returns:
        Path by name of plot, in the order of `PLOTS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for plot in PLOTS:
        with style():
            figure = plot.draw(board)
            paths[plot.name] = folder / f"{plot.name}.png"
            with atomic_write(paths[plot.name]) as file:
                figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return paths


def training_curves(board: Scoreboard, unit: str) -> Figure:
    """Target metric against steps or seconds, a panel a workload.

    A study's best trial is bold, its other trials are thin; where it meets the target it carries
    the study's marker.

    Args:
        board: what to draw.
        unit: ``steps`` or ``seconds``.
    """
    figure, panels = grid(len(board.workloads))
    colours = submission_colours(board)
    best = {
        (row["submission"], row["workload"], row["study"]): row["best_trial"]
        for row in board.per_study.to_dict("records")
    }
    studies = sorted({trial.study for trial in board.trials})
    for axes, workload in zip(panels, board.workloads, strict=True):
        target = board.targets[workload]
        shown: list[tuple[str, Array]] = []
        for trial in board.trials:
            if trial.workload != workload or target.column not in trial.evaluations:
                continue
            is_best = best[(trial.submission, workload, trial.study)] == trial.trial
            curve = _curve(trial, target, unit)
            marker = MARKERS[studies.index(trial.study) % len(MARKERS)]
            _draw_curve(axes, *curve, target, colours[trial.submission], marker, is_best)
            if is_best:
                shown.append((trial.submission, curve[1]))
        _finish_curves(axes, workload, target, unit, shown)
    _curve_legend(figure, board, colours, studies)
    return figure


def _curve(trial: Trial, target: Target, unit: str) -> tuple[Array, Array]:
    column = STEP if unit == "steps" else SECONDS
    x = trial.evaluations[column].to_numpy(dtype=float)
    return x, trial.evaluations[target.column].to_numpy(dtype=float)


def _hits(values: Array, target: Target) -> npt.NDArray[np.bool_]:
    return values <= target.value if target.lower_is_better else values >= target.value


def _draw_curve(
    axes: Axes, x: Array, y: Array, target: Target, colour: str, marker: str, is_best: bool
) -> None:
    point = "." if len(x) == 1 else ""  # one point makes no line
    if not is_best:
        axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.45, zorder=2, marker=point)
        return
    axes.plot(x, y, color=colour, linewidth=2.2, alpha=0.9, zorder=3, marker=point)
    hit = np.flatnonzero(_hits(y, target))
    if len(hit):
        axes.plot(
            x[hit[0]],
            y[hit[0]],
            marker=marker,
            markersize=8,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=1.2,
            linestyle="none",
            zorder=5,
            clip_on=False,
        )


def _finish_curves(
    axes: Axes, workload: str, target: Target, unit: str, shown: Sequence[tuple[str, Array]]
) -> None:
    axes.axhline(target.value, color="black", linewidth=1.1, linestyle=TARGET_DASH, zorder=4)
    axes.set_title(workload, loc="left")
    axes.set_title(f"target {target.value:g}", loc="right", fontsize=9, weight="normal")
    axes.set_xlabel("training steps" if unit == "steps" else "submission time (s)")
    axes.set_ylabel(f"validation {target.metric.replace('_', ' ')}")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:,g}")
    limits = _interesting_range([y for _, y in shown], target)
    if limits is not None:
        axes.set_ylim(*limits)
        _name_the_unseen(axes, shown, limits)


def _name_the_unseen(
    axes: Axes, shown: Sequence[tuple[str, Array]], limits: tuple[float, float]
) -> None:
    """A panel that cuts the worst values may cut all of a submission's."""
    seen = {name for name, y in shown if ((limits[0] <= y) & (y <= limits[1])).any()}
    unseen = sorted({name for name, _ in shown} - seen)
    if unseen:
        axes.text(
            0.02,
            0.04,
            f"worse than shown: {', '.join(unseen)}",
            transform=axes.transAxes,
            fontsize=8,
            color=GREY,
            zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )


def _interesting_range(curves: Sequence[Array], target: Target) -> tuple[float, float] | None:
    """Limits that show the approach to the target: the worst fifth of the best trials is cut."""
    finite = np.concatenate([np.empty(0), *[y[np.isfinite(y)] for y in curves]])
    if not len(finite):
        return None
    quantiles = (0.0, 0.8) if target.lower_is_better else (0.2, 1.0)
    low, high = (float(q) for q in np.quantile(finite, quantiles))
    low, high = min(low, target.value), max(high, target.value)
    margin = 0.1 * (high - low) or 0.1 * abs(target.value) or 0.1
    return low - margin, high + margin


def _curve_legend(
    figure: Figure, board: Scoreboard, colours: dict[str, str], studies: Sequence[str]
) -> None:
    submission_legend(figure, board, colours)
    handles = [Line2D([], [], color="black", linestyle=TARGET_DASH, linewidth=1.1, label="target")]
    handles += [
        Line2D(
            [],
            [],
            color=GREY,
            marker=MARKERS[i % len(MARKERS)],
            linestyle="none",
            label=f"{study} reaches it",
        )
        for i, study in enumerate(studies)
    ]
    if board.per_study["num_trials"].max() > 1:
        handles.append(Line2D([], [], color=GREY, linewidth=2.2, label="best trial of a study"))
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, alpha=0.6, label="other trials"))
    outside_legend(figure, handles, "outside lower center")


def performance_profiles(board: Scoreboard) -> Figure:
    """Share of workloads that each submission finishes within tau times the fastest."""
    # A line of the legend takes 0.21 inches, a character of it 0.09, and the rest of its width 0.9.
    longest = max(len(name) for name in board.submissions) + len("  0.000")
    width = max(PANEL[0], 0.9 + 0.09 * longest)
    height = 3.5 + 0.21 * len(board.submissions)
    figure = Figure(figsize=(2 * width, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    below = ScaledTranslation(0, -0.55, figure.dpi_scale_trans)
    colours = submission_colours(board)
    summary = board.summary()
    for axes, unit, score in zip(
        figure.subplots(1, 2, sharey=True),
        ("seconds", "steps"),
        ("score", "score_by_steps"),
        strict=True,
    ):
        ratios = board.ratios(unit)
        for rank, name in enumerate(board.submissions):
            x, y = _staircase(ratios.loc[name].to_numpy(dtype=float), board.r_max)
            axes.plot(
                x,
                y,
                drawstyle="steps-post",
                color=colours[name],
                linestyle=DASHES[rank % len(DASHES)],
                # The winner is widest, so that equal profiles show beneath each other.
                linewidth=max(2.0, 4.0 - rank),
                label=f"{name}  {summary[score][name]:.3f}",
                clip_on=False,
                zorder=3 + rank,
            )
        axes.set_title(f"by {unit} to target", loc="left")
        axes.set_xlabel("tau: times the fastest submission")
        axes.set_xlim(1, board.r_max)
        axes.set_ylim(0, 1.0)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(
            title="score (area below)",
            alignment="left",
            loc="upper left",
            bbox_to_anchor=(0, 0),
            bbox_transform=axes.transAxes + below,
        )
    figure.axes[0].set_ylabel(f"share of {len(board.workloads)} workload(s)")
    return figure


def _staircase(ratios: Array, r_max: float) -> tuple[Array, Array]:
    within = np.sort(ratios[np.isfinite(ratios)])
    shares = np.arange(len(within) + 1) / len(ratios)
    return np.concatenate([[1.0], within, [r_max]]), np.append(shares, shares[-1])


def step_time_histograms(board: Scoreboard) -> Figure:
    """Distribution of milliseconds per step, a panel a workload."""
    figure, panels = grid(len(board.workloads))
    colours = submission_colours(board)
    every_step = all(times_every_step(trial) for trial in board.trials)
    for axes, workload in zip(panels, board.workloads, strict=True):
        pooled = {name: _pooled_times(board, name, workload) for name in board.submissions}
        samples = {name: pair for name, pair in pooled.items() if len(pair[0])}
        axes.set_title(workload, loc="left")
        if samples:
            _draw_histograms(axes, samples, colours, every_step)
        else:
            axes.text(0.5, 0.5, "no step times", transform=axes.transAxes, ha="center", color=GREY)
    mean = Line2D([], [], color=GREY, linestyle=MEAN_DASH, label="mean")
    submission_legend(figure, board, colours, mean)
    if not every_step:
        figure.supxlabel(
            "These logs time stretches between evaluations, not single steps:"
            " each stretch counts with its mean.",
            fontsize=9,
            color=GREY,
        )
    return figure


def _draw_histograms(
    axes: Axes,
    samples: dict[str, tuple[Array, Array]],
    colours: dict[str, str],
    every_step: bool,
) -> None:
    low = min(float(times.min()) for times, _ in samples.values())
    high = max(float(times.max()) for times, _ in samples.values())
    wide = low > 0 and high > 4 * low
    edges = np.geomspace(low, high, 49) if wide else np.linspace(low, high, 49)
    for name, (times, weights) in samples.items():
        shares = weights / weights.sum()
        style: dict[str, Any] = {"bins": edges, "weights": shares, "color": colours[name]}
        axes.hist(times, histtype="stepfilled", alpha=0.28, **style)
        axes.hist(times, histtype="step", linewidth=1.6, **style)
        mean = float(times @ shares)
        axes.axvline(mean, color=colours[name], linewidth=1.4, linestyle=MEAN_DASH)
    axes.set_xlabel("milliseconds per step")
    axes.set_ylabel("share of steps (log scale)" if every_step else "share of steps")
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if every_step:
        # Logarithmic, so that rare slow steps show: one in a hundred costs as much as all others.
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))


def _pooled_times(board: Scoreboard, submission: str, workload: str) -> tuple[Array, Array]:
    pairs = [
        step_times(trial)
        for trial in board.trials
        if trial.submission == submission and trial.workload == workload
    ]
    times = np.concatenate([np.empty(0), *[1e3 * seconds for seconds, _ in pairs]])
    return times, np.concatenate([np.empty(0), *[weights for _, weights in pairs]])


PLOTS = (
    Plot(
        "training_curves_steps",
        "Validation metric against training steps. The dashed line is the target; a marker shows"
        " where a study's best trial reaches it.",
        partial(training_curves, unit="steps"),
    ),
    Plot(
        "training_curves_seconds",
        "The same against submission time: training and preparing for evaluation, without the"
        " evaluations and logging.",
        partial(training_curves, unit="seconds"),
    ),
    Plot(
        "performance_profiles",
        "Share of workloads that a submission finishes within tau times the fastest. The AlgoPerf"
        " score is the area below the left curve.",
        performance_profiles,
    ),
    Plot(
        "step_times",
        "How long steps take. The dashed lines are means.",
        step_time_histograms,
    ),
)
