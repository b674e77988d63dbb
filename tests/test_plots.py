"""Plots show what the tables say; the report holds both."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hand_made_logs import write_missing, write_reaching, write_trial
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from workloads_smoke import plots
from workloads_smoke.plot_style import COLOURS, STYLE, style, submission_colours
from workloads_smoke.report import write_report
from workloads_smoke.scoring import Scoreboard, read_results
from workloads_smoke.scoring.verdict import headline, workload_verdict


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    root = tmp_path / "logs"
    for study in (0, 1):
        for submission, factor in (("ours", 1.0), ("nadamw", 1.5)):
            mnist = root / submission / f"study_{study}" / "mnist_pytorch"
            write_reaching(mnist / "trial_1", int(200 * factor), 6.0 * factor)
            write_missing(mnist / "trial_2")
        write_missing(root / "ours" / f"study_{study}" / "wmt_pytorch" / "trial_1", best=0.7)
    return root


@pytest.fixture
def board(logs: Path) -> Scoreboard:
    return Scoreboard.of(read_results([logs]))


def lines_of(figure: Figure, panel: int, colour: str) -> list[mpl.lines.Line2D]:
    return [line for line in figure.axes[panel].lines if to_hex(line.get_color()).upper() == colour]


@pytest.mark.parametrize(("unit", "ends"), [("steps", (200, 300)), ("seconds", (6.0, 9.0))])
def test_training_curves_show_every_trial_the_target_and_where_it_is_met(
    board: Scoreboard, unit: str, ends: tuple[float, float]
) -> None:
    figure = plots.training_curves(board, unit)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mnist", "wmt"]
    assert figure.axes[0].get_title(loc="right") == "target 0.9"
    colours = submission_colours(board)
    for name, end in zip(("ours", "nadamw"), ends, strict=True):
        lines = lines_of(figure, 0, colours[name])
        curves = [line for line in lines if len(line.get_xdata()) > 1]
        assert len(curves) == 4
        bold = [line for line in curves if line.get_linewidth() > 2]
        assert [line.get_xdata()[-1] for line in bold] == [end, end]
        meeting = [line for line in lines if len(line.get_xdata()) == 1]
        assert [line.get_marker() for line in meeting] == ["o", "s"]
        assert all(line.get_xdata()[0] == end for line in meeting)
    (target,) = lines_of(figure, 0, "#000000")
    assert list(target.get_ydata()) == [0.9, 0.9]
    low, high = figure.axes[0].get_ylim()
    assert low < 0.8 < 0.95 < high


def test_a_submission_below_the_drawn_range_is_named(tmp_path: Path) -> None:
    """The range is that of what nears the target."""
    for study in range(4):
        ours = tmp_path / f"ours/study_{study}/mnist_pytorch/trial_1"
        write_trial(ours, [1, 100, 200], [0.1, 3.0, 6.0], [0.8, 0.85, 0.95])
    hopeless = tmp_path / "hopeless/study_0/mnist_pytorch/trial_1"
    write_trial(hopeless, [1, 200], [0.1, 6.0], [0.1, 0.1])
    figure = plots.training_curves(Scoreboard.of(read_results([tmp_path])), "steps")
    assert [text.get_text() for text in figure.axes[0].texts] == ["worse than shown: hopeless"]
    figure.draw_without_rendering()


def test_a_trial_of_one_evaluation_is_a_point(tmp_path: Path) -> None:
    """A line of one point would show nothing."""
    write_trial(tmp_path / "ours/study_0/mnist_pytorch/trial_1", [1], [0.1], [0.85])
    write_trial(tmp_path / "theirs/study_0/mnist_pytorch/trial_1", [1, 9], [0.1, 1.0], [0.8, 0.88])
    board = Scoreboard.of(read_results([tmp_path]))
    figure, colours = plots.training_curves(board, "steps"), submission_colours(board)
    markers = {name: lines_of(figure, 0, colours[name])[0].get_marker() for name in colours}
    assert markers == {"ours": ".", "theirs": ""}


def test_a_diverged_or_empty_trial_does_not_break_a_plot(tmp_path: Path) -> None:
    study = tmp_path / "ours" / "study_0" / "mnist_pytorch"
    write_trial(study / "trial_1", [1, 2], [1.0, 2.0], [float("nan"), float("inf")])
    (study / "trial_2").mkdir()
    board = Scoreboard.of(read_results([tmp_path]))
    for path in plots.write_plots(board, tmp_path / "plots").values():
        assert path.stat().st_size > 0


def test_profiles_step_up_at_each_ratio(board: Scoreboard) -> None:
    figure = plots.performance_profiles(board)
    colour = submission_colours(board)["nadamw"]
    (line,) = lines_of(figure, 0, colour)
    np.testing.assert_allclose(line.get_xdata(), [1.0, 1.5, 4.0])
    np.testing.assert_allclose(line.get_ydata(), [0.0, 0.5, 0.5])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["ours  0.500", "nadamw  0.417"]


def test_histograms_are_shares_of_each_submissions_steps(board: Scoreboard) -> None:
    figure = plots.step_time_histograms(board)
    outlines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert len(outlines) == 2
    for outline in outlines:
        heights = outline.get_xy()[:, 1]
        # Each bar contributes its height twice, once a corner.
        assert heights.sum() / 2 == pytest.approx(1.0)


def test_colours_stay_with_a_submission_and_are_told_apart(board: Scoreboard) -> None:
    assert submission_colours(board) == {"ours": COLOURS[0], "nadamw": COLOURS[1]}
    lightness = [np.dot(to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in COLOURS[:2]]
    assert abs(lightness[0] - lightness[1]) > 0.03
    assert len(set(COLOURS)) == len(COLOURS)


def test_many_submissions_are_told_apart_and_their_names_fit(tmp_path: Path) -> None:
    names = [f"entry_{number}_of_a_team_with_a_long_name" for number in range(14)]
    for number, name in enumerate(names):
        write_reaching(tmp_path / name / "study_0/mnist_pytorch/trial_1", 200, 6.0 + number)
    board = Scoreboard.of(read_results([tmp_path]))
    assert len(set(submission_colours(board).values())) == len(names)
    with style():
        figure = plots.performance_profiles(board)
        figure.draw_without_rendering()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert figure.bbox.count_contains(legend.get_points()) == 2
        assert not legend.overlaps(axes.xaxis.label.get_window_extent())
    left, right = (axes.get_legend().get_window_extent() for axes in figure.axes)
    assert not left.overlaps(right)


def test_plots_are_png_and_leave_the_callers_settings_alone(
    board: Scoreboard, tmp_path: Path
) -> None:
    before = {key: mpl.rcParams[key] for key in STYLE}
    paths = plots.write_plots(board, tmp_path / "plots")
    assert {key: mpl.rcParams[key] for key in STYLE} == before
    assert list(paths) == [
        "training_curves_steps",
        "training_curves_seconds",
        "performance_profiles",
        "step_times",
    ]
    for path in paths.values():
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 500
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(
        f"{name}.png" for name in paths
    )


def test_the_report_needs_nothing_beside_it(board: Scoreboard, tmp_path: Path) -> None:
    page = write_report(board, tmp_path / "out").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "not reached" in page and "nadamw did not run wmt" in page
    assert headline(board) in page
    for workload in board.workloads:
        assert workload_verdict(board, workload).replace(">", "&gt;") in page


def test_names_from_logs_cannot_inject_markup(tmp_path: Path) -> None:
    write_reaching(tmp_path / "<b>x" / "study_0" / "mnist_pytorch" / "trial_1", 100, 5.0)
    board = Scoreboard.of(read_results([tmp_path]))
    page = write_report(board, tmp_path / "out").read_text()
    assert "<b>x" not in page and "&lt;b&gt;x" in page


def test_verdicts_give_the_reasons(board: Scoreboard) -> None:
    assert workload_verdict(board, "mnist") == (
        "ours reached accuracy >= 0.9 first, in 200 steps and 6.00 s. nadamw took 1.50x as long"
        " (9.00 s): 1.50x the steps (300 against 200) at 1.00x the time per step"
        " (30.0 against 30.0 ms)."
    )
    assert workload_verdict(board, "wmt") == (
        "Nobody reached accuracy >= 0.9; best: ours 0.7. nadamw did not run it."
    )
    assert headline(board) == (
        "ours has the highest AlgoPerf score, 0.5000 against nadamw 0.4167. It was fastest on 1 of"
        " 2 and reached the target of 1 of 2 workloads."
    )


def test_verdicts_say_where_studies_disagree_and_where_r_max_cuts(tmp_path: Path) -> None:
    for study in range(3):
        for name in ("fast", "slow", "lucky"):
            folder = tmp_path / name / f"study_{study}" / "mnist_pytorch" / "trial_1"
            if (name == "fast" and study == 2) or (name == "lucky" and study > 0):
                write_missing(folder)
            else:
                write_reaching(folder, 100, 50.0 if name == "slow" else 5.0)
    verdict = workload_verdict(Scoreboard.of(read_results([tmp_path])), "mnist")
    assert "in 100 steps and 5.00 s (reached in 2 of 3 studies)." in verdict
    assert "slow took 10.00x as long" in verdict
    assert "; beyond 4x, the score counts it as missed." in verdict
    assert "lucky reached accuracy >= 0.9 in only 1 of 3 studies, which counts as missed" in verdict
    trials = [t for t in read_results([tmp_path]) if t.submission == "lucky"]
    alone = workload_verdict(Scoreboard.of(trials), "mnist")
    assert alone.startswith("lucky reached accuracy >= 0.9 in only 1 of 3 studies, which counts")
    at_the_edge = Scoreboard.of(read_results([tmp_path]), r_max=10.0)
    assert at_the_edge.ratios().loc["slow", "mnist"] == 10.0
    assert "beyond" not in workload_verdict(at_the_edge, "mnist")
