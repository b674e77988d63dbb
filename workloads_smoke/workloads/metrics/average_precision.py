"""Mean average precision over tasks, as ogbg measures it."""

import numpy as np


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the precision-recall steps of one task.

    The sum over distinct scores, from the highest down, of precision times gain of recall.
    Examples of equal score enter together.

    Args:
        labels: 0 or 1, at least one 1.
        scores: Any real numbers.
    """
    order = np.argsort(-scores, kind="stable")
    labels, scores = labels[order], scores[order]
    last_of_score = np.append(np.diff(scores) != 0, True)
    found = np.cumsum(labels)[last_of_score]
    precision = found / (np.flatnonzero(last_of_score) + 1)
    gains = np.diff(found, prepend=0) / found[-1]
    return float((precision * gains).sum())


def mean_average_precision(labels: np.ndarray, scores: np.ndarray, present: np.ndarray) -> float:
    """Return the mean over the tasks that have both a positive and a negative label.

    Args:
        labels: Shape (examples, tasks); anything where absent.
        scores: Same shape.
        present: Same shape, whether the label counts.

    Returns:
        The mean, or NaN where no task has labels of both kinds, or a score is not finite.
    """
    if not np.isfinite(scores[present.astype(bool)]).all():
        return float("nan")  # NaN has no place in an order; officially an error
    values = []
    for task in range(labels.shape[1]):
        kept = present[:, task].astype(bool)
        task_labels = labels[kept, task]
        if (task_labels == 0).any() and (task_labels == 1).any():
            values.append(average_precision(task_labels, scores[kept, task]))
    return float(np.mean(values)) if values else float("nan")
