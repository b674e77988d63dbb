"""The training loop of one trial: calls, arguments, clock and stopping rules of the official one.

    data, model, optimizer -> [batch -> update -> (every period) prepare, evaluate, log, save]*

The submission's clock runs during batch selection, updates and `prepare_for_eval`; it stands still
during evaluation, logging and saving.

Differences, all deliberate: a trial seeds Python's, NumPy's and torch's generators itself, so that
it does not depend on the trials before it; an error during evaluation ends the trial instead of
being logged and met again at every step; a resumed trial goes on with the same bits, and does not
evaluate at once; without evaluations the time budget is looked at after every step.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `submission_runner.py`.
"""

from types import MappingProxyType
from typing import Any

import torch

from workloads_smoke import spec
from workloads_smoke.checkpoints import save_checkpoint
from workloads_smoke.distributed import current_time, pytorch_setup, release_device_memory
from workloads_smoke.errors import UserError
from workloads_smoke.logs import OUT_OF_TIME, MetricsLogger, write_json
from workloads_smoke.metadata import get_meta_data
from workloads_smoke.outcome import TrialOutcome, outcome_of
from workloads_smoke.progress import TrialProgress
from workloads_smoke.settings import RunSettings
from workloads_smoke.trial_setup import TrialContext, evaluate_model, start_trial, step_keys

# The self-tuning ruleset allows this multiple of a workload's time budget.
SELF_TUNING_BUDGET = 1.5


def run_loop(context: TrialContext, progress: TrialProgress) -> TrialOutcome:
    """Train until the targets are reached or a limit is.

    Args:
        context: The trial.
        progress: Where a person looks on.

    Returns:
        How it went; the logs are complete by then.

    Raises:
        UserError: The submission reads a hyperparameter that its setting lacks or returns something
            else than the benchmark's three, or a checkpoint cannot be used.
    """
    release_device_memory()
    try:
        return TrainingLoop(context, progress).run()
    except AttributeError as error:
        if context.hyperparameters is not None and error.obj is context.hyperparameters:
            raise UserError(
                f"search space {context.settings.tuning_search_space} lacks hyperparameter "
                f"{error.name!r}, which submission {context.submission.path} reads"
            ) from error
        raise


def step_limit(settings: RunSettings, workload: spec.Workload) -> int | None:
    """Steps after which a trial ends: the smaller one of the two limits that may be given."""
    limits = []
    if settings.max_global_steps is not None:
        limits.append(settings.max_global_steps)
    if settings.step_budget is not None:
        limits.append(max(1, round(settings.step_budget * workload.step_hint)))
    return min(limits, default=None)


class TrainingLoop:
    """The loop and what it carries from step to step."""

    def __init__(self, context: TrialContext, progress: TrialProgress) -> None:
        """Start the trial, or take up its latest checkpoint, and open its logs."""
        started = start_trial(context)
        self._context = context
        self._workload = context.workload
        self._submission = context.submission
        self._progress = progress
        self._state = started.state
        self._input_queue = started.input_queue
        self._rng = started.rng
        self._max_steps = step_limit(context.settings, context.workload)
        self._max_seconds = context.workload.max_allowed_runtime_sec * (
            SELF_TUNING_BUDGET if context.settings.tuning_ruleset == "self" else 1.0
        )
        self._metrics_logger: MetricsLogger | None = None
        if pytorch_setup()[1] == 0:
            self._metrics_logger = self._open_logs(started.num_rows_kept)
        progress.step(self._state.global_step)

    def run(self) -> TrialOutcome:
        """Train, evaluate when it is time, and log the end."""
        try:
            self._train()
        except BaseException:
            # What a submission logged before it failed is what it will be mended by. A resumed trial keeps
            # the rows of its checkpoint alone.
            if self._metrics_logger is not None:
                self._metrics_logger.flush()
            raise
        return self._finish()

    def _train(self) -> None:
        """Steps and evaluations, until there is a reason to stop."""
        train_state = self._state.train_state
        self._start_time = train_state["last_step_end_time"] = current_time()
        while self._stop_reason() is None:
            keys = step_keys(self._rng, self._state.global_step)
            self._train_one_step(keys[0], keys[1])
            step_end_time = current_time()
            self._count_step_time(step_end_time - train_state["last_step_end_time"])
            if self._context.settings.skip_evals:
                self._check_time()
            elif self._evaluation_is_due(step_end_time):
                self._prepare_for_eval(keys[2])
                self._check_time()
                if train_state["is_time_remaining"]:
                    self._evaluate()
            train_state["last_step_end_time"] = current_time()

    def _open_logs(self, num_rows_kept: dict[str, int]) -> MetricsLogger:
        """Write what is known beforehand and open the tables; rank 0 only."""
        request, count = self._context.request, self._state.preemption_count
        meta_data = get_meta_data(self._workload, request.rng_seed, self._submission.sha256)
        write_json(request.folder / f"meta_data_{count}.json", meta_data)
        flags = {**self._context.settings.flags, "workload": request.workload}
        write_json(request.folder / f"flags_{count}.json", flags)
        metrics_logger = MetricsLogger(request.folder, num_rows_kept)
        self._workload.attach_metrics_logger(metrics_logger)
        return metrics_logger

    def _train_one_step(self, data_select_rng: Any, update_rng: Any) -> None:
        """Take a batch and let the submission update the model."""
        state, profile = self._state, self._context.profiler.profile
        with profile("Data selection"):
            batch = self._submission.data_selection(
                self._workload,
                self._input_queue,
                state.optimizer_state,
                state.model_params,
                state.model_state,
                self._context.hyperparameters,
                state.global_step,
                data_select_rng,
            )
        arguments = self._common_arguments(update_rng) | {"batch": batch}
        if self._submission.wants_train_state:
            arguments["train_state"] = MappingProxyType(state.train_state)
        try:
            with profile("Update parameters"):
                self._take(self._submission.update_params(**arguments), "update_params")
        except spec.TrainingCompleteError:
            state.train_state["training_complete"] = True
        state.global_step += 1

    def _common_arguments(self, rng: Any) -> dict[str, Any]:
        """Keyword arguments of `update_params` and `prepare_for_eval` alike."""
        state = self._state
        return {
            "workload": self._workload,
            "current_param_container": state.model_params,
            "current_params_types": self._workload.model_params_types,
            "model_state": state.model_state,
            "hyperparameters": self._context.hyperparameters,
            "loss_type": self._workload.loss_type,
            "optimizer_state": state.optimizer_state,
            "eval_results": state.eval_results,
            "global_step": state.global_step,
            "rng": rng,
        }

    def _take(self, returned: Any, function: str) -> None:
        """Put what a function of the submission returned in the place of what it was given.

        Raises:
            UserError: It is something else.
        """
        if not isinstance(returned, tuple | list) or len(returned) != 3:
            what = type(returned).__name__
            if isinstance(returned, tuple | list):
                what += f" of {len(returned)}"
            raise UserError(
                f"submission {self._submission.path}: {function} must return optimizer_state, "
                f"current_param_container and model_state, got {what}"
            )
        state = self._state
        state.optimizer_state, state.model_params, state.model_state = returned

    def _count_step_time(self, seconds: float) -> None:
        """Put a step on the submission's clock and on display."""
        self._state.train_state["accumulated_submission_time"] += seconds
        if self._metrics_logger is not None:
            self._metrics_logger.append_step_time(self._state.global_step, seconds)
        self._progress.step(self._state.global_step)

    def _evaluation_is_due(self, now: float) -> bool:
        """After the first step, then every period of seconds (or steps), and at the end."""
        train_state, every = self._state.train_state, self._context.settings.eval_every_steps
        if train_state["training_complete"] or self._is_at_limit():
            return True
        if every is not None:
            return self._state.global_step == 1 or self._state.global_step % every == 0
        return now - train_state["last_eval_time"] >= self._workload.eval_period_time_sec

    def _prepare_for_eval(self, rng: Any) -> None:
        """Let the submission put its evaluation weights in place; on its clock."""
        if self._submission.prepare_for_eval is None:
            return
        state, start = self._state, current_time()
        with self._context.profiler.profile("Prepare for eval"):
            returned = self._submission.prepare_for_eval(**self._common_arguments(rng))
            self._take(returned, "prepare_for_eval")
        state.train_state["accumulated_submission_time"] += current_time() - start

    def _check_time(self) -> None:
        """See whether the clock has run past the budget."""
        clock = self._state.train_state["accumulated_submission_time"]
        self._state.train_state["is_time_remaining"] = clock < self._max_seconds

    def _evaluate(self) -> None:
        """Evaluate, judge, log and save; off the submission's clock."""
        state, train_state = self._state, self._state.train_state
        release_device_memory()
        start = current_time()
        with self._context.profiler.profile("Evaluation"):
            result = evaluate_model(self._context, state, self._rng, state.global_step)
        if self._workload.has_reached_validation_target(result):
            train_state["validation_goal_reached"] = True
        if self._workload.has_reached_test_target(result):
            train_state["test_goal_reached"] = True
        end = train_state["last_eval_time"] = current_time()
        train_state["accumulated_eval_time"] += end - start
        result["score"] = train_state["accumulated_submission_time"]
        result["total_duration"] = end - self._start_time
        for clock in ("submission", "eval", "logging"):
            result[f"accumulated_{clock}_time"] = train_state[f"accumulated_{clock}_time"]
        state.eval_results.append((state.global_step, result))
        if self._metrics_logger is not None:
            self._metrics_logger.append_scalar_metrics(
                result, state.global_step, state.preemption_count, is_eval=True
            )
            self._save(self._metrics_logger.num_rows)
        self._progress.evaluation(state.global_step, result)
        train_state["accumulated_logging_time"] += current_time() - end
        release_device_memory()

    def _save(self, num_log_rows: dict[str, int]) -> None:
        """Write a checkpoint, if checkpoints are wanted; rank 0 only."""
        settings = self._context.settings
        if settings.save_checkpoints:
            save_checkpoint(
                self._context.request.folder,
                self._state,
                {
                    "num_batches_drawn": self._input_queue.num_drawn,
                    "num_log_rows": num_log_rows,
                    "num_threads": torch.get_num_threads(),
                },
                keep_earlier=settings.save_intermediate_checkpoints,
            )

    def _stop_reason(self) -> str | None:
        """Why the trial is over, or None while it is not."""
        train_state = self._state.train_state
        if train_state["validation_goal_reached"] and train_state["test_goal_reached"]:
            return "targets reached"
        if not train_state["is_time_remaining"]:
            return OUT_OF_TIME
        if self._is_at_limit():
            return "step limit"
        return "submission ended training" if train_state["training_complete"] else None

    def _is_at_limit(self) -> bool:
        """Whether the steps that are allowed have been taken.

        No part of `train_state`: a trial that is resumed under a larger limit goes on.
        """
        return self._max_steps is not None and self._state.global_step >= self._max_steps

    def _finish(self) -> TrialOutcome:
        """Log the final time and save."""
        state, reason = self._state, self._stop_reason()
        assert reason is not None
        clock = state.train_state["accumulated_submission_time"]
        if self._metrics_logger is not None:
            # Not among the rows that the checkpoint vouches for: if the process dies before it has
            # declared the trial complete, the resumed one writes this row.
            num_rows = self._metrics_logger.num_rows
            self._metrics_logger.append_scalar_metrics(
                {"score": clock}, state.global_step, state.preemption_count
            )
            self._metrics_logger.finish()
            self._save(num_rows)
        return outcome_of(self._workload, state.eval_results, state.global_step, clock, reason)
