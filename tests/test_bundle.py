"""The leaderboard's folder: what is in it, that it stands alone, and that nothing is overwritten."""

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from official_harness import REPOSITORY, require_harness

from submission.batch_sizes import BATCH_SIZES
from submission.bundle import BundleError, check, main
from submission.leaderboard import folder
from submission.leaderboard.contents import Module, entry_modules
from submission.leaderboard.description import DEFAULT_NAME, describe

RULESETS = {"external": "external_tuning", "self": "self_tuning"}
NAME = "shampoo"


@pytest.fixture(scope="module", params=RULESETS)
def ruleset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def layout(ruleset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository laid out like the leaderboard's, with our entry in it and nothing else."""
    root = tmp_path_factory.mktemp(ruleset)
    out = root / "submissions" / RULESETS[ruleset] / NAME
    assert main(["--ruleset", ruleset, "--out", str(out)]) == 0
    return root


@pytest.fixture
def made(layout: Path, ruleset: str) -> Path:
    return layout / "submissions" / RULESETS[ruleset] / NAME


def info_of(made: Path) -> dict[str, str]:
    lines = (made / "submission_info.yml").read_text().splitlines()
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines)}


def test_the_folder_holds_what_a_pull_request_needs(made: Path, ruleset: str) -> None:
    files = {"submission.py", "submission_info.yml", "requirements.txt", "LICENSE"}
    if ruleset == "external":
        files |= {"tuning_search_space.json"}
    assert {path.name for path in made.iterdir() if path.suffix != ".py"} - files == {
        "shampoo_core"
    }
    assert files <= {path.name for path in made.iterdir()}
    modules = {str(path.relative_to(made)) for path in made.rglob("*.py")}
    assert modules == {str(module.place) for module in entry_modules()}
    assert (made / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    assert sorted(path.name for path in made.parent.iterdir()) == [NAME], "nothing is left behind"


def test_the_search_space_is_ours(made: Path, ruleset: str) -> None:
    space = made / "tuning_search_space.json"
    if ruleset == "external":
        assert space.read_bytes() == (REPOSITORY / "tuning_search_space.json").read_bytes()
    else:
        assert not space.exists()


def test_the_description_has_the_leaderboards_fields(made: Path, ruleset: str) -> None:
    info = info_of(made)
    assert list(info) == [
        "submission_name",
        "submission_folder",
        "authors",
        "affiliations",
        "version",
        "ruleset",
        "framework",
        "description",
    ]
    assert info["submission_folder"] == f"submissions/{RULESETS[ruleset]}/{NAME}"
    assert info["ruleset"] == {"external": "external", "self": "self-tuning"}[ruleset]
    assert info["framework"] == "PyTorch"


def test_copies_differ_from_the_originals_in_imports_only(made: Path) -> None:
    def without_imports(path: Path) -> str:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                node.module, node.level = "", 0
        return ast.dump(tree)

    for module in entry_modules():
        assert without_imports(made / module.place) == without_imports(module.source)


def run_clean(program: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter that finds nothing of ours but below `root`."""
    head = f"import sys; sys.path.insert(0, {str(root)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-B", "-c", head + program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_imports_wherever_the_repository_is_mounted(
    layout: Path, ruleset: str, tmp_path: Path
) -> None:
    """Only from its own folder: none of its modules has a top-level name."""
    (tmp_path / "entries").mkdir()
    (tmp_path / "entries" / "mounted").symlink_to(layout)
    program = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"name = 'entries.mounted.submissions.{RULESETS[ruleset]}.{NAME}.submission'\n"
        "assert importlib.import_module(name).get_batch_size('wmt') == 128\n"
        "print(sorted(set(sys.modules) & {'shampoo_core', 'submission', 'workloads_smoke'}))"
    )
    command = [sys.executable, "-I", "-B", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow  # the check that every bundle passes has trained already, in a loop of its own
def test_it_trains_in_the_local_runner_from_there(
    layout: Path, made: Path, ruleset: str, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "workloads_smoke.run", "--workload=ogbg"),
        f"--submission_path={made / 'submission.py'}",
        f"--tuning_ruleset={ruleset}",
        f"--experiment_dir={tmp_path}",
        *("--experiment_name=leaderboard", "--max_global_steps=3"),
    ]
    if ruleset == "external":
        command += [f"--tuning_search_space={made / 'tuning_search_space.json'}"]
        command += ["--num_tuning_trials=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.rglob("eval_measurements.csv")
    assert log.read_text().count("\n") >= 2


@pytest.mark.harness
@pytest.mark.timeout(300)
def test_the_leaderboards_own_checker_passes_it(layout: Path) -> None:
    harness = require_harness()
    checker = harness.checkout / "algorithms" / "submission_checker.py"
    log = layout / "checker.log"
    done = harness.run(
        os.fspath(checker), str(layout / "submissions"), f"--log_output={log}", timeout=200
    )
    text = log.read_text()
    log.unlink()
    assert done.returncode == 0, done.stderr
    assert "ALL CHECKS PASSED" in text


def test_an_existing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / NAME
    out.mkdir()
    (out / "precious").write_text("mine")
    assert main(["--ruleset", "self", "--out", str(out)]) == 1
    assert f"--out {out} exists" in capsys.readouterr().err
    assert main(["--ruleset", "self", "--out", str(out), "--overwrite"]) == 1
    assert "holds something else than an entry" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == [NAME, "precious"]


def test_another_entry_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a fork of the leaderboard every entry's folder has a description."""
    out = tmp_path / NAME
    out.mkdir()
    (out / "submission_info.yml").write_text('submission_name: "Somebody else"\n')
    assert main(["--ruleset", "self", "--out", str(out), "--overwrite"]) == 1
    assert "holds another entry" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["submission_info.yml"]


@pytest.mark.slow
def test_an_earlier_entry_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / NAME
    out.mkdir()
    (out / "submission_info.yml").write_text(f'submission_name: "{DEFAULT_NAME}"\nversion: "0.9"\n')
    (out / "stale.py").write_text("")
    assert main(["--ruleset", "self", "--out", str(out), "--overwrite"]) == 0
    assert not (out / "stale.py").exists()
    assert (out / "submission.py").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_fails_takes_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "requirements_text", lambda packages: "torch==2.4.0\n")
    assert main(["--ruleset", "self", "--out", str(tmp_path / NAME)]) == 1
    assert "requirements.txt:1: 'torch==2.4.0' disagrees" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda made: (made / "LICENSE").unlink(), "LICENSE is missing"),
        (lambda made: (made / "tuning_search_space.json").write_text("[]"), "has no search space"),
        (
            lambda made: (made / "__init__.py").write_text("import submission"),
            "imports submission from outside its folder",
        ),
        (lambda made: (made / "metrics.py").write_text("import triton"), "a kernel must be"),
    ],
)
def test_the_check_sees_what_is_wrong(tmp_path: Path, spoil, message: str) -> None:
    made = tmp_path / "submissions" / "self_tuning" / NAME
    made.mkdir(parents=True)
    folder.fill(made, "self", describe("self", NAME), REPOSITORY)
    spoil(made)
    with pytest.raises(BundleError, match=message):
        check(made, "self")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder_name": "My-Entry"}, "lowercase letters, digits and underscores"),
        ({"authors": " "}, "authors must not be empty"),
        ({"name": "Best #1"}, "submission_name = 'Best #1' must be one line without #"),
        ({"affiliations": "`whoami`"}, "affiliations = "),
    ],
)
def test_a_description_that_the_leaderboard_would_spoil(
    changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe("self", **{"folder_name": NAME, **changes})


def test_the_pull_request_names_the_bare_folder() -> None:
    """The leaderboard's merge job puts the path before it."""
    text = describe("external", NAME, authors='Ada "A." Lovelace').pull_request()
    assert text.startswith("[submission] ")
    block = text.split("```yaml\n")[1].split("\n```")[0].splitlines()
    fields = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in block)}
    assert fields["submission_folder"] == NAME
    assert fields["authors"] == 'Ada "A." Lovelace'
    assert all(fields[key] for key in ("submission_name", "authors", "ruleset"))


def test_a_form_of_import_that_cannot_be_moved_is_refused(tmp_path: Path) -> None:
    (tmp_path / "submission").mkdir()
    (tmp_path / "shampoo_core").mkdir()
    (tmp_path / "shampoo_core" / "__init__.py").write_text("")
    (tmp_path / "submission" / "submission.py").write_text("import shampoo_core.engine\n")
    (module,) = entry_modules(tmp_path)
    with pytest.raises(ValueError, match=r"imports shampoo_core.engine by its full name"):
        module.text()


@pytest.mark.parametrize(
    ("place", "line", "moved"),
    [
        ("submission/a.py", "from shampoo_core import X", "from .shampoo_core import X"),
        ("submission/a.py", "from shampoo_core.b.c import X", "from .shampoo_core.b.c import X"),
        ("shampoo_core/a.py", "from shampoo_core.b import X", "from .b import X"),
        ("shampoo_core/a.py", "from shampoo_core import b", "from . import b"),
        ("shampoo_core/b/a.py", "    from shampoo_core.c.d import X", "    from ..c.d import X"),
    ],
)
def test_imports_of_the_library_become_relative(
    tmp_path: Path, place: str, line: str, moved: str
) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(f"if True:\n    pass\n{line}\n" if line[0] != " " else f"if True:\n{line}\n")
    core = place.startswith("shampoo_core")
    module = Module(file, Path(place) if core else Path(place).relative_to("submission"))
    assert moved in module.text().splitlines()


def test_an_installed_package_holds_all_that_an_entry_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel is what the build command makes; beside it lies what other packages leave there."""
    commands = {}
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(setuptools, "setup", lambda cmdclass: commands.update(cmdclass))
    runpy.run_path("setup.py")
    packages = setuptools.find_packages(include=["submission*", "shampoo_core*"])
    options = {"packages": packages, "script_name": "setup.py"}
    build = commands["build_py"](setuptools.Distribution(options))
    build.ensure_finalized()
    build.build_lib = str(tmp_path / "site-packages")
    build.run()
    installed = Path(build.build_lib, "submission")
    for name in ("LICENSE", "tuning_search_space.json"):
        assert str(installed / name) in build.get_outputs(include_bytecode=False)
    (tmp_path / "site-packages" / "LICENSE").write_text("another package's")
    made = tmp_path / "made"
    made.mkdir()
    folder.fill(made, "external", describe("external", NAME), tmp_path / "site-packages")
    for name in ("LICENSE", "tuning_search_space.json"):
        assert (made / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert list(folder.missing_files(made, "external")) == []


def test_the_points_are_five_valid_ones() -> None:
    points = json.loads((REPOSITORY / "tuning_search_space.json").read_text())
    folder.check_points(points)
    with pytest.raises(ValueError, match="must be a list of 5 points"):
        folder.check_points(points[:4])
    with pytest.raises(ValueError, match="point 2: hyperparameter learning_rate = -1"):
        folder.check_points([points[0], points[1] | {"learning_rate": -1}, *points[2:]])


def test_every_official_workload_has_a_batch_size() -> None:
    assert {"criteo1tb", "fastmri", "finewebedu_lm", "imagenet_resnet", "imagenet_vit"} <= set(
        BATCH_SIZES
    )
    assert {"librispeech_conformer", "librispeech_deepspeech", "ogbg", "wmt"} <= set(BATCH_SIZES)
