"""What the runner says to mistakes, and that they cost nothing; its flags and their help."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from absl import flags
from runner_calls import Runner
from tiny_runner import SUBMISSION, write_submission

from workloads_smoke import run_flags
from workloads_smoke.errors import UserError
from workloads_smoke.locks import sole_user
from workloads_smoke.plan import make_folders


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_an_existing_folder_is_left_alone_unless_told(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runner.trial().parent
    folder.mkdir(parents=True)
    (folder / "precious").write_text("mine")
    assert runner.call() == 1
    assert capsys.readouterr().err == (
        f"error: experiment folder {folder} exists; --resume_last_run goes on with it, "
        "--overwrite deletes it first, --append_timestamp makes a new one beside it\n"
    )
    assert [path.name for path in folder.iterdir()] == ["precious"]
    # A mistake elsewhere must not cost what --overwrite would delete.
    assert runner.call(overwrite=True, tuning_search_space="none.json") == 1
    assert (folder / "precious").exists()
    assert runner.call(overwrite=True, max_global_steps=1) == 0
    assert not (folder / "precious").exists()
    assert runner.trial().exists()


def test_what_a_link_leads_to_is_not_deleted(
    runner: Runner, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    folder = runner.trial().parent
    folder.parent.mkdir(parents=True)
    folder.symlink_to(elsewhere)
    assert runner.call(overwrite=True, max_global_steps=1) == 1
    assert f"{folder} is one to {elsewhere}; remove the link" in capsys.readouterr().err
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


BROKEN_JSON, NO_RATE, NO_UPDATE = "broken.json", "no_rate.json", "no_update.py"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workload": "mnits"}, "unknown workload 'mnits'; known ones: mnist, "),
        ({"workload": "tiny,cifar"}, "unknown workload 'cifar'; known ones: mnist, "),
        ({"workload": ""}, "unknown workload"),
        ({"tuning_search_space": BROKEN_JSON}, f"{BROKEN_JSON} is not JSON: line 1, column 2"),
        (
            {"tuning_search_space": NO_RATE},
            f"{NO_RATE} lacks hyperparameter 'learning_rate', which submission",
        ),
        ({"tuning_search_space": None}, "--tuning_ruleset=external needs --tuning_search_space"),
        ({"tuning_ruleset": "self"}, "--tuning_ruleset=self takes no --tuning_search_space"),
        ({"submission_path": NO_UPDATE}, f"{NO_UPDATE} lacks the function update_params"),
        ({"submission_path": "none.py"}, "there is no file none.py"),
        ({"framework": "jax"}, "--framework=jax: this runner runs PyTorch submissions"),
        ({"use_wandb": True}, "--use_wandb is not possible here"),
        ({"overwrite": True, "resume_last_run": True}, "give one of them"),
        ({"max_global_steps": 0}, "--max_global_steps must be at least 1, got 0"),
        ({"step_budget": 0.0}, "--step_budget must be a number above 0, got 0.0"),
        ({"step_budget": "nan"}, "--step_budget must be a number above 0, got nan"),
        (
            {"experiment_dir": BROKEN_JSON},
            f"{BROKEN_JSON} is no folder; move it away or name another",
        ),
        ({"experiment_dir": BROKEN_JSON, "overwrite": True}, f"{BROKEN_JSON} is no folder; "),
        ({"experiment_name": "../study_0"}, "--experiment_name is a folder in --experiment_dir"),
        ({"experiment_name": "/study_0"}, "--experiment_name is a folder in --experiment_dir"),
        ({"hparam_start_index": 3}, "--hparam_start_index=3: "),
        ({"hparam_end_index": 0}, "must satisfy 0 <= start < end, got 0 and 0"),
    ],
)
def test_mistakes_get_one_line_and_cost_nothing(
    runner: Runner,
    given: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runner.folder)
    Path(BROKEN_JSON).write_text("{learning_rate: 3}")
    Path(NO_RATE).write_text('[{"lr": 0.1}]')
    Path(NO_UPDATE).write_text(SUBMISSION.replace("def update_params(", "def update("))
    assert runner.call(**given) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not runner.trial().parent.exists(), "the mended command must not meet its own folder"


def test_an_error_inside_the_submission_keeps_its_traceback(runner: Runner) -> None:
    text = SUBMISSION.replace("    losses = workload", "    raise KeyError\n    losses = workload")
    path = write_submission(runner.folder / "raising", text)
    with pytest.raises(KeyError) as caught:
        runner.call(submission_path=path)
    assert str(caught.traceback[-1].path) == str(path)


@pytest.mark.parametrize(
    ("function", "returned", "what"),
    [
        ("update_params", "None", "NoneType"),
        ("update_params", "optimizer_state, model", "tuple of 2"),
        ("prepare_for_eval", "optimizer_state", "dict"),
    ],
)
def test_what_a_function_must_return_is_said(
    runner: Runner,
    capsys: pytest.CaptureFixture[str],
    function: str,
    returned: str,
    what: str,
) -> None:
    before, name, body = SUBMISSION.partition(f"def {function}(")
    body = re.sub(r"    return .*", f"    return {returned}", body, count=1)
    path = write_submission(runner.folder / "returning", before + name + body)
    assert runner.call(submission_path=path) == 1
    assert capsys.readouterr().err == (
        f"error: submission {path}: {function} must return optimizer_state, current_param_container "
        f"and model_state, got {what}\n"
    )


def test_a_dict_of_batch_sizes_may_lack_what_is_not_asked_for(
    runner: Runner, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny workload's own size holds, so it need not know that workload."""
    text = SUBMISSION.replace("    return 16\n", "    return {'wmt': 128}[workload_name]\n")
    path = write_submission(runner.folder / "sizes", text)
    assert runner.call(submission_path=path, max_global_steps=1) == 0
    assert f"get_batch_size of {path}: KeyError 'tiny'" in caplog.text
    given = {"experiment_name": "study_1", "use_submission_batch_size": True}
    assert runner.call(submission_path=path, **given) == 1
    assert (
        f"submission {path}: get_batch_size knows no 'tiny' (KeyError 'tiny'); leave out "
        "--use_submission_batch_size"
    ) in capsys.readouterr().err


def test_a_point_that_the_submission_refuses_can_be_mended(runner: Runner) -> None:
    """hparams.json of a trial that never started would win over the mended file."""
    text = SUBMISSION.replace(
        "    optimizer = ", "    float(hyperparameters.learning_rate)\n    optimizer = ", 1
    )
    assert text != SUBMISSION
    write_submission(runner.folder / "entry", text)
    runner.space.write_text('[{"learning_rate": "much"}]')
    with pytest.raises(ValueError, match="could not convert string to float"):
        runner.call()
    assert not runner.trial().parent.exists()
    runner.space.write_text('[{"learning_rate": 0.1}]')
    assert runner.call(max_global_steps=1, resume_last_run=True) == 0
    assert json.loads((runner.trial() / "hparams.json").read_text()) == {"learning_rate": 0.1}


def test_help_explains_every_flag() -> None:
    values = flags.FlagValues()
    run_flags.define(values)
    for name in values:
        text = values[name].help or ""
        assert re.fullmatch(r"(<.*>: )?[A-Z'].{10,}\.", text, re.DOTALL), name


# `flags.DEFINE_*` of submission_runner.py, mlcommons/algorithmic-efficiency v0.6.
OFFICIAL_FLAGS = """
submission_path workload tuning_ruleset tuning_search_space num_tuning_trials data_dir
imagenet_v2_data_dir librispeech_tokenizer_vocab_path framework torch_compile experiment_dir
experiment_name save_checkpoints save_intermediate_checkpoints resume_last_run append_timestamp
use_wandb profile max_global_steps overwrite hparam_start_index hparam_end_index rng_seed
set_pytorch_max_split_size pytorch_eval_num_workers capture_jax_trace skip_evals
"""


def test_all_official_flags_are_there() -> None:
    values = flags.FlagValues()
    run_flags.define(values)
    ours = {"eval_every_steps", "step_budget", "parallel_trials", "use_submission_batch_size"}
    assert set(values) == set(OFFICIAL_FLAGS.split()) | ours


def test_a_mistake_leaves_what_other_trials_logged(runner: Runner) -> None:
    assert runner.call(max_global_steps=1) == 0
    before = {path: path.read_bytes() for path in runner.trial().iterdir()}
    runner.space.write_text('[{"learning_rate": 0.1}, {"learning_rate": 0.1}]')
    needs_more = SUBMISSION.replace("hyperparameters.learning_rate", "hyperparameters.momentum")
    write_submission(runner.folder / "entry", needs_more)
    assert runner.call(resume_last_run=True, num_tuning_trials=2, max_global_steps=1) == 1
    assert {path: path.read_bytes() for path in runner.trial().iterdir()} == before
    assert not runner.trial(2).exists()


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"submission_path": "other.py"}, "--submission_path={submission}, and not with "),
        ({"tuning_search_space": "other.json"}, "and not with --tuning_search_space=other.json;"),
        (
            {"tuning_ruleset": "self", "tuning_search_space": None},
            "--tuning_ruleset=external, and not with no --tuning_search_space, --tuning_ruleset=self;",
        ),
        ({"step_budget": 0.5}, "no --step_budget, and not with --step_budget=0.5;"),
        ({"eval_every_steps": 5}, "--eval_every_steps=10, and not with --eval_every_steps=5;"),
        ({"skip_evals": True}, "--skip_evals=False, and not with --skip_evals=True;"),
        ({"max_global_steps": 2}, "--max_global_steps=1, and not with --max_global_steps=2;"),
    ],
)
def test_trials_of_other_flags_are_not_resumed(
    runner: Runner,
    given: dict[str, Any],
    difference: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runner.folder)
    Path("other.py").write_text(SUBMISSION)
    Path("other.json").write_text('[{"learning_rate": 0.1}]')
    assert runner.call(max_global_steps=1) == 0
    before = {path: path.read_bytes() for path in runner.trial().iterdir()}
    flags_given = {"max_global_steps": 1, **given, "resume_last_run": True, "num_tuning_trials": 2}
    assert runner.call(**flags_given) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {runner.trial()} was run with ")
    assert difference.format(submission=runner.submission) in errors
    assert errors.count("\n") == 1
    assert {path: path.read_bytes() for path in runner.trial().iterdir()} == before
    assert not runner.trial(2).exists()


@pytest.mark.parametrize("flag", ["resume_last_run", "overwrite"])
def test_a_trial_that_another_process_trains_is_left_alone(
    runner: Runner, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.call(max_global_steps=1) == 0
    (runner.trial() / "outcome.json").unlink()
    before = {path: path.read_bytes() for path in runner.trial().iterdir()}
    # As another process does: a lock belongs to an open file, not to a process.
    with sole_user(runner.trial()):
        assert runner.call(max_global_steps=1, **{flag: True}) == 1
        errors = capsys.readouterr().err
        assert f"error: another process is training in {runner.trial()}; " in errors
    assert {path: path.read_bytes() for path in runner.trial().iterdir()} == before
    assert runner.call(max_global_steps=1, **{flag: True}) == 0


def test_nothing_is_deleted_where_anything_is_in_use(runner: Runner) -> None:
    folders = [runner.trial().parent, runner.trial().parent.with_name("tiny_too_pytorch")]
    for folder in folders:
        (folder / "trial_1").mkdir(parents=True)
    requests: list[Any] = [SimpleNamespace(folder=folder / "trial_1") for folder in folders]
    with sole_user(folders[1] / "trial_1"), pytest.raises(UserError, match="another process"):
        make_folders(requests, overwrite=True)
    assert all((folder / "trial_1").is_dir() for folder in folders)
    make_folders(requests, overwrite=True)
    assert not any((folder / "trial_1").exists() for folder in folders)


def test_the_same_files_by_other_paths_are_resumed(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runner.call(max_global_steps=1) == 0
    monkeypatch.chdir(runner.folder)
    given = {"submission_path": "entry/entry.py", "tuning_search_space": "space.json"}
    assert Path(given["submission_path"]).samefile(runner.submission)
    assert runner.call(max_global_steps=1, resume_last_run=True, **given) == 0


def test_files_named_from_one_folder_are_the_same_from_another(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was typed means something else elsewhere."""
    monkeypatch.chdir(runner.folder)
    relative = {"submission_path": "entry/entry.py", "tuning_search_space": "space.json"}
    assert runner.call(max_global_steps=1, **relative) == 0
    elsewhere = runner.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert runner.call(max_global_steps=1, resume_last_run=True) == 0
    write_submission(elsewhere / "entry")
    (elsewhere / "space.json").write_text(runner.space.read_text())
    assert runner.call(max_global_steps=1, resume_last_run=True, **relative) == 1
    assert f"was run with --submission_path={runner.submission}" in capsys.readouterr().err


def test_trials_by_other_code_are_kept_and_named(
    runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    assert runner.call(max_global_steps=1) == 0
    with caplog.at_level("WARNING"):
        assert runner.call(max_global_steps=1, resume_last_run=True) == 0
    assert caplog.text == ""
    write_submission(runner.folder / "entry", SUBMISSION + "# mended\n")
    meta_data = runner.trial() / "meta_data_0.json"
    content = json.loads(meta_data.read_text())
    meta_data.write_text(json.dumps(content | {"torch_version": "2.5.1"}))
    with caplog.at_level("WARNING"):
        assert runner.call(max_global_steps=1, resume_last_run=True) == 0
    assert (
        f"{runner.trial()} was run with another torch and another content of {runner.submission}: what it "
        "has stays; --overwrite runs it anew"
    ) in caplog.text


@pytest.mark.parametrize("content", ["{}", '{"stopped_by": "step limit", "other": 1}'])
def test_an_outcome_that_was_changed_is_named(
    runner: Runner, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.call(max_global_steps=1) == 0
    path = runner.trial() / "outcome.json"
    path.write_text(content)
    assert runner.call(max_global_steps=1, resume_last_run=True) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {path} must hold best_metric, ")
    assert errors.count("\n") == 1
    assert path.read_text() == content
