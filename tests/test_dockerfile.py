"""The image without building it: Dockerfile, constraints, entry script, and pip's own resolver."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from official_harness import REPOSITORY, require_harness

DOCKER = REPOSITORY / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
OUR_CODE = {"shampoo_core/", "submission/", "workloads_smoke/", "tuning_search_space.json"}


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, continuation lines joined."""

    name: str
    text: str


def dockerfile() -> list[Instruction]:
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    logical = text.replace("\\\n", " ").splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in logical if line.strip()]


def arguments() -> dict[str, str]:
    """Build arguments and their defaults."""
    pairs = (step.text.partition("=") for step in dockerfile() if step.name == "ARG")
    return {name: default.strip('"') for name, _, default in pairs}


def copies() -> list[tuple[int, list[str]]]:
    """Position and sources of every COPY."""
    steps = enumerate(dockerfile())
    return [(place, step.text.split()[:-1]) for place, step in steps if step.name == "COPY"]


def place_of(fragment: str) -> int:
    """Position of the only RUN instruction that contains a fragment."""
    (place,) = (
        place
        for place, step in enumerate(dockerfile())
        if step.name == "RUN" and fragment in step.text
    )
    return place


def constraints() -> dict[str, str]:
    """Pinned version by normalised name."""
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(equals for _, equals, _ in pins), "every constraint must be name==version"
    names = [normalised(name) for name, _, _ in pins]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return dict(zip(names, (version for _, _, version in pins), strict=True))


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def entry(
    *flags: str, harness: str = "/harness", programs: Path = Path(sys.executable).parent
) -> subprocess.CompletedProcess[str]:
    """Run the entry script as in an image whose `python` is this one, or one in a folder."""
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(DOCKER / "entrypoint.sh"), *flags],
        env=os.environ | {"ALGOPERF_HARNESS_DIR": harness, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_instructions_are_those_that_every_builder_knows() -> None:
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
    assert {step.name for step in dockerfile()} <= known
    # Here-documents and --mount need BuildKit.
    assert not any("<<" in step.text or "--mount" in step.text for step in dockerfile())


def test_default_arguments_are_the_official_set_up() -> None:
    defaults = arguments()
    assert defaults["BASE_IMAGE"].startswith("nvidia/cuda:12.")
    assert defaults["PYTHON_VERSION"].startswith("3.11.")
    assert defaults["HARNESS_REVISION"].startswith("2c90454f")
    assert defaults["HARNESS_EXTRAS"].split(",") == ["pytorch_gpu", "jax_cpu", "full"]
    # Older ones do not find the extra pytorch_gpu in metadata that spells it pytorch-gpu.
    assert version(defaults["PIP_VERSION"]) >= (23, 3)


def test_every_argument_is_used_and_every_variable_of_the_build_scripts_is_one() -> None:
    build_scripts = [DOCKER / "install_system.sh", DOCKER / "install_harness.sh"]
    scripts = "".join(path.read_text() for path in build_scripts)
    steps = "".join(step.text for step in dockerfile() if step.name != "ARG")
    used = set(re.findall(r"\$\{?([A-Z_]+)", scripts + steps))
    assert used - {"PATH"} == arguments().keys()


def test_a_change_of_our_code_installs_nothing() -> None:
    code = [place for place, sources in copies() if OUR_CODE & set(sources)]
    installs = [place for place, step in enumerate(dockerfile()) if step.name == "RUN"]
    assert {source for _, sources in copies() for source in sources} >= OUR_CODE
    assert max(installs) < min(code)


def test_torch_depends_on_its_pin_and_not_on_the_harness() -> None:
    torch = place_of("torch torchvision")
    assert torch < place_of("install_harness.sh")
    earlier = {source for place, sources in copies() if place < torch for source in sources}
    assert earlier == {"docker/install_system.sh", "docker/constraints.txt"}


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    for _, sources in copies():
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert source.split("/")[0] in let_in, source


def test_the_container_is_not_root_and_any_user_may_write_where_folders_are_mounted() -> None:
    users = [step.text for step in dockerfile() if step.name == "USER"]
    assert users == ["algoperf"]
    (line,) = (step.text for step in dockerfile() if "chmod 1777" in step.text)
    assert {"/data", "/experiment_runs", "/home/algoperf"} <= set(line.split())


def test_constraints_hold_the_benchmark_s_pins_and_the_mends() -> None:
    pins = constraints()
    assert (pins["torch"], pins["torchvision"]) == ("2.5.1", "0.20.1")
    assert (pins["tensorflow"], pins["jax"]) == ("2.19.0", "0.7.0")
    assert version(pins["tensorflow-metadata"]) < (1, 17)
    assert "importlib-resources" in pins
    assert version(pins["setuptools"]) < (82,)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--num_gpus=0",
            "python /harness/submission_runner.py --framework=pytorch --workload=mnist"
            " --submission_path=submission/submission.py --data_dir=/data/mnist"
            " --experiment_dir=/experiment_runs --experiment_name=shampoo"
            " --tuning_ruleset=external --overwrite=false --save_checkpoints=true"
            " --torch_compile=true --tuning_search_space=tuning_search_space.json"
            " --num_tuning_trials=5",
        ),
        (
            "-w imagenet_vit_glu --num_gpus 8 --tuning_ruleset self -m 100 -e two\\ words"
            " -- --profile=true",
            "torchrun --standalone --nnodes=1 --nproc_per_node=8 /harness/submission_runner.py"
            " --framework=pytorch --workload=imagenet_vit_glu"
            " --submission_path=submission/submission.py --data_dir=/data/imagenet/pytorch"
            r" --experiment_dir=/experiment_runs --experiment_name=two\ words"
            " --tuning_ruleset=self --overwrite=false --save_checkpoints=true"
            " --torch_compile=true --max_global_steps=100"
            " --imagenet_v2_data_dir=/data/imagenet/pytorch --profile=true",
        ),
        (
            "--workload=librispeech_conformer_gelu --num_gpus=1 --home_dir=/home"
            " --hparam_start_index=1 --hparam_end_index=2 --rng_seed=7"
            " --resume_last_run=true --torch_compile=false",
            "python /harness/submission_runner.py --framework=pytorch"
            " --workload=librispeech_conformer_gelu"
            " --submission_path=submission/submission.py --data_dir=/home/data/librispeech"
            " --experiment_dir=/home/experiment_runs --experiment_name=shampoo"
            " --tuning_ruleset=external --overwrite=false --save_checkpoints=true"
            " --torch_compile=false --tuning_search_space=tuning_search_space.json --rng_seed=7"
            " --num_tuning_trials=5 --hparam_start_index=1 --hparam_end_index=2"
            " --resume_last_run=true"
            " --librispeech_tokenizer_vocab_path=/home/data/librispeech/spm_model.vocab",
        ),
    ],
    ids=["default", "8 GPUs, self", "librispeech, resumed"],
)
def test_the_entry_script_builds_the_runner_s_command(flags: str, expected: str) -> None:
    done = entry("--dry_run=true", *shlex.split(flags))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_the_entry_script_takes_what_the_working_group_s_launcher_passes() -> None:
    """The arguments of scoring/utils/run_workloads.py, as it joins them."""
    done = entry(
        *shlex.split(
            "-d fastmri -f pytorch -s submission/submission.py -w fastmri -e try/study_0 -m 100 "
            "--num_tuning_trials 5 --rng_seed 4012345678 -c false -o true -i true "
            "--tuning_ruleset external -t tuning_search_space.json  --hparam_end_index 3  "
            "--num_gpus 8 --dry_run true"
        )
    )
    assert done.returncode == 0, done.stderr
    assert "notice: nothing is copied from or to Google's buckets" in done.stderr
    for flag in (
        "--workload=fastmri", "--data_dir=/data/fastmri", "--experiment_name=try/study_0",
        "--overwrite=true", "--save_checkpoints=false", "--rng_seed=4012345678",
        "--max_global_steps=100", "--num_tuning_trials=5", "--hparam_end_index=3",
    ):  # fmt: skip
        assert flag in done.stdout.split()


@pytest.mark.parametrize(
    ("flags", "notice"),
    [
        ("-r false", ""),
        ("--rsync_data=true --internal_contributor=false", ""),
        ("--data_bucket data --logs_bucket logs", "--data_bucket and --logs_bucket are not used"),
    ],
)
def test_the_entry_script_takes_flags_of_buckets(flags: str, notice: str) -> None:
    done = entry("--dry_run=true", "--num_gpus=0", *flags.split())
    assert done.returncode == 0, done.stderr
    assert notice in done.stderr
    assert bool(notice) == bool(done.stderr)
    assert "bucket" not in done.stdout


def test_the_entry_script_installs_requirements_before_it_runs(tmp_path: Path) -> None:
    (tmp_path / "submission_runner.py").write_text("print('runner ran')\n")
    (tmp_path / "extra.txt").write_text("# nothing\n")
    (tmp_path / "impossible.txt").write_text("./there-is-no-such-folder\n")
    common = (f"--home_dir={tmp_path}", "--num_gpus=0", "--overwrite=true")
    # A relative path that is not here is the harness's, whose folder the official script works in.
    for path in ("extra.txt", str(tmp_path / "extra.txt")):
        done = entry(*common, f"--additional_requirements_path={path}", harness=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "runner ran" in done.stdout
    for path, message in (("impossible.txt", "pip could not"), ("none.txt", "there is no file")):
        done = entry(*common, "--additional_requirements_path", path, harness=str(tmp_path))
        assert done.returncode == 2
        assert f"--additional_requirements_path: {message}" in done.stderr
        assert "runner ran" not in done.stdout


def test_the_entry_script_runs_the_harness_s_own_test_instead(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_traindiffs.py").write_text(
        "print('compared')\nraise SystemExit(4)\n"
    )
    done = entry("--traindiffs_test=true", "--num_gpus=0", harness=str(tmp_path))
    assert (done.returncode, done.stdout) == (4, "compared\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--internal_contributor=yes", "--internal_contributor must be true or false, got 'yes'"),
        ("--bogus 1", "unknown flag 'bogus'"),
        ("--workload", "--workload needs a value"),
        ("-w mnist ogbg", "unexpected argument 'ogbg'"),
        ("--framework jax", "--framework must be pytorch, the submission's framework, got"),
        ("--tuning_ruleset=internal", "must be external or self, got 'internal'"),
        ("--overwrite=yes", "--overwrite must be true or false, got 'yes'"),
        ("--overwrite=true --resume_last_run=true", "exclude each other"),
    ],
)
def test_the_entry_script_refuses_what_it_cannot_do(flags: str, message: str) -> None:
    done = entry("--dry_run=true", *shlex.split(flags))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_the_entry_script_does_not_let_the_runner_ask_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "experiment_runs" / "shampoo" / "mnist_pytorch").mkdir(parents=True)
    done = entry(f"--home_dir={tmp_path}", "--num_gpus=0")
    assert done.returncode == 2
    assert "there is an experiment 'shampoo' of mnist" in done.stderr


def test_the_entry_script_takes_an_empty_folder_for_no_data_set(tmp_path: Path) -> None:
    """A stand-in that was not written to its end leaves one."""
    python = tmp_path / "programs/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "python $1 $2 $3"\n')
    python.chmod(0o755)
    data = tmp_path / "data/mnist"
    writing = f"python -m workloads_smoke.harness_data --data_dir={data}\n"
    flags = (f"--home_dir={tmp_path}", "--num_gpus=0", "--overwrite=true")
    (data / "mnist/3.0.1").mkdir(parents=True)
    assert writing not in entry(*flags, programs=python.parent).stdout
    assert writing in entry(*flags, "--offline_data=true", programs=python.parent).stdout
    (data / "mnist/3.0.1/dataset_info.json").touch()
    assert writing not in entry(*flags, "--offline_data=true", programs=python.parent).stdout


def test_the_entry_script_runs_commands_and_returns_the_runner_s_status(tmp_path: Path) -> None:
    assert entry("echo", "two words").stdout == "two words\n"

    runner = tmp_path / "submission_runner.py"
    runner.write_text("import sys\nprint('runner got', sys.argv[1])\nsys.exit(3)\n")
    done = entry(f"--home_dir={tmp_path}", "--num_gpus=0", harness=str(tmp_path))
    assert done.returncode == 3
    assert "runner got --framework=pytorch" in done.stdout
    (log,) = (tmp_path / "experiment_runs" / "logs").iterdir()
    assert "runner got --framework=pytorch" in log.read_text()


def harness_requirements(checkout: Path, extras: list[str]) -> list[str]:
    """Requirements of the harness and of extras, those that extras name in turn included."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    while extras:
        for requirement in project["optional-dependencies"][extras.pop()]:
            if own := re.fullmatch(r"algoperf\[(.*)\]", requirement):
                extras += own[1].split(",")
            else:
                found.append(requirement)
    return found


@pytest.mark.harness
def test_constraints_repeat_every_pin_of_the_harness() -> None:
    extras = arguments()["HARNESS_EXTRAS"].split(",")
    requirements = harness_requirements(require_harness().checkout, extras)
    pins = constraints()
    assert len(requirements) > 20
    for requirement in requirements:
        name, relation, wanted = re.fullmatch(r"([\w-]+)(==|>=)(.*)", requirement).groups()
        pinned = pins[normalised(name)]
        assert pinned == wanted if relation == "==" else version(pinned) >= version(wanted)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the image has Python 3.11")
def test_pip_resolves_the_constraints_together(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    pip = str(tmp_path / "bin" / "pip")
    # Newer than the image's: from 25.1 on --dry-run reads metadata and downloads no packages.
    subprocess.run([pip, "install", "--quiet", "pip>=25.1"], check=True)
    done = subprocess.run(
        [pip, "install", "--dry-run", "--requirement", DOCKER / "constraints.txt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Would install" in done.stdout
