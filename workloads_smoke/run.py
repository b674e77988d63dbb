r"""Run a submission on the tiny workloads as the official runner does on the real ones.

    python -m workloads_smoke.run --workload=mnist --submission_path=submission/submission.py \
        --tuning_search_space=tuning_search_space.json --num_tuning_trials=5 \
        --experiment_dir=results/shampoo --experiment_name=study_0 --rng_seed=0

`--help` explains every flag; logs.py describes the files. Under `torchrun` the processes train one
model together, over nccl with a GPU each and over gloo without.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from absl import app, flags, logging

from workloads_smoke import run_flags
from workloads_smoke.batch_sizes import batch_sizes
from workloads_smoke.distributed import (
    leave_process_group,
    on_rank_zero,
    pytorch_init,
    pytorch_setup,
    world_size,
)
from workloads_smoke.errors import UserError
from workloads_smoke.parallel import run_in_parallel
from workloads_smoke.plan import make_folders, plan_trials
from workloads_smoke.registry import load_workload
from workloads_smoke.settings import TrialRequest
from workloads_smoke.single_trial import (
    discard_unused,
    read_outcome,
    run_trial,
    warn_of_other_code,
    warn_of_other_settings,
)
from workloads_smoke.submissions import load_submission

FLAGS = flags.FLAGS

# Exit statuses of a shell for a process that these signals ended.
_INTERRUPTED, _TERMINATED = 130, 143


def main(argv: list[str]) -> None:
    """Run what the flags ask for; exit with status 1 and one line on a user's mistake."""
    if len(argv) > 1:
        _exit_with(f"error: unexpected argument {argv[1]!r}; flags start with --", 1)
    if not FLAGS["verbosity"].present:
        # Information by the line would tear the progress bar apart; --verbosity=0 brings it back.
        logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, _end_on_signal)
    try:
        _run()
    except UserError as error:
        _exit_with(f"error: {error}", 1)
    except KeyboardInterrupt:
        how = "goes on from the latest checkpoint"
        if not FLAGS.save_checkpoints:
            how = "keeps the trials that have ended; there are no checkpoints of this one"
        _exit_with(f"interrupted; --resume_last_run {how}", _INTERRUPTED)


def _run() -> None:
    """Check everything, then train."""
    settings = run_flags.read_settings(FLAGS)
    workloads = run_flags.read_workloads(FLAGS)
    if FLAGS.set_pytorch_max_split_size:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:256"
    use_pytorch_ddp, rank, _, _ = pytorch_setup()
    if FLAGS.parallel_trials > 1 and world_size() > 1:
        raise UserError("--parallel_trials > 1 and torchrun exclude each other; give one of them")
    submission = load_submission(settings.submission_path)
    pytorch_init(use_pytorch_ddp, rank)
    sizes = {
        name: batch_sizes(load_workload(name), name, submission, settings.use_submission_batch_size)
        for name in workloads
    }
    plan = on_rank_zero(lambda: plan_trials(FLAGS, settings, sizes))
    on_rank_zero(lambda: make_folders(plan, FLAGS.overwrite))
    warn_of_other_code(plan, submission)
    warn_of_other_settings([request for request in plan if read_outcome(request.folder)])
    waiting = [request for request in plan if read_outcome(request.folder) is None]
    try:
        if FLAGS.parallel_trials > 1:
            run_in_parallel(waiting, settings, FLAGS.parallel_trials)
        else:
            for request in waiting:
                run_trial(request, settings, submission)
    finally:
        # A trial that has logged nothing would hold the next command to its setting.
        if rank == 0:
            discard_unused([request.folder for request in waiting])
    if rank == 0:
        _print_summary(plan)
    if use_pytorch_ddp:
        leave_process_group()


def _print_summary(plan: list[TrialRequest]) -> None:
    """One line for each workload: its fastest trial."""
    for workload in dict.fromkeys(request.workload for request in plan):
        requests = [request for request in plan if request.workload == workload]
        outcomes = [(request, read_outcome(request.folder)) for request in requests]
        reached = [
            (outcome.seconds_to_target, request.number, outcome)
            for request, outcome in outcomes
            if outcome is not None and outcome.seconds_to_target is not None
        ]
        folder = requests[0].folder.parent
        if reached:
            seconds, number, best = min(reached, key=lambda entry: entry[:2])
            verdict = (
                f"{len(reached)} of {len(requests)} trials reached the target, trial {number} first: "
                f"{best.steps_to_target} steps, {seconds:.1f} s"
            )
        else:
            verdict = f"none of {len(requests)} trials reached the target"
        sys.stdout.write(f"{workload}: {verdict}; logs in {folder}\n")


def _end_on_signal(signum: int, frame: FrameType | None) -> NoReturn:
    """Leave through the same doors as any other end, so that files are closed."""
    raise SystemExit(_TERMINATED)


def _exit_with(message: str, status: int) -> NoReturn:
    """Say why, once for all ranks, and leave."""
    if pytorch_setup()[1] == 0:
        sys.stderr.write(message + "\n")
    sys.exit(status)


def command_line() -> NoReturn:
    """Register the flags, parse them and run; leaves the process."""
    run_flags.define()
    flags.adopt_module_key_flags(run_flags)
    app.run(main)


if __name__ == "__main__":
    command_line()
