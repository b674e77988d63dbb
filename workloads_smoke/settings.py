"""What the command line says about every trial of a run, as one frozen record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunSettings:
    """Options that all trials share; the flag of the same name explains each.

    Attributes:
        submission_path: The submission's Python file.
        tuning_ruleset: "external" or "self".
        tuning_search_space: File of the settings, or None under self-tuning.
        data_dir: Handed to the workload; ours make their data in memory.
        imagenet_v2_data_dir: Handed to the workload likewise.
        max_global_steps: Steps after which a trial ends, or None.
        step_budget: Multiple of the workload's `step_hint` after which a trial ends, or None.
        eval_every_steps: Steps between evaluations, or None for the workload's seconds.
        skip_evals: Whether to train without evaluations.
        save_checkpoints: Whether to save at evaluations and at the end.
        save_intermediate_checkpoints: Whether earlier checkpoints stay.
        use_submission_batch_size: Whether `get_batch_size` of the submission holds.
        torch_compile: Whether models are compiled.
        profile: Whether to report where the time went.
        flags: All flags and values, as the logs record them.
    """

    submission_path: Path
    tuning_ruleset: str = "external"
    tuning_search_space: Path | None = None
    data_dir: str = ""
    imagenet_v2_data_dir: str | None = None
    max_global_steps: int | None = None
    step_budget: float | None = None
    eval_every_steps: int | None = None
    skip_evals: bool = False
    save_checkpoints: bool = True
    save_intermediate_checkpoints: bool = True
    use_submission_batch_size: bool = False
    torch_compile: bool = False
    profile: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialRequest:
    """One trial: a workload, a setting, a seed and a place for its logs.

    Attributes:
        workload: Official name.
        number: From 1, as in `trial_<number>`.
        num_trials: Trials of the study, of which a run may do some; for display.
        hyperparameters: Values by name, or None under self-tuning.
        rng_seed: Seed of the run.
        folder: Where the trial's logs go.
        train_batch_size: Global, over all processes.
        eval_batch_size: Global, over all processes.
    """

    workload: str
    number: int
    num_trials: int
    hyperparameters: dict[str, Any] | None
    rng_seed: int
    folder: Path
    train_batch_size: int
    eval_batch_size: int
