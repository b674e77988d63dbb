"""The training loop of one trial: calls, arguments, clock and stopping rules of the official one.

    data, model, optimizer -> [batch -> update -> (every period) prepare, evaluate, log, save]*

The submission's clock runs during batch selection, updates and `prepare_for_eval`; it stands still
during evaluation, logging and saving.

Differences, all deliberate: a trial seeds Python's, NumPy's and torch's generators itself, so that it
does not depend on the trials before it; an error during evaluation ends the trial instead of being
logged and met again at every step; a resumed trial goes on with the same bits, and does not evaluate
at once; without evaluations (`--skip_evals`) the time budget is looked at after every step.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `submission_runner.py`.
"""

import random
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from workloads_smoke import randomness, spec
from workloads_smoke.checkpoints import (
    TrainingState,
    read_checkpoint,
    restore,
    restore_random_state,
    save_checkpoint,
)
from workloads_smoke.distributed import current_time, pytorch_setup
from workloads_smoke.errors import UserError
from workloads_smoke.input_queue import CountingQueue
from workloads_smoke.logs import MetricsLogger, write_json
from workloads_smoke.metadata import get_meta_data
from workloads_smoke.outcome import TrialOutcome, outcome_of
from workloads_smoke.progress import TrialProgress
from workloads_smoke.settings import RunSettings, TrialRequest
from workloads_smoke.submissions import Submission

# The self-tuning ruleset allows this multiple of a workload's time budget.
SELF_TUNING_BUDGET = 1.5


class Trial:
    """One run of a submission on a workload with one setting."""

    def __init__(
        self,
        request: TrialRequest,
        settings: RunSettings,
        submission: Submission,
        workload: spec.Workload,
        batch_sizes: tuple[int, int],
        hyperparameters: Any,
        progress: TrialProgress,
    ) -> None:
        """Take everything a trial needs; nothing happens yet.

        Args:
            request: Which trial.
            settings: Options of the run.
            submission: The functions to call.
            workload: A fresh workload; its model and queues belong to this trial.
            batch_sizes: Global sizes for training and evaluation.
            hyperparameters: Named tuple, or None under self-tuning.
            progress: Where a person looks on.
        """
        self._request = request
        self._settings = settings
        self._submission = submission
        self._workload = workload
        self._train_batch_size, self._eval_batch_size = batch_sizes
        self._hyperparameters = hyperparameters
        self._progress = progress
        self._device = pytorch_setup()[2]
        self._writes = pytorch_setup()[1] == 0
        self._max_steps = step_limit(settings, workload)
        self._max_seconds = workload.max_allowed_runtime_sec * (
            SELF_TUNING_BUDGET if settings.tuning_ruleset == "self" else 1.0
        )

    def run(self) -> TrialOutcome:
        """Train until the targets are reached or a limit is.

        Returns:
            How it went; the logs are complete by then.

        Raises:
            UserError: The submission reads a hyperparameter that its setting lacks, or a checkpoint
                cannot be used.
        """
        try:
            self._initialize()
            self._resume()
            self._open_logs()
            self._loop()
            return self._finish()
        except AttributeError as error:
            if self._hyperparameters is not None and error.obj is self._hyperparameters:
                raise UserError(
                    f"search space {self._settings.tuning_search_space} lacks hyperparameter "
                    f"{error.name!r}, which submission {self._submission.path} reads"
                ) from error
            raise

    def _initialize(self) -> None:
        """Build the input queue, the model and the optimizer, in this order."""
        seed = self._request.rng_seed
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        rng = randomness.PRNGKey(seed)
        if self._settings.tuning_ruleset == "external":
            rng = randomness.split(rng, 2)[0]
        data_rng, optimizer_rng, model_rng, self._rng = randomness.split(rng, 4)
        self._input_queue = CountingQueue(
            self._workload._build_input_queue(
                data_rng,
                "train",
                data_dir=self._settings.data_dir,
                global_batch_size=self._train_batch_size,
            )
        )
        model_params, model_state = self._workload.init_model_fn(model_rng)
        self._state = TrainingState(
            optimizer_state=self._submission.init_optimizer_state(
                self._workload, model_params, model_state, self._hyperparameters, optimizer_rng
            ),
            model_params=model_params,
            model_state=model_state,
            train_state={
                "validation_goal_reached": False,
                "test_goal_reached": False,
                "is_time_remaining": True,
                "last_eval_time": 0,
                "training_complete": False,
                "accumulated_submission_time": 0,
                "accumulated_eval_time": 0,
                "accumulated_logging_time": 0,
                "last_step_end_time": None,
            },
            eval_results=[],
        )

    def _resume(self) -> None:
        """Go back to the trial's latest checkpoint, if it has one."""
        self._num_rows_kept = (0, 0)
        content = read_checkpoint(self._request.folder, self._device)
        if content is None:
            return
        runner_state = restore(content, self._state)
        self._input_queue.skip(runner_state["num_batches_drawn"])
        if self._state.eval_results:
            # Evaluation queues are built by the first evaluation, with its random key: build the
            # same ones again.
            self._evaluate_model(self._state.eval_results[0][0])
        restore_random_state(runner_state)
        self._num_rows_kept = runner_state["num_log_rows"]
        self._state.train_state["last_eval_time"] = current_time()
        self._progress.step(self._state.global_step)

    def _open_logs(self) -> None:
        """Write what is known beforehand and open the tables."""
        if not self._writes:
            return
        folder, count = self._request.folder, self._state.preemption_count
        meta_data = get_meta_data(self._workload, self._request.rng_seed)
        write_json(folder / f"meta_data_{count}.json", meta_data)
        write_json(folder / f"flags_{count}.json", dict(self._settings.flags))
        self._metrics_logger = MetricsLogger(folder, self._num_rows_kept)
        self._workload.attach_metrics_logger(self._metrics_logger)

    def _loop(self) -> None:
        """Train, and evaluate when it is time."""
        train_state = self._state.train_state
        self._start_time = train_state["last_step_end_time"] = current_time()
        while self._stop_reason() is None:
            rngs = randomness.split(randomness.fold_in(self._rng, self._state.global_step), 4)
            self._train_one_step(rngs[0], rngs[1])
            step_end_time = current_time()
            train_state["accumulated_submission_time"] += (
                step_end_time - train_state["last_step_end_time"]
            )
            self._progress.step(self._state.global_step)
            if self._settings.skip_evals:
                self._check_time()
            elif self._evaluation_is_due(step_end_time):
                self._prepare_for_eval(rngs[2])
                self._check_time()
                if train_state["is_time_remaining"]:
                    self._evaluate()
            train_state["last_step_end_time"] = current_time()

    def _train_one_step(self, data_select_rng: Any, update_rng: Any) -> None:
        """Take a batch and let the submission update the model."""
        state = self._state
        batch = self._submission.data_selection(
            self._workload,
            self._input_queue,
            state.optimizer_state,
            state.model_params,
            state.model_state,
            self._hyperparameters,
            state.global_step,
            data_select_rng,
        )
        optional = {}
        if self._submission.wants_train_state:
            optional["train_state"] = MappingProxyType(state.train_state)
        try:
            state.optimizer_state, state.model_params, state.model_state = (
                self._submission.update_params(
                    workload=self._workload,
                    current_param_container=state.model_params,
                    current_params_types=self._workload.model_params_types,
                    model_state=state.model_state,
                    hyperparameters=self._hyperparameters,
                    batch=batch,
                    loss_type=self._workload.loss_type,
                    optimizer_state=state.optimizer_state,
                    eval_results=state.eval_results,
                    global_step=state.global_step,
                    rng=update_rng,
                    **optional,
                )
            )
        except spec.TrainingCompleteError:
            state.train_state["training_complete"] = True
        state.global_step += 1
        if self._max_steps is not None and state.global_step >= self._max_steps:
            state.train_state["training_complete"] = True

    def _evaluation_is_due(self, now: float) -> bool:
        """After the first step, then every period of seconds (or steps), and at the end."""
        train_state, every = self._state.train_state, self._settings.eval_every_steps
        if train_state["training_complete"]:
            return True
        if every is not None:
            return self._state.global_step == 1 or self._state.global_step % every == 0
        return now - train_state["last_eval_time"] >= self._workload.eval_period_time_sec

    def _prepare_for_eval(self, rng: Any) -> None:
        """Let the submission put its evaluation weights in place; on its clock."""
        if self._submission.prepare_for_eval is None:
            return
        state = self._state
        start = current_time()
        state.optimizer_state, state.model_params, state.model_state = (
            self._submission.prepare_for_eval(
                workload=self._workload,
                current_param_container=state.model_params,
                current_params_types=self._workload.model_params_types,
                model_state=state.model_state,
                hyperparameters=self._hyperparameters,
                loss_type=self._workload.loss_type,
                optimizer_state=state.optimizer_state,
                eval_results=state.eval_results,
                global_step=state.global_step,
                rng=rng,
            )
        )
        state.train_state["accumulated_submission_time"] += current_time() - start

    def _check_time(self) -> None:
        """See whether the clock has run past the budget."""
        clock = self._state.train_state["accumulated_submission_time"]
        self._state.train_state["is_time_remaining"] = clock < self._max_seconds

    def _evaluate_model(self, global_step: int) -> dict[str, Any]:
        """Metrics on all splits, with the random key that belongs to the step."""
        rng = randomness.split(randomness.fold_in(self._rng, global_step - 1), 4)[3]
        return self._workload.eval_model(
            self._eval_batch_size,
            self._state.model_params,
            self._state.model_state,
            rng,
            self._settings.data_dir,
            self._settings.imagenet_v2_data_dir,
            global_step,
        )

    def _evaluate(self) -> None:
        """Evaluate, judge, log and save; off the submission's clock."""
        state, train_state = self._state, self._state.train_state
        start = current_time()
        result = self._evaluate_model(state.global_step)
        train_state["validation_goal_reached"] |= bool(
            self._workload.has_reached_validation_target(result)
        )
        train_state["test_goal_reached"] |= bool(self._workload.has_reached_test_target(result))
        end = train_state["last_eval_time"] = current_time()
        train_state["accumulated_eval_time"] += end - start
        result["score"] = train_state["accumulated_submission_time"]
        result["total_duration"] = end - self._start_time
        result["accumulated_submission_time"] = train_state["accumulated_submission_time"]
        result["accumulated_eval_time"] = train_state["accumulated_eval_time"]
        result["accumulated_logging_time"] = train_state["accumulated_logging_time"]
        state.eval_results.append((state.global_step, result))
        if self._writes:
            self._metrics_logger.append_scalar_metrics(
                result, state.global_step, state.preemption_count, is_eval=True
            )
            self._save()
        self._progress.evaluation(state.global_step, result)
        train_state["accumulated_logging_time"] += current_time() - end

    def _save(self) -> None:
        """Write a checkpoint, if checkpoints are wanted."""
        if not self._settings.save_checkpoints:
            return
        runner_state = {
            "num_batches_drawn": self._input_queue.num_drawn,
            "num_log_rows": self._metrics_logger.num_rows,
        }
        save_checkpoint(
            self._request.folder,
            self._state,
            runner_state,
            keep_earlier=self._settings.save_intermediate_checkpoints,
        )

    def _stop_reason(self) -> str | None:
        """Why the trial is over, or None while it is not."""
        train_state = self._state.train_state
        if train_state["validation_goal_reached"] and train_state["test_goal_reached"]:
            return "targets reached"
        if not train_state["is_time_remaining"]:
            return "time budget used up"
        if train_state["training_complete"]:
            at_limit = self._max_steps is not None and self._state.global_step >= self._max_steps
            return "step limit" if at_limit else "submission ended training"
        return None

    def _finish(self) -> TrialOutcome:
        """Log the final time, save, and mark the trial as complete."""
        state = self._state
        clock = state.train_state["accumulated_submission_time"]
        reason = self._stop_reason()
        assert reason is not None
        outcome = outcome_of(self._workload, state.eval_results, state.global_step, clock, reason)
        if self._writes:
            self._metrics_logger.append_scalar_metrics(
                {"score": clock}, state.global_step, state.preemption_count
            )
            self._metrics_logger.finish()
            self._save()
        return outcome


def step_limit(settings: RunSettings, workload: spec.Workload) -> int | None:
    """Steps after which a trial ends: the smaller one of the two limits that may be given."""
    limits = []
    if settings.max_global_steps is not None:
        limits.append(settings.max_global_steps)
    if settings.step_budget is not None:
        limits.append(max(1, round(settings.step_budget * workload.step_hint)))
    return min(limits, default=None)
