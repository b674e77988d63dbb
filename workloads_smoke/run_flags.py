"""Flags of `python -m workloads_smoke.run`: the official runner's names and meanings, and a few more.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `submission_runner.py`.
"""

import math
import os
from pathlib import Path
from typing import Any

from absl import flags

from workloads_smoke.errors import UserError
from workloads_smoke.registry import WORKLOADS
from workloads_smoke.settings import RunSettings

_SEEDS = -(2**63), 2**63 - 1  # what every generator takes

_REQUIRED = ("workload", "submission_path", "experiment_dir", "experiment_name")

# Official flags whose other value needs what a laptop without a network has not.
_UNAVAILABLE = {
    "use_wandb": "Weights & Biases needs a network",
    "capture_jax_trace": "there is no JAX here",
}


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Register the flags.

    Args:
        values: Where; the process's own flags if not given.
    """
    _define_what_to_run(values)
    _define_tuning(values)
    _define_logs(values)
    _define_stopping(values)
    _define_official_only(values)
    _define_local(values)
    flags.mark_flags_as_required(_REQUIRED, flag_values=values)


def _define_what_to_run(values: flags.FlagValues) -> None:
    flags.DEFINE_list(
        "workload",
        None,
        f"Workload to run, several separated by commas, or 'all'. Known: {', '.join(WORKLOADS)}.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "submission_path",
        None,
        "Python file with the submission functions, anyone's, anywhere.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "framework",
        "pytorch",
        ["jax", "pytorch"],
        "Framework of the submission; only 'pytorch' runs here.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "rng_seed",
        None,
        "Seed of data order, initial weights and whatever the submission derives from its keys. "
        "None draws one and records it in meta_data_0.json. 0 is a seed like any other (the "
        "official runner takes it for None).",
        lower_bound=_SEEDS[0],
        upper_bound=_SEEDS[1],
        flag_values=values,
    )


def _define_tuning(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "tuning_ruleset",
        "external",
        ["external", "self"],
        "'external': one trial per setting of --tuning_search_space. 'self': one trial, "
        "hyperparameters are None, and 1.5 times the time budget.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tuning_search_space",
        None,
        "JSON file with ranges, sampled by a Halton sequence, or with a list of points. Needed "
        "under the external ruleset, refused under self-tuning.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_tuning_trials",
        1,
        "Number of settings; a list of points that is shorter gives all its points.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "hparam_start_index",
        None,
        "First setting to run, counted from 0; None for the first.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "hparam_end_index",
        None,
        "Setting before which to stop, counted from 0; None for the end.",
        flag_values=values,
    )


def _define_logs(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "experiment_dir",
        None,
        "Folder of all experiments, best one for each submission; '~' is the home folder.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "experiment_name",
        None,
        "Folder of this experiment below it, such as 'study_0'; logs go to "
        "experiment_dir/experiment_name/<workload>_pytorch/trial_<k>.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "append_timestamp",
        False,
        "Append date and time to the experiment's name.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "overwrite",
        False,
        "Delete an existing folder experiment_dir/experiment_name/<workload>_pytorch first.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "resume_last_run",
        None,
        "Go on in an existing folder: complete trials are kept, the others continue from their "
        "latest checkpoint, with the same bits on one process, or start. Refused where flags that "
        "decide results differ from those of the trials there. Starts where there is no folder, as "
        "in the official runner.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "save_checkpoints",
        True,
        "Save a checkpoint at every evaluation and at the end.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "save_intermediate_checkpoints",
        True,
        "Keep all checkpoints; otherwise only the latest, written before the one before it goes.",
        flag_values=values,
    )


def _define_stopping(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "max_global_steps", None, "Steps after which a trial ends.", flag_values=values
    )
    flags.DEFINE_boolean(
        "skip_evals",
        False,
        "Train without evaluations, hence without checkpoints on the way and targets to stop at. A "
        "submission whose processes share its optimizer state has not gathered it for the checkpoint "
        "at the end: that is incomplete and cannot be resumed.",
        flag_values=values,
    )


def _define_official_only(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "data_dir",
        "~/data",
        "Handed to the workloads; ours make their data in memory.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "imagenet_v2_data_dir",
        None,
        "Handed to the workloads; ours make their data in memory.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "librispeech_tokenizer_vocab_path",
        "",
        "No effect: our speech workloads have their own.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "torch_compile",
        False,
        "Compile models with torch.compile, except the workloads that the official runner does "
        "not compile. Off here and on there: compiling takes longer than training a tiny model "
        "does, counts as submission time, and needs a C++ compiler.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "profile", False, "Print where the time of each trial went.", flag_values=values
    )
    flags.DEFINE_boolean(
        "set_pytorch_max_split_size",
        False,
        "Set the CUDA allocator's max_split_size_mb to 256; no effect on a CPU.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "pytorch_eval_num_workers",
        0,
        "Must be 0: our evaluation data is in memory and needs no loading processes.",
        lower_bound=0,
        upper_bound=0,
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "use_wandb", False, "Must be false: Weights & Biases needs a network.", flag_values=values
    )
    flags.DEFINE_boolean(
        "capture_jax_trace", False, "Must be false: there is no JAX here.", flag_values=values
    )


def _define_local(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "eval_every_steps",
        None,
        "Ours: evaluate after the first step and then every so many steps, instead of every "
        "eval_period_time_sec seconds of the workload; steps to target then repeat exactly, unless the "
        "submission decides by measured time, as ours does on the interval of its refreshes.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "step_budget",
        None,
        "Ours: end a trial after this multiple of the workload's step_hint, so that one call "
        "limits workloads of different lengths alike.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "parallel_trials",
        1,
        "Ours: so many trials at a time, a process each, sharing out the CPU cores. Times then "
        "depend on each other: compare steps, not seconds.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "use_submission_batch_size",
        False,
        "Ours: train with the submission's get_batch_size. Otherwise with the tiny workload's own "
        "batch size, which step_hint and targets refer to; sizes for the official data do not fit. "
        "get_batch_size is called, and must exist, in any case.",
        flag_values=values,
    )


def read_settings(values: flags.FlagValues) -> RunSettings:
    """Check what can be checked at the door.

    Args:
        values: Parsed flags.

    Returns:
        The options that all trials share.

    Raises:
        UserError: A flag has a value that cannot work here; the message names the flag.
    """
    if values.framework != "pytorch":
        raise UserError("--framework=jax: this runner runs PyTorch submissions; use pytorch")
    for name, reason in _UNAVAILABLE.items():
        if values[name].value:
            raise UserError(f"--{name} is not possible here: {reason}")
    if values.overwrite and values.resume_last_run:
        raise UserError("--overwrite deletes what --resume_last_run goes on with; give one of them")
    if values.tuning_ruleset == "external" and values.tuning_search_space is None:
        raise UserError("--tuning_ruleset=external needs --tuning_search_space")
    if values.tuning_ruleset == "self" and values.tuning_search_space is not None:
        raise UserError("--tuning_ruleset=self takes no --tuning_search_space")
    if values.max_global_steps is not None and values.max_global_steps < 1:
        raise UserError(f"--max_global_steps must be at least 1, got {values.max_global_steps}")
    if values.step_budget is not None and not 0 < values.step_budget < math.inf:
        raise UserError(f"--step_budget must be a number above 0, got {values.step_budget}")
    space = values.tuning_search_space
    return RunSettings(
        submission_path=Path(values.submission_path).expanduser(),
        tuning_ruleset=values.tuning_ruleset,
        tuning_search_space=None if space is None else Path(space).expanduser(),
        # Unlike Path's, it takes a user without a home, as in some containers: nothing is read there.
        data_dir=os.path.expanduser(values.data_dir),
        imagenet_v2_data_dir=values.imagenet_v2_data_dir,
        max_global_steps=values.max_global_steps,
        step_budget=values.step_budget,
        eval_every_steps=values.eval_every_steps,
        skip_evals=values.skip_evals,
        save_checkpoints=values.save_checkpoints,
        save_intermediate_checkpoints=values.save_intermediate_checkpoints,
        use_submission_batch_size=values.use_submission_batch_size,
        torch_compile=values.torch_compile,
        profile=values.profile,
        flags=_recorded(values),
    )


def _recorded(values: flags.FlagValues) -> dict[str, Any]:
    """Every flag, for the logs: files absolute, so that they are the same from any folder."""
    recorded = values.flag_values_dict()
    for name in ("submission_path", "tuning_search_space"):
        if recorded[name] is not None:
            recorded[name] = str(Path(recorded[name]).expanduser().absolute())
    return recorded


def read_workloads(values: flags.FlagValues) -> list[str]:
    """Names of the workloads to run, in the order given.

    Raises:
        UserError: One of them is unknown; the message lists the known ones.
    """
    if values.workload == ["all"]:
        return list(WORKLOADS)
    unknown = [name for name in values.workload if name not in WORKLOADS]
    if unknown or not values.workload:
        raise UserError(
            f"unknown workload {', '.join(map(repr, unknown))}; "
            f"known ones: {', '.join(WORKLOADS)}, or all"
        )
    return list(dict.fromkeys(values.workload))
