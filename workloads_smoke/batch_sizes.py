"""Which batch sizes a trial trains and evaluates with."""

from absl import logging

from workloads_smoke.distributed import world_size
from workloads_smoke.errors import UserError
from workloads_smoke.spec import Workload
from workloads_smoke.submissions import Submission

# A variant such as `imagenet_resnet_silu` takes its base workload's batch size.
_BASE_WORKLOADS = (
    "criteo1tb",
    "fastmri",
    "imagenet_resnet",
    "imagenet_vit",
    "librispeech_conformer",
    "librispeech_deepspeech",
    "ogbg",
    "wmt",
)


def base_workload_name(workload_name: str) -> str:
    """The official workload that a variant belongs to, or the name itself."""
    return next((base for base in _BASE_WORKLOADS if base in workload_name), workload_name)


def batch_sizes(
    workload: Workload, workload_name: str, submission: Submission, use_submission_batch_size: bool
) -> tuple[int, int]:
    """Global batch sizes for training and for evaluation.

    Args:
        workload: The workload; `smoke_batch_size` is the size its step hint and targets refer to.
        workload_name: Official name, what the submission's functions are asked with.
        submission: Asked in any case, so that a run shows what the official one would trip over.
        use_submission_batch_size: Whether its answers hold.

    Returns:
        Training and evaluation batch size over all processes.

    Raises:
        UserError: A size does not divide among the processes, or the submission knows no size for
            this workload although its sizes were asked for.
    """
    submitted = _submitted_batch_size(submission, workload_name, use_submission_batch_size)
    train: int | None = getattr(workload, "smoke_batch_size", submitted)
    evaluation = workload.eval_batch_size
    if use_submission_batch_size:
        train = submitted
        if submission.get_eval_batch_size is not None:
            evaluation = submission.get_eval_batch_size(workload_name)
    for purpose, size in (("", train), ("eval ", evaluation)):
        if not isinstance(size, int) or size < 1 or size % world_size():
            raise UserError(
                f"the global {purpose}batch size of {workload_name} must be a positive multiple of "
                f"the number of processes ({world_size()}), got {size}"
            )
    assert train is not None
    return train, evaluation


def _submitted_batch_size(submission: Submission, workload_name: str, needed: bool) -> int | None:
    """The submission's own answer, by the workload's name and then by its base's name."""
    try:
        try:
            return submission.get_batch_size(workload_name)
        except ValueError:
            return submission.get_batch_size(base_workload_name(workload_name))
    # The latter is what a dict of sizes raises; officially that ends the run, by whichever name.
    except (ValueError, KeyError) as error:
        why = f"KeyError {error}" if isinstance(error, KeyError) else str(error)
        if needed:
            raise UserError(
                f"submission {submission.path}: get_batch_size knows no {workload_name!r} "
                f"({why}); leave out --use_submission_batch_size"
            ) from error
        logging.warning("get_batch_size of %s: %s", submission.path, why)
        return None
