"""Rules of the benchmark that a machine can check, on the submission's source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from submission.batch_sizes import BATCH_SIZES

ROOT = Path(__file__).parents[1]
SUBMISSION_FILES = sorted((ROOT / "submission").glob("*.py"))
IMPORTED_FILES = SUBMISSION_FILES + sorted((ROOT / "shampoo_core").rglob("*.py"))
FORBIDDEN_IMPORTS = {"jax", "tensorflow", "triton", "algoperf", "workloads_smoke"}


def strings_in(tree: ast.AST) -> list[str]:
    return [
        node.value.lower()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def imports_in(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    names = {path.name for path in IMPORTED_FILES}
    assert {"submission.py", "batch_sizes.py", "optimizer.py"} <= names


@pytest.mark.parametrize("path", IMPORTED_FILES, ids=relative)
def test_no_workload_name_outside_the_batch_size_table(path: Path) -> None:
    if path.name == "batch_sizes.py":
        return
    names = [name for name in BATCH_SIZES if any(name in text for text in code_strings(path))]
    assert not names


def code_strings(path: Path) -> list[str]:
    """Return the strings of a file that are not docstrings."""
    tree = parse(path)
    documented = [
        node.body[0].value.value.lower()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
        and isinstance(node.body[0].value.value, str)
    ]
    return [text for text in strings_in(tree) if text not in documented]


@pytest.mark.parametrize("path", IMPORTED_FILES, ids=relative)
def test_no_environment_variable_is_touched(path: Path) -> None:
    touched = [
        ast.unparse(node)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "putenv", "getenv"}
    ]
    assert not touched


@pytest.mark.parametrize("path", IMPORTED_FILES, ids=relative)
def test_imports_nothing_foreign_and_no_private_module(path: Path) -> None:
    for name in imports_in(parse(path)):
        parts = name.split(".")
        assert parts[0] not in FORBIDDEN_IMPORTS, name
        assert not (parts[0] == "torch" and any(part.startswith("_") for part in parts)), name


def test_imports_alone_in_a_clean_interpreter() -> None:
    program = (
        "import sys, submission.submission\n"
        "print(sorted(set(sys.modules) & {'jax', 'tensorflow', 'algoperf', 'workloads_smoke'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_checks_see_an_offence(tmp_path: Path) -> None:
    """A check that cannot fail is worse than none."""
    offender = tmp_path / "offender.py"
    offender.write_text(
        '"""About wmt."""\nimport os\nimport torch._inductor\nNAME = "wmt_post_ln"\n'
        'os.environ["X"] = "1"\n'
    )
    assert sorted(code_strings(offender)) == ["1", "wmt_post_ln", "x"]
    with pytest.raises(AssertionError):
        test_no_workload_name_outside_the_batch_size_table(offender)
    with pytest.raises(AssertionError):
        test_no_environment_variable_is_touched(offender)
    with pytest.raises(AssertionError):
        test_imports_nothing_foreign_and_no_private_module(offender)
