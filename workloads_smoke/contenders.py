"""Who takes part in a comparison: a name, a submission and its search space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workloads_smoke.errors import UserError

SEARCH_SPACE = "tuning_search_space.json"
_BASELINES = Path(__file__).resolve().parent / "baselines"
_OURS = Path(__file__).resolve().parent.parent / "submission" / "submission.py"


@dataclass(frozen=True)
class Contender:
    """A submission under the name that its logs and scores carry.

    Attributes:
        name: folder name of its logs.
        submission: its Python file.
        search_space: its hyperparameter points or ranges; None where there is no such file, which
            only self-tuning allows.
    """

    name: str
    submission: Path
    search_space: Path | None


def known_contenders() -> dict[str, Path]:
    """Submission files of this repository by name: ours and every baseline."""
    known = {"shampoo": _OURS}
    for path in sorted(_BASELINES.glob("*/submission.py")):
        known[path.parent.name] = path
    return known


def read_contenders(texts: Sequence[str], ruleset: str = "external") -> list[Contender]:
    """Resolve what the command line names.

    Args:
        texts: each a known name, or ``NAME=FILE`` for any submission file. The search space is
            ``tuning_search_space.json`` beside the file, or in the folder above it.
        ruleset: ``external``, which needs a search space, or ``self``.

    Raises:
        UserError: if a name is unknown or given twice, or a file is missing.
    """
    contenders = [_read_contender(text, ruleset) for text in texts]
    names = [contender.name for contender in contenders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"submission {name!r} is given {names.count(name)} times; names differ")
    return contenders


def check_same_number_of_trials(contenders: Sequence[Contender], num_trials: int) -> None:
    """Everybody gets the same number of trials, each at its own points.

    Raises:
        UserError: if a list of points is shorter than that.
    """
    for contender in contenders:
        if contender.search_space is None:
            raise ValueError(f"{contender.name} has no search space")
        try:
            space = json.loads(contender.search_space.read_text(encoding="utf-8"))
        except ValueError as error:  # nor UTF-8
            raise UserError(f"{contender.search_space} is not JSON: {error}") from error
        # Ranges, unlike lists, give any number of points.
        if isinstance(space, list) and len(space) < num_trials:
            raise UserError(
                f"{contender.name} has {len(space)} points in {contender.search_space}, fewer than"
                f" --trials={num_trials}; a comparison gives everybody the same number"
            )


def _read_contender(text: str, ruleset: str) -> Contender:
    name, separator, file = text.partition("=")
    known = known_contenders()
    if not separator and name not in known:
        raise UserError(
            f"unknown submission {name!r}; known are {', '.join(known)}, and NAME=FILE for any other"
        )
    if not name or Path(name).name != name or name in (".", ".."):
        raise UserError(f"{text!r}: the name of a submission is one folder name, got {name!r}")
    submission = Path(file).expanduser() if separator else known[name]
    if not submission.is_file():
        raise UserError(f"submission {name!r}: no such file {submission}")
    for folder in (submission.parent, submission.resolve().parent.parent):
        if (folder / SEARCH_SPACE).is_file():
            return Contender(name, submission, folder / SEARCH_SPACE)
    if ruleset == "self":
        return Contender(name, submission, None)
    raise UserError(
        f"submission {name!r}: no {SEARCH_SPACE} beside {submission} or one folder up; add it, or"
        " compare under --tuning_ruleset=self"
    )
