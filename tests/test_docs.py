"""What the documents say: their examples run, and their exact tables are those of now."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import counts, memory, methods
from benchmarks.tables import text_table
from shampoo_core import DistributedShampoo
from shampoo_core.model_shapes import official_workloads

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", ROOT / "docs" / "coming_from.md")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are whole: one that goes on from another has no imports."""
    if not code.startswith("import"):
        pytest.skip("goes on from the example before it")
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(code, "example", "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_the_readme_has_every_option() -> None:
    """In the first column of its table; what looks ahead stands beside the betas."""
    first_column = re.findall(r"^\| (.*?) \| ", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", "\n".join(first_column)))
    options = set(inspect.signature(DistributedShampoo).parameters)
    assert not options - named - {"params", "beta3"}


def rows_of(text: str) -> list[tuple[str, ...]]:
    """Cells of the lines of a table, or of anything else."""
    return [tuple(re.split(r"\s{2,}", line.strip())) for line in text.splitlines()]


TABLES: dict[str, Callable[[], str]] = {
    "operations": lambda: text_table(
        counts.operation_rows(official_workloads()), counts.OPERATION_COLUMNS
    ),
    "methods": lambda: text_table(
        list(methods.method_rows(methods.DEFAULT_WORKLOAD)), methods.METHOD_COLUMNS
    ),
    "memory": lambda: text_table(list(memory.memory_rows(memory.WORKLOADS)), memory.COLUMNS),
}


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="counts of torch 2.13.0")
@pytest.mark.parametrize("table", TABLES)
def test_exact_tables_are_those_of_now(table: str) -> None:
    """Rows of docs/benchmarks.md that name exact counts and bytes."""
    written = set(rows_of((ROOT / "docs" / "benchmarks.md").read_text()))
    stale = [row for row in rows_of(TABLES[table]())[2:] if row not in written]
    assert not stale
