"""Reading logs: layouts, names, targets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hand_made_logs import write_reaching, write_trial

from workloads_smoke.registry import WORKLOADS, load_workload
from workloads_smoke.scoring import Scoreboard, Target, official_targets, read_results, read_targets
from workloads_smoke.scoring.targets import LOWER_IS_BETTER


def keys(*sources: Path | str) -> list[tuple[str, str, str, str]]:
    return [trial.key for trial in read_results(sources)]


def test_folder_of_submissions_one_submission_and_one_study_give_the_same_trial(
    tmp_path: Path,
) -> None:
    write_reaching(tmp_path / "ours" / "study_7" / "mnist_pytorch" / "trial_2", 100, 5.0)
    expected = [("ours", "mnist", "study_7", "trial_2")]
    assert keys(tmp_path) == expected
    assert keys(tmp_path / "ours") == expected
    assert keys(tmp_path / "ours" / "study_7") == expected


def test_an_experiment_without_a_name_is_one_study(tmp_path: Path) -> None:
    write_reaching(tmp_path / "ours" / "wmt_jax" / "trial_1", 100, 5.0)
    assert keys(tmp_path / "ours") == [("ours", "wmt", "study_0", "trial_1")]


def test_experiments_that_are_no_studies_are_submissions(tmp_path: Path) -> None:
    """What --experiment_dir=X with --experiment_name=nadamw, then shampoo, leaves behind."""
    for name in ("nadamw", "shampoo"):
        write_reaching(tmp_path / "X" / name / "mnist_pytorch" / "trial_1", 100, 5.0)
    expected = [(name, "mnist", "study_0", "trial_1") for name in ("nadamw", "shampoo")]
    assert keys(tmp_path / "X") == expected
    assert keys(tmp_path / "X" / "nadamw") == expected[:1]
    together = keys(f"ours={tmp_path / 'X'}")
    assert together == [("ours", "mnist", name, "trial_1") for name in ("nadamw", "shampoo")]


def test_an_experiment_beside_a_comparison_keeps_its_name(tmp_path: Path) -> None:
    write_reaching(tmp_path / "try" / "mnist_pytorch" / "trial_1", 100, 5.0)
    smoke = tmp_path / "smoke-001" / "logs" / "shampoo" / "study_0"
    write_reaching(smoke / "mnist_pytorch" / "trial_1", 100, 5.0)
    assert [key[0] for key in keys(tmp_path)] == ["shampoo", "try"]


def test_studies_of_the_official_layout_have_any_names(tmp_path: Path) -> None:
    for study in ("seed_1", "seed_2"):
        folder = tmp_path / "submissions" / "ours" / study / "mnist_jax" / "trial_1"
        write_reaching(folder, 100, 5.0)
    expected = [("ours", "mnist", study, "trial_1") for study in ("seed_1", "seed_2")]
    assert keys(tmp_path / "submissions") == keys(f"ours={tmp_path / 'submissions' / 'ours'}")
    assert keys(tmp_path / "submissions") == expected


def test_two_files_under_one_name_are_noted(tmp_path: Path) -> None:
    for study, file in enumerate(("a/submission.py", "b/submission.py")):
        folder = tmp_path / "ours" / f"study_{study}" / "mnist_pytorch" / "trial_1"
        write_reaching(folder, 100, 5.0)
        (folder / "flags_0.json").write_text(json.dumps({"submission_path": file}))
    (note,) = [n for n in Scoreboard.of(read_results([tmp_path])).notes() if "files" in n]
    assert note.startswith("ours was run from 2 files, a/submission.py, b/submission.py: if ")


def test_renaming_keeps_two_submissions_of_one_name_apart(tmp_path: Path) -> None:
    for run in ("monday", "tuesday"):
        write_reaching(tmp_path / run / "ours" / "study_0" / "mnist_pytorch" / "trial_1", 100, 5.0)
    with pytest.raises(ValueError, match=r"found twice.*NAME=FOLDER"):
        read_results([tmp_path / "monday", tmp_path / "tuesday"])
    renamed = keys(tmp_path / "monday", f"later={tmp_path / 'tuesday' / 'ours'}")
    assert [key[0] for key in renamed] == ["later", "ours"]


def test_a_folder_may_have_the_sign_of_a_new_name_in_its_own(tmp_path: Path) -> None:
    write_reaching(tmp_path / "lr=0.1" / "study_0" / "mnist_pytorch" / "trial_1", 100, 5.0)
    assert keys(tmp_path / "lr=0.1") == [("lr=0.1", "mnist", "study_0", "trial_1")]
    for name in ("ours", "momentum=0.9"):
        renamed = keys(f"{name}={tmp_path / 'lr=0.1'}")
        assert renamed == [(name, "mnist", "study_0", "trial_1")]
    with pytest.raises(FileNotFoundError, match=r"no such folder or file of results: nowhere$"):
        keys("lr=0.1=nowhere")


def test_trials_come_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        folder = tmp_path / "ours" / "study_0" / "mnist_pytorch" / f"trial_{number}"
        write_reaching(folder, 100, 5.0)
    assert [key[3] for key in keys(tmp_path)] == ["trial_1", "trial_9", "trial_10"]


def test_recorded_target_hyperparameters_and_metadata_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "ours" / "study_0" / "mnist_pytorch" / "trial_1"
    write_reaching(folder, 100, 5.0, target=0.9, max_seconds=12.0)
    (trial,) = read_results([tmp_path])
    assert trial.target == Target("accuracy", 0.9, step_hint=1000, max_seconds=12.0)
    assert trial.hyperparameters == {"learning_rate": 0.1}
    assert trial.metadata["workload.step_hint"] == 1000
    assert trial.folder == folder


def test_a_trial_that_never_evaluated_is_kept(tmp_path: Path) -> None:
    study = tmp_path / "ours" / "study_0" / "mnist_pytorch"
    (study / "trial_1").mkdir(parents=True)
    (study / "trial_2").mkdir()
    (study / "trial_2" / "eval_measurements.csv").touch()
    assert [len(trial.evaluations) for trial in read_results([tmp_path])] == [0, 0]


def test_time_falls_back_on_the_score_column(tmp_path: Path) -> None:
    folder = write_reaching(tmp_path / "s" / "study_0" / "mnist_pytorch" / "trial_1", 100, 5.0)
    lines = (folder / "eval_measurements.csv").read_text().splitlines()
    stripped = "\n".join(line.split(",", 1)[1] for line in lines)
    (folder / "eval_measurements.csv").write_text(stripped)
    (trial,) = read_results([tmp_path])
    assert list(trial.evaluations["accumulated_submission_time"]) == [0.1, 2.5, 5.0]


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder.*nowhere"):
        read_results([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="no trial in"):
        read_results([tmp_path])
    folder = write_reaching(tmp_path / "ours" / "study_0" / "mnist_pytorch" / "trial_1", 100, 5.0)
    with pytest.raises(ValueError, match="give the folder above it"):
        read_results([folder.parent])
    (folder / "meta_data_0.json").write_text("{half")
    with pytest.raises(ValueError, match=r"meta_data_0\.json is not JSON"):
        read_results([tmp_path])
    (folder / "meta_data_0.json").unlink()
    (folder / "eval_measurements.csv").write_text("global_step,validation/accuracy\n1,0.5\n")
    with pytest.raises(ValueError, match=r"lacks the column.*accumulated_submission_time"):
        read_results([tmp_path])


def test_an_evaluation_file_needs_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.csv"
    path.write_text("submission,study,workload,trial,global_step\na,s,w,t,1\n")
    with pytest.raises(ValueError, match=r"lacks.*accumulated_submission_time, metric, value"):
        read_results([path])
    with pytest.raises(ValueError, match="names its submissions itself"):
        read_results([f"new={path}"])


def test_official_targets_know_their_direction_and_budget() -> None:
    targets = official_targets()
    assert len(targets) == 11
    assert targets["wmt"] == Target("bleu", 30.8491, step_hint=120_000, max_seconds=43_336)
    assert not targets["wmt"].lower_is_better
    # One of the nine that the leaderboard scores now, after the harness that the others are read off.
    assert targets["finewebedu_lm"] == Target("ppl", 22.2995, step_hint=72_000)
    assert targets["librispeech_conformer"].lower_is_better
    assert targets["librispeech_conformer"].column == "validation/wer"


def test_targets_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be JSON with an object 'workloads'"):
        read_targets(path)
    path.write_text(json.dumps({"workloads": {"mnist": {"target_metric_name": "accuracy"}}}))
    with pytest.raises(ValueError, match=r"'mnist' lacks.*validation_target_value"):
        read_targets(path)
    fields = {"target_metric_name": "accuracy", "validation_target_value": float("nan")}
    path.write_text(json.dumps({"workloads": {"mnist": fields}}))
    with pytest.raises(
        ValueError, match="'mnist': validation_target_value must be a finite number"
    ):
        read_targets(path)
    with pytest.raises(ValueError, match="'speed' is unknown"):
        Target("speed", 1.0)
    for value in (float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=r"must be a finite number, got -?inf"):
            Target("loss", value)


def test_metrics_have_the_direction_of_the_workloads_that_they_judge() -> None:
    found = {}
    for name in WORKLOADS:
        facts = load_workload(name).facts
        found[facts.target_metric] = not facts.larger_is_better
    assert found.items() <= LOWER_IS_BETTER.items()
    others = LOWER_IS_BETTER.keys() - found.keys()
    assert others == {"ce_loss", "ctc_loss", "l1_loss", "error_rate", "perplexity"}
    assert all(LOWER_IS_BETTER[name] for name in others)


def test_a_log_without_the_target_metric_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ours" / "study_0" / "mnist_pytorch" / "trial_1"
    write_trial(folder, [1], [1.0], [0.5], metric="loss", target=None)
    with pytest.raises(ValueError, match="no column 'validation/accuracy'"):
        Scoreboard.of(read_results([tmp_path]))
