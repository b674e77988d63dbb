"""What a reader must know before trusting a comparison: what lacks, and what is no like for like."""

from __future__ import annotations

from collections.abc import Sequence

from workloads_smoke.scoring.logs import Trial


def notes_on_files(trials: Sequence[Trial]) -> list[str]:
    """Name submissions whose trials were run from several files."""
    files: dict[str, list[str]] = {}
    for trial in trials:
        known = files.setdefault(trial.submission, [])
        if trial.submission_path is not None and trial.submission_path not in known:
            known.append(trial.submission_path)
    return [
        f"{submission} was run from {len(paths)} files, {', '.join(paths)}: if these are several"
        " submissions, give each a folder of its own with studies in it"
        for submission, paths in sorted(files.items())
        if len(paths) > 1
    ]
