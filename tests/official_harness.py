"""Where the official harness is, for the tests that run it; they skip, saying how to have it."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

HOW_TO = (
    "needs the official harness: clone mlcommons/algorithmic-efficiency (v0.6), install it in a "
    "virtual environment of its own with pip >= 23.3, pip install -c docker/constraints.txt "
    "-e '<checkout>[pytorch_cpu,jax_cpu,full]' tensorflow-metadata importlib_resources, and set "
    "ALGOPERF_HARNESS_PYTHON to that environment's interpreter and ALGOPERF_HARNESS_DIR to the "
    "checkout"
)


class Harness(NamedTuple):
    """Interpreter and checkout of the official harness."""

    python: str
    checkout: Path

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run the harness's interpreter from our repository root, both roots importable."""
        return subprocess.run(
            [self.python, *arguments],
            cwd=REPOSITORY,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def environment(self) -> dict[str, str]:
        """Environment of a CPU run: the runner imports submissions by module name."""
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(self.checkout)]),
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # Threads that wait for each other on a busy machine make a step tens of times slower.
            "OMP_NUM_THREADS": "1",
        }


def require_harness() -> Harness:
    """The harness that the environment names; skips the test where it names none.

    A variable that names something that is not there fails the test instead.
    """
    python = os.environ.get("ALGOPERF_HARNESS_PYTHON")
    checkout = os.environ.get("ALGOPERF_HARNESS_DIR")
    if not python or not checkout:
        pytest.skip(HOW_TO)
    runner = Path(checkout) / "submission_runner.py"
    assert Path(python).exists(), f"ALGOPERF_HARNESS_PYTHON={python} does not exist"
    assert runner.exists(), f"ALGOPERF_HARNESS_DIR={checkout} has no submission_runner.py"
    return Harness(python, Path(checkout))
