"""What a reader must know before trusting a comparison: what lacks, and what is no like for like."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from workloads_smoke.logs import OUT_OF_TIME
from workloads_smoke.scoring.logs import STEP, Trial

# A full benchmark comparison under external tuning; self-tuning has one trial a study.
OFFICIAL_NUM_STUDIES = 3
OFFICIAL_NUM_TRIALS = 5

_MOST_NAMED = 5
_STEP_LIMITS = ("step_budget", "max_global_steps")
_COMPARED_FLAGS = (
    "step_budget",
    "eval_every_steps",
    "max_global_steps",
    "skip_evals",
    "use_submission_batch_size",
    "torch_compile",
)


def notes_on_counts(per_study: pd.DataFrame, ruleset: str | None) -> list[str]:
    """Name who has fewer studies or trials than others, or else say how many everybody has.

    Args:
        per_study: see `time_to_target.study_table`.
        ruleset: of all trials; None where there are several or the logs do not say.
    """
    lacking: dict[str, list[str]] = {}
    shapes: dict[tuple[int, int], list[str]] = {}
    for workload, rows in per_study.groupby("workload", sort=True):
        most_studies = int(rows.groupby("submission").size().max())
        most_trials = int(rows["num_trials"].max())
        shapes.setdefault((most_studies, most_trials), []).append(str(workload))
        for submission, own in rows.groupby("submission"):
            missing = []
            if len(own) < most_studies:
                missing.append(f"{len(own)} of {most_studies} studies")
            short = own[own["num_trials"] < most_trials]
            for count, studies in short.groupby("num_trials")["study"]:
                missing.append(f"{count} of {most_trials} trials in {', '.join(sorted(studies))}")
            if missing:
                texts = lacking.setdefault(str(submission), [])
                texts.append(f"{' and '.join(missing)} of {workload}")
    if lacking:
        return [
            f"uneven comparison, {submission} has fewer than others: {'; '.join(texts)}"
            for submission, texts in sorted(lacking.items())
        ]
    asked = OFFICIAL_NUM_TRIALS if ruleset != "self" else 1
    if set(shapes) == {(OFFICIAL_NUM_STUDIES, asked)}:
        return []
    counts = [
        f"{_count(studies, 'study', 'studies')} x {_count(trials, 'trial', 'trials')}"
        for studies, trials in shapes
    ]
    if len(shapes) == 1:
        found = f"{counts[0]} a submission and workload"
    else:
        of = zip(counts, shapes.values(), strict=True)
        found = ", ".join(f"{count} of {', '.join(names)}" for count, names in of)
        found += " a submission"
    return [
        f"{found}; the benchmark asks {OFFICIAL_NUM_STUDIES} x {OFFICIAL_NUM_TRIALS} under external"
        f" tuning, {OFFICIAL_NUM_STUDIES} x 1 under self-tuning"
    ]


def notes_on_variants(workloads: Sequence[str], official: Collection[str]) -> list[str]:
    """Name workloads that are variants of official ones, which the benchmark never scores themselves."""
    notes = []
    for name in sorted(set(workloads).difference(official)):
        bases = [base for base in official if name.startswith(f"{base}_")]
        if bases:
            notes.append(
                f"{name} is a variant of {bases[0]}: it counts as a workload here, where the benchmark"
                f" (v0.5) only lets it veto {bases[0]}; leave it out with --workloads"
            )
    return notes


def notes_on_files(trials: Sequence[Trial]) -> list[str]:
    """Name submissions whose trials were run from several files."""
    files: dict[str, list[str]] = {}
    for trial in trials:
        known = files.setdefault(trial.submission, [])
        path = trial.flags.get("submission_path")
        if path is not None and path not in known:
            known.append(path)
    return [
        f"{submission} was run from {len(paths)} files, {', '.join(paths)}: if these are several"
        " submissions, give each a folder of its own with studies in it"
        for submission, paths in sorted(files.items())
        if len(paths) > 1
    ]


def notes_on_ends(trials: Sequence[Trial]) -> list[str]:
    """Name trials that were cut off, by a mistake of theirs or from outside."""
    cut = [(trial, _last_step(trial)) for trial in trials if trial.ended is False]
    return [f"did not end, so that a miss may be none: {_named(cut)}"] if cut else []


def notes_on_time(trials: Sequence[Trial]) -> list[str]:
    """Name trials whose seconds ran out before their steps: a matter of the machine as well."""
    late = [
        (trial, int(trial.outcome["global_step"]))
        for trial in trials
        if trial.outcome.get("stopped_by") == OUT_OF_TIME
        and trial.outcome.get("steps_to_target") is None
        # Without a limit of steps time is what ends a trial.
        and any(trial.flags.get(flag) is not None for flag in _STEP_LIMITS)
    ]
    return (
        [f"out of time with steps left, so that a miss may be the machine's: {_named(late)}"]
        if late
        else []
    )


def _named(trials: Sequence[tuple[Trial, int]]) -> str:
    """Some trials and the steps that they ended at."""
    names = [
        f"{trial.submission} {trial.study} {trial.workload} {trial.trial} (step {step})"
        for trial, step in trials[:_MOST_NAMED]
    ]
    more = f" and {len(trials) - _MOST_NAMED} more" if len(trials) > _MOST_NAMED else ""
    return ", ".join(names) + more


def notes_on_evaluations(trials: Sequence[Trial]) -> list[str]:
    """Name submissions with trials that logged no evaluation: files that were lost, or none were made."""
    counts: dict[str, int] = {}
    for trial in trials:
        if not len(trial.evaluations) and trial.ended is not False:  # else named as cut off
            counts[trial.submission] = counts.get(trial.submission, 0) + 1
    listed_counts = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return (
        [f"without any evaluation, so that a miss may be none: {listed_counts}"] if counts else []
    )


def _last_step(trial: Trial) -> int:
    return int(trial.evaluations[STEP].max()) if len(trial.evaluations) else 0


def notes_on_flags(trials: Sequence[Trial]) -> list[str]:
    """Name flags that decide what a time to target means and differ within a workload."""
    notes = []
    for workload in sorted({trial.workload for trial in trials}):
        own = [trial for trial in trials if trial.workload == workload and trial.flags]
        for flag in _COMPARED_FLAGS:
            values: dict[str, set[str]] = {}
            for trial in own:
                if flag in trial.flags:  # the official harness has others, so have older logs
                    values.setdefault(str(trial.flags[flag]), set()).add(trial.submission)
            if len(values) > 1:
                who = [f"{value} ({', '.join(sorted(names))})" for value, names in values.items()]
                notes.append(f"{workload} was run with different --{flag}: {', '.join(who)}")
    return notes


def notes_on_texts(trials: Sequence[Trial]) -> list[str]:
    """Name workloads whose data were not the same in all runs, or not those of the target."""
    notes = []
    for workload in sorted({trial.workload for trial in trials}):
        own = [trial for trial in trials if trial.workload == workload]
        versions: dict[str, set[str]] = {}
        for trial in own:
            text = trial.metadata.get("workload.text_fingerprint")
            if text is not None:
                versions.setdefault(text, set()).add(str(trial.metadata.get("python_version")))
        if len(versions) > 1:
            listed_versions = ", ".join(
                sorted({name for some in versions.values() for name in some})
            )
            notes.append(
                f"{workload} was run on {len(versions)} different texts, of Python {listed_versions}: its"
                " runs do not compare"
            )
        else:
            found = (trial.metadata.get("workload.caveat") for trial in own)
            caveats = dict.fromkeys(str(caveat) for caveat in found if caveat is not None)
            notes += [f"{workload}: {caveat}" for caveat in caveats]
    return notes


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def notes_on_rulesets(trials: Sequence[Trial]) -> list[str]:
    """Say who ran under which ruleset, where there is more than one."""
    rulesets = by_ruleset(trials)
    if len(rulesets) < 2:
        return []
    return [f"rulesets are mixed ({listed(rulesets)}); the benchmark scores each by itself"]


def by_ruleset(trials: Sequence[Trial]) -> dict[str, list[str]]:
    """Submissions by ruleset, as far as the logs say."""
    found: dict[str, set[str]] = {}
    for trial in trials:
        if trial.ruleset is not None:
            found.setdefault(trial.ruleset, set()).add(trial.submission)
    return {ruleset: sorted(names) for ruleset, names in sorted(found.items())}


def listed(rulesets: Mapping[str, Sequence[str]]) -> str:
    """Rulesets and their submissions in words."""
    return "; ".join(f"{ruleset}: {', '.join(names)}" for ruleset, names in rulesets.items())
