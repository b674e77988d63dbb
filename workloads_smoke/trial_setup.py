"""Bring a trial to the point where training starts, afresh or from its latest checkpoint."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from absl import logging

from workloads_smoke import randomness, spec
from workloads_smoke.checkpoints import (
    TrainingState,
    read_checkpoint,
    restore,
    restore_random_state,
)
from workloads_smoke.compilation import compile_as_official
from workloads_smoke.distributed import current_time, pytorch_setup
from workloads_smoke.input_queue import CountingQueue
from workloads_smoke.profiling import Profiler
from workloads_smoke.settings import RunSettings, TrialRequest
from workloads_smoke.submissions import Submission


@dataclass(frozen=True)
class TrialContext:
    """What stays the same while a trial runs.

    Attributes:
        request: Which trial.
        settings: Options of the run.
        submission: The functions to call.
        workload: A fresh workload; its model and queues belong to this trial.
        hyperparameters: Named tuple, or None under self-tuning.
        profiler: Measures actions, or does nothing.
    """

    request: TrialRequest
    settings: RunSettings
    submission: Submission
    workload: spec.Workload
    hyperparameters: Any
    profiler: Profiler = field(default_factory=lambda: Profiler(enabled=False))


@dataclass
class StartedTrial:
    """Where training starts.

    Attributes:
        state: Model, optimizer, times, results.
        input_queue: Training batches.
        rng: The key from which the keys of each step derive.
        num_rows_kept: Rows of each log that an earlier run wrote and that stay.
    """

    state: TrainingState
    input_queue: CountingQueue
    rng: Any
    num_rows_kept: dict[str, int]


def start_trial(context: TrialContext) -> StartedTrial:
    """Build queue, model and optimizer, in this order, and go back to the latest checkpoint.

    Raises:
        UserError: The checkpoint is damaged, or the submission cannot be resumed.
    """
    started = _initialize(context)
    content = read_checkpoint(context.request.folder, pytorch_setup()[2])
    if content is not None:
        _go_back(context, started, content)
    return started


def step_keys(rng: Any, global_step: int) -> Any:
    """Four keys of a step: data selection, update, preparation for evaluation, evaluation."""
    return randomness.split(randomness.fold_in(rng, global_step), 4)


def evaluate_model(
    context: TrialContext, state: TrainingState, rng: Any, global_step: int
) -> dict[str, Any]:
    """Metrics on all splits after `global_step` steps, with the random key of the last of them."""
    return context.workload.eval_model(
        context.request.eval_batch_size,
        state.model_params,
        state.model_state,
        step_keys(rng, global_step - 1)[3],
        context.settings.data_dir,
        context.settings.imagenet_v2_data_dir,
        global_step,
    )


def _initialize(context: TrialContext) -> StartedTrial:
    """A trial at step 0."""
    seed, workload, profiler = context.request.rng_seed, context.workload, context.profiler
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    key = randomness.PRNGKey(seed)
    if context.settings.tuning_ruleset == "external":
        key = randomness.split(key, 2)[0]
    data_rng, optimizer_rng, model_rng, rng = randomness.split(key, 4)
    with profiler.profile("Initializing dataset"):
        queue = workload._build_input_queue(
            data_rng,
            "train",
            data_dir=context.settings.data_dir,
            global_batch_size=context.request.train_batch_size,
        )
    with profiler.profile("Initializing model"):
        model_params, model_state = workload.init_model_fn(model_rng)
        if context.settings.torch_compile:
            model_params = compile_as_official(workload, context.request.workload, model_params)
    with profiler.profile("Initializing optimizer"):
        optimizer_state = context.submission.init_optimizer_state(
            workload, model_params, model_state, context.hyperparameters, optimizer_rng
        )
    state = TrainingState(optimizer_state, model_params, model_state, _fresh_train_state(), [])
    return StartedTrial(state, CountingQueue(queue), rng, {})


def _fresh_train_state() -> dict[str, Any]:
    """Times and verdicts under the keys that submissions may read as `train_state`."""
    return {
        "validation_goal_reached": False,
        "test_goal_reached": False,
        "is_time_remaining": True,
        "last_eval_time": 0,
        "training_complete": False,
        "accumulated_submission_time": 0,
        "accumulated_eval_time": 0,
        "accumulated_logging_time": 0,
        "last_step_end_time": None,
    }


def _go_back(context: TrialContext, started: StartedTrial, content: dict[str, Any]) -> None:
    """Take up a checkpoint, with everything outside it that training depends on."""
    state = started.state
    runner_state = restore(content, state)
    if runner_state["num_threads"] != torch.get_num_threads():
        logging.warning(
            "%s was trained with %d threads and goes on with %d: last bits may differ",
            context.request.folder,
            runner_state["num_threads"],
            torch.get_num_threads(),
        )
    started.input_queue.skip(runner_state["num_batches_drawn"])
    if state.eval_results:
        # A workload builds its evaluation queues at the first evaluation, with that one's random
        # key: let it build the same ones again.
        evaluate_model(context, state, started.rng, state.eval_results[0][0])
    restore_random_state(runner_state)
    started.num_rows_kept = runner_state["num_log_rows"]
    state.train_state["last_eval_time"] = current_time()
