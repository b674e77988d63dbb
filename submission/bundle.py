"""Write the folder that a leaderboard pull request needs, and check it: `python -m submission.bundle`.

    python -m submission.bundle --ruleset external --out ../submissions/external_tuning/shampoo

The folder holds `submission.py` and what it imports, the library included, with the tuning search
space (external ruleset), `submission_info.yml`, `requirements.txt` and the licence. It takes its
name only when it has passed the checks: the benchmark's rules as far as a machine can read them, the
leaderboard's own checker, and a few steps of training in an interpreter that has nothing of ours.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from submission.leaderboard import description, folder
from submission.leaderboard.contents import ROOT
from submission.leaderboard.description import FOLDERS, Ruleset, SubmissionInfo
from submission.leaderboard.rules import check_folder

TRIAL = Path(__file__).parent / "leaderboard" / "trial.py"
"""Trains with a folder, in an interpreter of its own."""
TRIAL_SECONDS = 600


class BundleError(Exception):
    """Something that the caller can mend; shown without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        out = options.out.absolute()
        info = description.describe(
            options.ruleset,
            out.name,
            name=options.name,
            authors=options.authors,
            affiliations=options.affiliations,
            version=options.version,
        )
        write_bundle(options.ruleset, out, info, overwrite=options.overwrite)
    except (BundleError, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(
        f"{options.out}: complete and checked.\n\n"
        "Copy it into a fork of the leaderboard's repository as "
        f"{info.submission_folder}, and open a pull request to its branch `evaluation` with this "
        f"title and text:\n\n{info.pull_request()}"
    )
    return 0


def write_bundle(ruleset: Ruleset, out: Path, info: SubmissionInfo, *, overwrite: bool) -> None:
    """Write, check and place an entry's folder.

    Args:
        ruleset: "external" or "self".
        out: The folder to make.
        info: Its description.
        overwrite: Replace the folder if it is an earlier one of ours.

    Raises:
        BundleError: The folder exists, or a check failed; nothing has been changed then.
    """
    _check_free(out, info, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished folder takes its place by renaming.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as layout:
        made = Path(layout, "submissions", FOLDERS[ruleset], out.name)
        made.mkdir(parents=True)
        folder.fill(made, ruleset, info, ROOT)
        check(made, ruleset)
        _put_in_place(made, out, Path(layout, "replaced"))


def check(made: Path, ruleset: Ruleset) -> None:
    """Check a filled folder that lies in the leaderboard's layout, `submissions/RULESET/NAME`.

    Raises:
        BundleError: It fails; the message lists why.
    """
    problems = [*folder.missing_files(made, ruleset), *map(str, check_folder(made))]
    if problems:
        raise BundleError("the folder fails its checks:\n  " + "\n  ".join(problems))
    root = made.parents[2]
    module = ".".join((*made.relative_to(root).parts, "submission"))
    # -I: no working directory, no PYTHONPATH; -B: leave no compiled files behind.
    command = [sys.executable, "-I", "-B", str(TRIAL), str(root), module]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BundleError(f"the folder's trial did not end within {TRIAL_SECONDS} s") from None
    if done.returncode != 0:
        raise BundleError(f"the folder fails its trial:\n{done.stdout}{done.stderr}")


def _put_in_place(made: Path, out: Path, replaced: Path) -> None:
    """Rename `made` to `out`; what was there goes to `replaced`, and comes back if this fails."""
    if not out.exists():
        os.rename(made, out)
        return
    os.rename(out, replaced)
    try:
        os.rename(made, out)
    except OSError:
        os.rename(replaced, out)
        raise


def _check_free(out: Path, info: SubmissionInfo, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise BundleError(f"--out {out} exists; give another one, or --overwrite to replace it")
    if out.is_symlink() or not out.is_dir():
        raise BundleError(f"--out {out} is no folder, so --overwrite does not replace it")
    if any(out.iterdir()) and not (out / folder.INFO_FILE).is_file():
        raise BundleError(
            f"--out {out} holds something else than an entry (it has no {folder.INFO_FILE}), so "
            f"--overwrite does not replace it"
        )
    name = next(line for line in info.yaml().splitlines() if line.startswith("submission_name:"))
    if any(out.iterdir()) and name not in _lines_of(out / folder.INFO_FILE):
        raise BundleError(
            f"--out {out} holds another entry (its {folder.INFO_FILE} does not say `{name}`), so "
            f"--overwrite does not replace it"
        )


def _lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m submission.bundle",
        description="Write and check the folder that a leaderboard pull request needs.",
    )
    parser.add_argument("--ruleset", choices=tuple(FOLDERS), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to make; names the entry"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DIR if it is an earlier entry's folder"
    )
    parser.add_argument("--name", default=description.DEFAULT_NAME, help="on the leaderboard")
    parser.add_argument(
        "--authors", default=description.DEFAULT_AUTHORS, help="with commas between"
    )
    parser.add_argument("--affiliations", default="", help="with commas between")
    parser.add_argument("--version", default="1.0", help="version of the entry")
    return parser


if __name__ == "__main__":
    # Leaving by an exception, the hidden folder beside DIR is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
