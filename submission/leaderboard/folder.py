"""Fill the entry's folder, file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from submission.hyperparameters import Hyperparameters
from submission.leaderboard.contents import ENTRY, entry_modules, third_party_packages
from submission.leaderboard.description import Ruleset, SubmissionInfo
from submission.leaderboard.rules import REQUIREMENTS
from submission.leaderboard.rules.pins import benchmark_pins

INFO_FILE, LICENCE_FILE, SPACE_FILE = "submission_info.yml", "LICENSE", "tuning_search_space.json"
#: Points that the external ruleset allows for.
NUM_POINTS = 5

#: Package on the index by the name that is imported, and what the entry needs it for.
_PACKAGES = {
    "absl": ("absl-py", "messages, in the harness's own log"),
    "torch": ("torch", "tensors; the benchmark's own version"),
}


def fill(made: Path, ruleset: Ruleset, info: SubmissionInfo, root: Path) -> None:
    """Write everything into an empty folder.

    Args:
        made: The folder.
        ruleset: "external" or "self".
        info: Its description.
        root: The repository, or the folder where its packages are installed.

    Raises:
        ValueError: The search space is not one that the ruleset allows, or an import has no place
            in the requirements.
        OSError: A file is missing or cannot be written.
    """
    space, licence = (_top_file(root, name) for name in (SPACE_FILE, LICENCE_FILE))
    modules = entry_modules(root)
    for module in modules:
        place = made / module.place
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(module.text(), encoding="utf-8")
    if ruleset == "external":
        check_points(json.loads(space.read_text(encoding="utf-8")))
        shutil.copyfile(space, made / SPACE_FILE)
    requirements = requirements_text(third_party_packages(modules))
    (made / REQUIREMENTS).write_text(requirements, encoding="utf-8")
    (made / INFO_FILE).write_text(info.yaml(), encoding="utf-8")
    shutil.copyfile(licence, made / LICENCE_FILE)


def _top_file(root: Path, name: str) -> Path:
    """Return a file that lies at the top of a checkout, and beside the entry where it is installed.

    That place comes first: other packages leave a licence at the top of where they are installed.
    """
    places = [root / ENTRY / name, root / name]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"there is neither {places[0]} nor {places[1]}: restore it")


def check_points(space: object) -> None:
    """Raise ValueError unless `space` is a list of as many valid points as there are trials."""
    if not isinstance(space, list) or len(space) != NUM_POINTS:
        raise ValueError(f"{SPACE_FILE} must be a list of {NUM_POINTS} points")
    for number, point in enumerate(space, start=1):
        try:
            Hyperparameters.from_namespace(point)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{SPACE_FILE}, point {number}: {error}") from error


def requirements_text(packages: list[str]) -> str:
    """Return the requirements file for packages by the name that is imported.

    Raises:
        ValueError: It is not known what to install for one of them, and why.
    """
    unknown = [package for package in packages if package not in _PACKAGES]
    if unknown:
        raise ValueError(f"the entry imports {', '.join(unknown)}, which no requirement explains")
    pins = benchmark_pins()
    lines = (f"{name}{pins[name]}  # {use}\n" for name, use in map(_PACKAGES.__getitem__, packages))
    return "".join(lines)


def missing_files(made: Path, ruleset: Ruleset) -> Iterator[str]:
    """Yield what the leaderboard's checker would find missing or too much in a folder."""
    needed = ["submission.py", INFO_FILE, REQUIREMENTS, LICENCE_FILE]
    if ruleset == "external":
        needed.append(SPACE_FILE)
    elif (made / SPACE_FILE).exists():
        yield f"{SPACE_FILE}: an entry that tunes itself has no search space"
    yield from (f"{name} is missing" for name in needed if not (made / name).is_file())
