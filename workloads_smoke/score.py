"""Score logs: ``python -m workloads_smoke.score DIR [DIR ...]``.

Reads logs of the official harness as well as ours, prints time and steps to target and the
AlgoPerf score, and writes CSV tables, plots and a report into a folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from workloads_smoke.errors import UserError
from workloads_smoke.folders import check_folder
from workloads_smoke.report import write_report
from workloads_smoke.scoring.console import say
from workloads_smoke.scoring.folders import fresh_folder
from workloads_smoke.scoring.logs import Trial, read_results
from workloads_smoke.scoring.notes import by_ruleset, listed
from workloads_smoke.scoring.profiles import R_MAX
from workloads_smoke.scoring.scoreboard import Scoreboard
from workloads_smoke.scoring.tables import score_text
from workloads_smoke.scoring.targets import Target, official_targets, read_targets

RESULTS = Path("results")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; None means that of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m workloads_smoke.score",
        description=(
            "Time and steps to target (fastest trial of a study, median of the studies),"
            " performance profiles and the AlgoPerf score, from logs of the official harness or"
            " of workloads_smoke.run."
        ),
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="DIR",
        help="logs: a folder of submissions (submission/study/workload/trial_k), of one"
        " submission or of one study; NAME=DIR gives the submission in DIR another name; or a"
        " .csv / .csv.gz file with one evaluation a row. Experiments that are not named study..."
        " and lie beside each other in DIR are submissions; NAME=DIR makes them studies of one",
    )
    parser.add_argument(
        "--workloads",
        type=_names,
        help="workloads that count, separated by commas; one that a submission did not run counts"
        " as missed (default: all that were run)",
    )
    parser.add_argument(
        "--submissions", type=_names, help="submissions to compare (default: all that were run)"
    )
    parser.add_argument(
        "--ruleset",
        choices=("external", "self", "both"),
        help="count runs under this ruleset only, or both together; needed where the logs hold both,"
        " for the benchmark scores each by itself (default: the one that there is)",
    )
    parser.add_argument(
        "--reference",
        help="submission that speed-ups are relative to (default: one named like a baseline)",
    )
    parser.add_argument(
        "--targets",
        help="'official' for those of AlgoPerf v0.6, or a JSON file of that form (default: what"
        " each run recorded in meta_data_0.json, else the official ones)",
    )
    parser.add_argument(
        "--r_max",
        type=float,
        default=R_MAX,
        help="a time above r_max times the fastest counts as missed (default: %(default)g)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder for CSV tables, plots and report.html, earlier ones there are replaced"
        " (default: a new folder results/scores-001, -002, ...)",
    )
    parser.add_argument(
        "--table_only", action="store_true", help="print the tables and write nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    try:
        if not options.table_only:
            check_folder(options.output_dir or RESULTS, "--output_dir")
        trials = _select(read_results(options.sources), options.submissions)
        trials, left_out = _under_one_ruleset(trials, options.ruleset)
        board = Scoreboard.of(
            trials,
            targets=_given_targets(options.targets),
            workloads=options.workloads,
            reference=options.reference,
            r_max=options.r_max,
        )
    except (UserError, ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    say(score_text(board))
    if left_out:
        say(f"note: left out, not run under the {options.ruleset} ruleset: {', '.join(left_out)}")
    if not options.table_only:
        folder = options.output_dir or fresh_folder(RESULTS, "scores")
        try:
            report = write_report(board, folder)
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        say(f"\ntables, plots and report: {report}")
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return list(dict.fromkeys(names))


def _select(trials: list[Trial], submissions: Sequence[str] | None) -> list[Trial]:
    if submissions is None:
        return trials
    known = sorted({trial.submission for trial in trials})
    unknown = sorted(set(submissions) - set(known))
    if unknown:
        raise ValueError(
            f"no logs of submission(s) {', '.join(unknown)}; there are those of {', '.join(known)}"
        )
    return [trial for trial in trials if trial.submission in submissions]


def _under_one_ruleset(trials: list[Trial], ruleset: str | None) -> tuple[list[Trial], list[str]]:
    """Trials under the ruleset asked for or not known, and the submissions of the others."""
    rulesets = by_ruleset(trials)
    if ruleset is None and len(rulesets) > 1:
        raise ValueError(
            f"these runs are of {len(rulesets)} rulesets ({listed(rulesets)}); choose one with"
            " --ruleset, or --ruleset both to score them together"
        )
    if ruleset in (None, "both"):
        return trials, []
    if rulesets and ruleset not in rulesets:
        raise ValueError(f"no logs of --ruleset {ruleset}; there are those of {listed(rulesets)}")
    kept = [trial for trial in trials if trial.ruleset in (None, ruleset)]
    names = {trial.submission for trial in trials if trial.ruleset not in (None, ruleset)}
    return kept, sorted(names)


def _given_targets(source: str | None) -> Mapping[str, Target] | None:
    if source is None:
        return None
    return official_targets() if source == "official" else read_targets(Path(source))


if __name__ == "__main__":
    sys.exit(main())
