"""One page that shows tables, verdicts and plots together, readable without anything beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workloads_smoke.atomic_files import write_text
from workloads_smoke.plot_style import submission_colours
from workloads_smoke.plots import PLOTS, write_plots
from workloads_smoke.scoring import tables
from workloads_smoke.scoring.scoreboard import Scoreboard
from workloads_smoke.scoring.verdict import headline, workload_verdict

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #202124;
  background: #fff; max-width: 76rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p.lead { font-size: 1.12rem; margin: .2rem 0 1.4rem; } .quiet { color: #5f6368; font-size: .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
.wide { overflow-x: auto; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #202124; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
tr.group td { border-top: 1px solid #dadce0; } tr.group:first-child td { border-top: 0; }
td.missed { color: #5f6368; font-style: italic; }
.chip { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em; }
.note { border-left: 4px solid #E69F00; background: #fdf6e8; padding: .5rem .9rem; margin: .8rem 0; }
figure { margin: 1.2rem 0 2.2rem; } img { max-width: 100%; height: auto; display: block; }
figcaption { color: #5f6368; font-size: .92rem; margin-top: .4rem; }
dt { font-weight: 600; margin-top: .7rem; } dd { margin: .1rem 0 0; }
summary { cursor: pointer; }
"""

_READING = """
<dl>
<dt>steps, seconds</dt><dd>to the first evaluation that meets the target: the fastest trial of a
study, then the median of the studies. Seconds are the submission's own time; evaluations and
logging are not in it.</dd>
<dt>ms/step</dt><dd>seconds divided by steps, both to the target; where it was missed, those of
the whole run with the best metric.</dd>
<dt>best</dt><dd>best validation metric of all trials.</dd>
<dt>studies</dt><dd>studies that reached the target, of all.</dd>
<dt>score</dt><dd>AlgoPerf score: area below the performance profile for tau in [1, r_max], by the
official rule of 100 points and trapezoids. 1 is fastest on every workload; a time above r_max times
the fastest counts as missed. &ldquo;by steps&rdquo; puts steps in the place of seconds. A
workload&rsquo;s score is that of the workload alone; the mean over workloads is the score.</dd>
<dt>speed-up</dt><dd>time of the reference divided by that of the submission, geometric mean over
the workloads that both reached.</dd>
</dl>
"""


def write_report(board: Scoreboard, folder: Path, title: str = "AlgoPerf scores") -> Path:
    """Write tables (CSV), plots (PNG) and ``report.html``, which embeds the plots.

    Args:
        board: what to report.
        folder: where to; files of the same names there are replaced.
        title: heading of the page.

    Returns:
        Path of the page.
    """
    tables.write_csv(board, folder)
    plots = write_plots(board, folder / "plots")
    figures = [
        f'<figure><img alt="{html.escape(plot.caption)}" src="{_embedded(plots[plot.name])}">'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
        for plot in PLOTS
    ]
    path = folder / "report.html"
    write_text(path, _page(board, title, figures))
    return path


def _page(board: Scoreboard, title: str, figures: Sequence[str]) -> str:
    verdicts = [
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(workload_verdict(board, name))}</dd>"
        for name in board.workloads
    ]
    notes = [f'<p class="note">{html.escape(note)}</p>' for note in board.notes()]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(headline(board))}</p>',
        _summary_table(board),
        *notes,
        "<h2>Who won where, and why</h2>",
        f"<dl>{''.join(verdicts)}</dl>",
        "<h2>Every workload</h2>",
        _workload_table(board),
        "<h2>Plots</h2>",
        *figures,
        "<h2>Best trials</h2>",
        _best_trials(board),
        "<h2>How to read this</h2>",
        _READING.replace("r_max", f"{board.r_max:g}"),
        f'<p class="quiet">{html.escape(_machine(board))}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _summary_table(board: Scoreboard) -> str:
    rows = tables.summary_rows(board)
    return _table(board, tables.SUMMARY_HEADER, rows, num_text=1, name_column=0)


def _workload_table(board: Scoreboard) -> str:
    rows = tables.workload_rows(board)
    return _table(board, tables.WORKLOAD_HEADER, rows, num_text=3, name_column=2)


def _best_trials(board: Scoreboard) -> str:
    """The point that each study's best trial was run at."""
    trials = {trial.key: trial for trial in board.trials}
    rows = []
    for record in board.per_study.sort_values(["workload", "submission"]).to_dict("records"):
        key = (record["submission"], record["workload"], record["study"], record["best_trial"])
        point = ", ".join(f"{k}={_short(v)}" for k, v in trials[key].hyperparameters.items())
        rows.append((key[1], key[0], key[2], key[3], point or tables.MISSING))
    header = ("workload", "submission", "study", "trial", "hyperparameters")
    table = _table(board, header, rows, num_text=5, name_column=1)
    return f"<details><summary>{len(rows)} best trials and their points</summary>{table}</details>"


def _table(
    board: Scoreboard,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    num_text: int,
    name_column: int,
) -> str:
    """A table whose first columns are text and one of them names submissions."""
    colours = submission_colours(board)
    lines = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            chip = ""
            if column == name_column:
                chip = f'<span class="chip" style="background:{colours[cell]}"></span>'
            missed = " missed" if cell in (tables.NOT_REACHED, tables.NOT_RUN) else ""
            text = "text" if column < num_text else "number"
            cells.append(f'<td class="{text}{missed}">{chip}{html.escape(cell)}</td>')
        lines.append(f"<tr{' class=group' if row[0] else ''}>{''.join(cells)}</tr>")
    head = "".join(
        f'<th class="{"text" if column < num_text else "number"}">{html.escape(name)}</th>'
        for column, name in enumerate(header)
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _machine(board: Scoreboard) -> str:
    """What the logs say about where they were made."""
    described = sorted({_describe(trial.metadata) for trial in board.trials} - {""})
    if not described:
        return "The logs do not say on which machine they were made."
    text = "; ".join(described)
    if len(described) > 1:
        return f"Made on different machines or software, so seconds do not compare: {text}."
    return f"Made on {text}."


def _describe(metadata: Mapping[str, Any]) -> str:
    parts = []
    if "cpu_model_name" in metadata:
        parts.append(f"{metadata['cpu_model_name']} ({metadata.get('cpu_count', '?')} cores)")
    if "gpu_model_name" in metadata:
        parts.append(f"{metadata.get('gpu_count', 1)} x {metadata['gpu_model_name']}")
    if "torch_version" in metadata:
        parts.append(f"torch {metadata['torch_version']}")
    if "torch_num_threads" in metadata:
        parts.append(f"{metadata['torch_num_threads']} thread(s)")
    return ", ".join(parts)


def _embedded(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
