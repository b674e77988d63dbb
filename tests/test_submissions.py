"""Submissions load from any path as they stand, and say what is wrong with them when they do not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runner import SUBMISSION, forget_modules, write_submission

from workloads_smoke import algoperf_standin, spec
from workloads_smoke.errors import UserError
from workloads_smoke.submissions import REQUIRED_FUNCTIONS, load_submission

FUNCTIONS = """
def init_optimizer_state(*arguments): ...
def update_params(*, batch, **arguments): ...
def data_selection(*arguments): ...
def get_batch_size(name): return HELPED
"""


@pytest.fixture(autouse=True)
def imports_undone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test loads files of the same names from another folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    forget_modules(tmp_path)


def test_all_functions_are_found(tmp_path: Path) -> None:
    submission = load_submission(write_submission(tmp_path / "all_functions"))
    assert submission.get_batch_size("tiny") == 16
    assert submission.prepare_for_eval is not None
    assert submission.get_eval_batch_size is None
    assert submission.wants_train_state


def test_optional_functions_and_arguments_may_lack(tmp_path: Path) -> None:
    path = write_submission(tmp_path / "few", "HELPED = 4" + FUNCTIONS)
    submission = load_submission(path)
    assert submission.prepare_for_eval is None
    assert not submission.wants_train_state


def make_tree(root: Path, helper: str, importing: str) -> Path:
    """A submission two packages deep that imports a helper beside it."""
    folder = root / "entries" / "external_tuning" / "fast"
    path = write_submission(folder, importing + FUNCTIONS)
    (folder / "__init__.py").touch()
    helper_path = folder / helper
    helper_path.parent.mkdir(parents=True, exist_ok=True)
    helper_path.write_text("HELPED = 32")
    return path


@pytest.mark.parametrize(
    ("helper", "importing"),
    [
        ("helper.py", "from .helper import HELPED"),
        ("helper.py", "from fast.helper import HELPED"),
        ("helper.py", "from entries.external_tuning.fast.helper import HELPED"),
        ("optimizers/rule.py", "from optimizers.rule import HELPED"),
    ],
)
def test_imports_resolve_as_in_the_official_harness(
    tmp_path: Path, helper: str, importing: str
) -> None:
    """Relative ones, from the root of the repository, and of what lies beside the file."""
    path = make_tree(tmp_path, helper, importing)
    assert load_submission(path).get_batch_size("tiny") == 32


def test_a_checkout_named_like_the_harness_is_a_root(tmp_path: Path) -> None:
    """Its folder is a package and called `algoperf`, and so is the package inside it."""
    checkout = tmp_path / "algoperf"
    importing = "from algorithms.adamw.helper import HELPED\nfrom algoperf import spec\n"
    folder = checkout / "algorithms" / "adamw"
    path = write_submission(folder, importing + FUNCTIONS)
    for package in (checkout, checkout / "algorithms", folder):
        (package / "__init__.py").touch()
    (folder / "helper.py").write_text("HELPED = 32")
    assert load_submission(path).get_batch_size("tiny") == 32


def test_a_file_named_like_an_installed_package_is_still_the_one_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own package is called `submission`, and so will many a folder be."""
    for name in [name for name in sys.modules if name.split(".")[0] == "submission"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "submission"
    path = write_submission(folder, "HELPED = 77" + FUNCTIONS, name="submission.py")
    (folder / "__init__.py").touch()
    assert load_submission(path).get_batch_size("tiny") == 77


def test_a_name_already_taken_is_an_error_and_not_the_wrong_file(tmp_path: Path) -> None:
    first = write_submission(tmp_path / "first", "HELPED = 1" + FUNCTIONS)
    second = write_submission(tmp_path / "second", "HELPED = 2" + FUNCTIONS)
    load_submission(first)
    with pytest.raises(UserError, match=r"its name 'entry' already belongs to .*first"):
        load_submission(second)


@pytest.mark.parametrize("name", REQUIRED_FUNCTIONS)
def test_a_missing_function_is_named(tmp_path: Path, name: str) -> None:
    path = write_submission(tmp_path / "lacking", SUBMISSION.replace(f"def {name}(", "def other("))
    with pytest.raises(UserError) as caught:
        load_submission(path)
    assert str(caught.value) == f"submission {path} lacks the function {name}"


@pytest.mark.parametrize(
    ("given", "changed", "message"),
    [
        (
            "def data_selection(*arguments)",
            "def data_selection(workload, queue)",
            r"data_selection\(workload, queue\) cannot be called: too many positional arguments; the "
            r"benchmark gives workload, input_queue, .*, rng, by place",
        ),
        (
            "def init_optimizer_state(*arguments)",
            "def init_optimizer_state(a, b, c, d, e, lr)",
            "init_optimizer_state.* cannot be called: missing a required argument: 'lr'",
        ),
        (
            "def update_params(*, batch, **arguments)",
            "def update_params(workload, model, batch, **arguments)",
            "update_params.* cannot be called: missing a required argument: 'model'; the benchmark gives "
            "workload, current_param_container, .*, batch, by name",
        ),
        (
            "def get_batch_size(name)",
            "def prepare_for_eval(workload): ...\ndef get_batch_size(name)",
            r"prepare_for_eval\(workload\) cannot be called: got an unexpected keyword argument",
        ),
        ("def get_batch_size(name)", "def get_batch_size()", "get_batch_size.*gives workload_name"),
    ],
)
def test_a_function_that_cannot_be_called_is_named(
    tmp_path: Path, given: str, changed: str, message: str
) -> None:
    text = "HELPED = 4" + FUNCTIONS.replace(given, changed)
    path = write_submission(tmp_path / "other", text)
    with pytest.raises(UserError, match=f"submission {path}: {message}"):
        load_submission(path)


def test_functions_that_can_be_called_are_left_alone(tmp_path: Path) -> None:
    """One that needs `train_state`, and one whose decorator adds an argument."""
    changed = """
import functools

def with_rate(function):
    @functools.wraps(function)
    def wrapped(*arguments):
        return function(*arguments, 0.1)
    return wrapped

@with_rate
def init_optimizer_state(workload, model, state, setting, rng, rate): ...
def update_params(*, train_state, **arguments): ...
"""
    path = write_submission(tmp_path / "other", "HELPED = 4" + FUNCTIONS + changed)
    assert load_submission(path).wants_train_state


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package", r"ModuleNotFoundError: No module named 'no_such_package' "),
        ("import jax.numpy", r"No module named 'jax'.*a submission in JAX does not run here"),
        ("from algoperf import jax_utils", r"ImportError: cannot import name 'jax_utils'"),
        ("def broken(:", r"SyntaxError: invalid syntax .*line 1"),
        ("import sys; sys.exit(0)", r"SystemExit: 0 \(.*entry.py:1\)"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(.*entry.py:1\)"),
    ],
)
def test_what_does_not_import_says_why_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = write_submission(tmp_path / "broken", text)
    with pytest.raises(UserError, match=rf"submission {path} does not import: .*{message}"):
        load_submission(path)


def test_paths_that_are_no_submissions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none.py"):
        load_submission(tmp_path / "none.py")
    with pytest.raises(UserError, match=r"must be a Python file .*, got .*entry"):
        load_submission(tmp_path / "entry")


STAND_IN = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in ("algoperf", "algorithmic_efficiency") else real(name, package))
from workloads_smoke import algoperf_standin, spec
assert algoperf_standin.install_if_needed() == ["algoperf", "algorithmic_efficiency"]
assert algoperf_standin.install_if_needed() == []
import algoperf.spec, algorithmic_efficiency
from algoperf import random_utils as prng
from algoperf.pytorch_utils import pytorch_setup
from algorithmic_efficiency import spec as former
assert algoperf.spec.ForwardPassMode is former.ForwardPassMode is spec.ForwardPassMode
assert issubclass(algoperf.spec.TrainingCompleteError, Exception)
assert pytorch_setup()[:2] == (False, 0)
assert prng.split(prng.PRNGKey(0), 4).shape == (4, 2)
try:
    import algoperf.jax_utils
except ModuleNotFoundError as error:
    assert error.name == "algoperf.jax_utils"
else:
    raise SystemExit("algoperf.jax_utils should not exist")
"""


def test_the_stand_in_offers_what_pytorch_submissions_import() -> None:
    subprocess.run([sys.executable, "-c", STAND_IN], check=True, timeout=60)


def test_the_stand_in_leaves_an_installed_package_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "algoperf", sys)
    monkeypatch.setitem(sys.modules, "algorithmic_efficiency", sys)
    assert algoperf_standin.install_if_needed() == []
    assert sys.modules["algoperf"] is sys
    assert spec.__name__ == "workloads_smoke.spec"


@pytest.mark.parametrize("has_init", [False, True])
def test_a_checkout_beside_us_is_not_taken_for_the_package(tmp_path: Path, has_init: bool) -> None:
    """Only a folder of the package's name: to Python an empty namespace, or a package without contents."""
    (tmp_path / "algoperf").mkdir()
    if has_init:  # so has the root of the official repository
        (tmp_path / "algoperf" / "__init__.py").touch()
    code = (
        "from workloads_smoke import algoperf_standin, spec\n"
        "print(spec.harness_installed(), spec.LossType, algoperf_standin.install_if_needed())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=not spec.harness_installed(),
        timeout=60,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])},
    )
    if not spec.harness_installed():
        assert found.stdout.startswith("False ")
        assert "'algoperf'" in found.stdout
