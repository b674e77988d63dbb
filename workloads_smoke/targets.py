"""The targets of the smoke workloads, read from targets.json.

`python -m workloads_smoke.set_targets` writes that file; nobody edits values by hand.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS_FILE = Path(__file__).with_name("targets.json")


@dataclass(frozen=True)
class Targets:
    """Values of a workload's target metric to reach, and the text that they were set on."""

    validation_target_value: float
    test_target_value: float
    text_fingerprint: str
    """Of `workloads_smoke.data.python_text` where they were set."""
    python: str
    """Version there."""


@functools.cache
def _read() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(TARGETS_FILE.read_text(encoding="utf-8"))
    return content


def load_targets(workload: str) -> Targets:
    """Return the targets of a workload.

    Args:
        workload: Its official name.

    Raises:
        KeyError: If no targets were set for it yet; the message names the script that does.
    """
    entries = _read()["workloads"]
    if workload not in entries:
        raise KeyError(
            f"no targets for {workload!r} in {TARGETS_FILE.name}: run "
            f"`python -m workloads_smoke.set_targets --workload {workload}`."
        )
    entry = entries[workload]
    provenance = entry["provenance"]
    return Targets(
        entry["validation_target_value"],
        entry["test_target_value"],
        provenance["python_text_fingerprint"],
        provenance["python"],
    )
