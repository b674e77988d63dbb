"""The score command, the published scores, and the official scorer on our logs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hand_made_logs import write_missing, write_reaching
from official_harness import REPOSITORY, require_harness

from workloads_smoke import score
from workloads_smoke.scoring import Scoreboard, read_results

DATA = Path(__file__).parent / "data"
PUBLISHED_RUNS = DATA / "algoperf_v06_evals.csv.gz"
OFFICIAL_WORKLOADS = [
    "criteo1tb",
    "fastmri",
    "imagenet_resnet",
    "imagenet_vit",
    "librispeech_conformer",
    "librispeech_deepspeech",
    "ogbg",
    "wmt",
]

# Official code of v0.6 on folders of logs; our workloads' targets in the place of its own.
OFFICIAL_SCORER = """
import json, sys
from pathlib import Path
from scoring import performance_profile, scoring_utils

logs, output_dir, targets = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
scoring_utils.get_workload_metrics_and_targets = lambda name, split=None: tuple(targets[name])
performance_profile.BASE_WORKLOADS = [name.removesuffix("_pytorch") for name in targets]
performance_profile.NUM_BASE_WORKLOADS = len(targets)
results = {
    folder.name: scoring_utils.get_experiment_df(str(folder)) for folder in sorted(logs.iterdir())
}
profiles = performance_profile.compute_performance_profiles(
    results, time_col="score", min_tau=1.0, max_tau=4.0, num_points=100, output_dir=output_dir
)
scores = performance_profile.compute_leaderboard_score(profiles, normalize=True)
Path(output_dir, "scores.json").write_text(scores["score"].to_json(double_precision=15))
"""


def comparison(logs: Path) -> Path:
    """Two submissions, two workloads, three studies of two trials; nadamw misses one workload."""
    for study in range(3):
        for submission, factor in (("nadamw", 1.6), ("shampoo", 1.0)):
            mnist = logs / submission / f"study_{study}" / "mnist_pytorch"
            write_reaching(
                mnist / "trial_1", int(factor * (200 + 20 * study)), factor * (4 + study)
            )
            write_missing(mnist / "trial_2")
        write_reaching(
            logs / "shampoo" / f"study_{study}" / "wmt_pytorch" / "trial_1", 300, 9.0 + study
        )
        write_missing(logs / "nadamw" / f"study_{study}" / "wmt_pytorch" / "trial_1", best=0.5)
    return logs


def test_published_runs_give_the_published_scores() -> None:
    trials = [
        trial
        for trial in read_results([PUBLISHED_RUNS])
        if trial.submission in ("shampoo", "baseline")
    ]
    board = Scoreboard.of(trials, workloads=OFFICIAL_WORKLOADS)
    scores = board.summary()["score"]
    assert scores["shampoo"] == pytest.approx(0.624369, abs=5e-7)
    assert scores["baseline"] == pytest.approx(0.458965, abs=5e-7)
    assert board.reference == "baseline"
    assert board.seconds.loc["shampoo", "wmt"] == pytest.approx(33604.822)
    assert board.steps.loc["baseline", "ogbg"] == 21897


def test_rulesets_are_scored_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """A self-tuned entry among externally tuned ones would take from their scores."""
    arguments = [str(PUBLISHED_RUNS), "--table_only", "--workloads", ",".join(OFFICIAL_WORKLOADS)]
    assert score.main(arguments) == 2
    error = capsys.readouterr().err
    assert "(external: baseline, shampoo; self: schedule_free_adamw_v2); choose one" in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert score.main([*arguments, "--ruleset", "external"]) == 0
    printed = capsys.readouterr().out
    assert ["shampoo", "0.6244"] in [line.split()[:2] for line in printed.splitlines()]
    assert "left out, not run under the external ruleset: schedule_free_adamw_v2\n" in printed
    assert score.main([*arguments, "--ruleset", "both"]) == 0
    assert "note: rulesets are mixed (external: baseline, " in capsys.readouterr().out
    assert score.main([*arguments, "--ruleset", "self", "--submissions", "shampoo"]) == 2
    assert "no logs of --ruleset self; there are those of external: s" in capsys.readouterr().err


def test_the_ruleset_of_logs_is_that_of_their_flags(tmp_path: Path) -> None:
    for name, ruleset in (("tuned", "external"), ("free", "self")):
        folder = tmp_path / name / "study_0" / "mnist_pytorch" / "trial_1"
        write_reaching(folder, 100, 5.0)
        (folder / "flags_0.json").write_text(json.dumps({"tuning_ruleset": ruleset}))
    assert [trial.ruleset for trial in read_results([tmp_path])] == ["self", "external"]
    assert score.main([str(tmp_path), "--table_only"]) == 2


def test_score_prints_tables_and_writes_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, output = comparison(tmp_path / "logs"), tmp_path / "out"
    assert score.main([str(logs), "--output_dir", str(output)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    expected = ["mnist", "accuracy", ">=", "0.9", "shampoo", "220", "5.00", "22.7", "0.95", "3/3"]
    assert [*expected, "1.00x", "1.000"] in lines
    assert ["nadamw", "not", "reached", "-", "10.0", "0.5", "0/3", "-", "0.000"] in lines
    scores = pd.read_csv(output / "scores.csv", index_col="submission")["score"]
    assert scores["shampoo"] == 1.0
    assert scores["nadamw"] == pytest.approx((4 - 1.6) / 3 / 2, abs=0.006)
    assert len(pd.read_csv(output / "trials.csv")) == 18
    assert len(pd.read_csv(output / "studies.csv")) == 12
    assert pd.read_csv(output / "workloads.csv")["seconds"].tolist() == [
        8.0,
        5.0,
        float("inf"),
        10.0,
    ]
    assert len(pd.read_csv(output / "performance_profiles.csv")) == 2 * 2 * 100
    assert (output / "report.html").stat().st_size > 100_000
    assert not list(output.rglob(".*"))


def test_notes_say_what_makes_a_comparison_unfair(tmp_path: Path) -> None:
    logs = comparison(tmp_path / "logs")
    for study in (1, 2):
        for path in sorted((logs / "nadamw" / f"study_{study}").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    (logs / "nadamw" / "study_0" / "wmt_pytorch").rename(tmp_path / "elsewhere")
    notes = Scoreboard.of(read_results([logs])).notes()
    assert notes == [
        "uneven comparison, nadamw has fewer than others: 1 of 3 studies of mnist",
        "nadamw did not run wmt: counted as missed",
    ]


def test_notes_name_studies_and_trials_that_lack_on_one_workload_only(tmp_path: Path) -> None:
    for submission in ("shampoo", "nadamw"):
        for workload in ("mnist", "wmt"):
            short = (submission, workload) == ("nadamw", "wmt")
            for study in range(1 if short else 3):
                for number in range(1, (1 if short else 5) + 1):
                    folder = tmp_path / submission / f"study_{study}" / f"{workload}_pytorch"
                    write_missing(folder / f"trial_{number}")
    assert Scoreboard.of(read_results([tmp_path])).notes() == [
        "uneven comparison, nadamw has fewer than others:"
        " 1 of 3 studies and 1 of 5 trials in study_0 of wmt"
    ]
    assert not Scoreboard.of(read_results([tmp_path]), workloads=["mnist"]).notes()


def test_a_complete_comparison_under_self_tuning_has_one_trial_a_study(tmp_path: Path) -> None:
    for submission in ("shampoo", "nadamw"):
        for study in range(3):
            folder = tmp_path / submission / f"study_{study}" / "mnist_pytorch" / "trial_1"
            (write_missing(folder) / "flags_0.json").write_text('{"tuning_ruleset": "self"}')
    assert not Scoreboard.of(read_results([tmp_path])).notes()


def test_variants_of_official_workloads_are_named(tmp_path: Path) -> None:
    for workload in ("imagenet_resnet", "imagenet_resnet_silu", "finewebedu_lm"):
        write_missing(tmp_path / "ours" / "study_0" / f"{workload}_pytorch" / "trial_1")
    (note,) = [n for n in Scoreboard.of(read_results([tmp_path])).notes() if "variant" in n]
    assert note.startswith("imagenet_resnet_silu is a variant of imagenet_resnet: ")


def test_notes_say_how_many_everybody_has(tmp_path: Path) -> None:
    asked = "; the benchmark asks 3 x 5 under external tuning, 3 x 1 under self-tuning"
    board = Scoreboard.of(read_results([comparison(tmp_path / "logs")]))
    expected = "3 studies x 2 trials of mnist, 3 studies x 1 trial of wmt a submission"
    assert board.notes() == [expected + asked]
    board = Scoreboard.of(board.trials, workloads=["mnist"])
    assert board.notes() == ["3 studies x 2 trials a submission and workload" + asked]


def test_table_only_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = comparison(tmp_path / "logs")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert score.main([str(logs), "--table_only"]) == 0
    assert not list(work.iterdir())


def test_default_output_is_a_new_folder_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = comparison(tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert score.main([str(logs), "--workloads", "mnist"]) == 0
    assert sorted(path.name for path in Path("results").iterdir()) == ["scores-001", "scores-002"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--workloads", "mnist,ogbg"],
            "no logs of workload(s) ogbg; there are those of mnist, wmt",
        ),
        (
            ["--submissions", "sgd"],
            "no logs of submission(s) sgd; there are those of nadamw, shampoo",
        ),
        (["--reference", "sgd"], "reference 'sgd' has no logs; there are those of shampoo, nadamw"),
        (["--r_max", "1"], "a finite r_max > 1 is needed, got r_max=1.0"),
        (["--r_max", "nan"], "a finite r_max > 1 is needed, got r_max=nan"),
        (["--r_max", "inf"], "a finite r_max > 1 is needed, got r_max=inf"),
        (["--targets", "none.json"], "targets file none.json must be JSON with an object"),
        (["--targets", "logs"], "targets file logs must be JSON with an object"),
        (["--targets", "list.json"], "list.json must be JSON with an object 'workloads', got"),
        (["--targets", "number.json"], "number.json: 'mnist' must be an object, got 3"),
        (["--targets", "word.json"], "word.json: workload 'mnist': could not convert string"),
        (["cut.csv.gz"], "cut.csv.gz is not a readable CSV file: "),
        (["--output_dir", "/proc/none/of/it"], "--output_dir: nothing can be written in /proc ("),
        (
            ["--output_dir", "file/scores"],
            "--output_dir: file is no folder; move it away or name an",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    logs = comparison(tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("list.json").write_text('{"workloads": []}')
    Path("number.json").write_text('{"workloads": {"mnist": 3}}')
    bad = {"target_metric_name": "accuracy", "validation_target_value": "high"}
    Path("word.json").write_text(json.dumps({"workloads": {"mnist": bad}}))
    Path("cut.csv.gz").write_bytes(gzip.compress(b"submission,study\n" * 999)[:40])
    assert score.main([str(logs), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_workload_named_twice_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = comparison(tmp_path / "logs")
    printed = []
    for workloads in ("mnist", "mnist,mnist"):
        assert score.main([str(logs), "--table_only", "--workloads", workloads]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    board = Scoreboard.of(read_results([logs]), workloads=["mnist", "mnist"])
    assert board.workloads == ("mnist",)


def test_help_explains_the_sources() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "workloads_smoke.score", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "submission/study/workload/trial_k" in finished.stdout


@pytest.mark.harness
def test_the_official_scorer_agrees_on_our_logs(tmp_path: Path) -> None:
    logs = comparison(tmp_path / "logs")
    output = tmp_path / "official"
    output.mkdir()
    harness = require_harness()
    targets = {name: ["validation/accuracy", 0.9] for name in ("mnist_pytorch", "wmt_pytorch")}
    finished = harness.run("-c", OFFICIAL_SCORER, str(logs), str(output), json.dumps(targets))
    assert finished.returncode == 0, finished.stderr
    board = Scoreboard.of(read_results([logs]))
    official = json.loads((output / "scores.json").read_text())
    assert official == pytest.approx(board.summary()["score"].to_dict(), abs=1e-12)
    times = pd.read_csv(output / "time_to_targets.csv", index_col="submission")
    pd.testing.assert_frame_equal(times.loc[list(board.submissions)], board.seconds,
                                  check_names=False)  # fmt: skip
