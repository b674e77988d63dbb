"""How long the steps of a trial took."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from workloads_smoke.scoring.logs import SECONDS, STEP, Trial

# Written by our runner only (`workloads_smoke.logs`); the official one times no single step.
STEP_TIMES_FILE = "step_times.csv"

Array = npt.NDArray[np.float64]


def step_times(trial: Trial) -> tuple[Array, Array]:
    """Durations of steps, with the number of steps that each stands for.

    Args:
        trial: with ``step_times.csv`` (columns ``global_step`` and ``seconds``) in its folder,
            every step counts; else the steps between two evaluations share their mean.

    Returns:
        Seconds per step and number of steps, of equal length. The first step, and in the means
        every step before the first evaluation, is left out: start-up is part of it.
    """
    path = None if trial.folder is None else trial.folder / STEP_TIMES_FILE
    if path is not None and path.exists():
        timed = pd.read_csv(path)
        seconds = timed.loc[timed[STEP] > 1, "seconds"].to_numpy(dtype=float)
        return seconds, np.ones_like(seconds)
    steps = np.diff(trial.evaluations[STEP].to_numpy(dtype=float))
    seconds = np.diff(trial.evaluations[SECONDS].to_numpy(dtype=float))
    # A resumed official run may repeat a step.
    kept = steps > 0
    return seconds[kept] / steps[kept], steps[kept]


def times_every_step(trial: Trial) -> bool:
    """Whether each step of the trial was timed, rather than stretches between evaluations."""
    return trial.folder is not None and (trial.folder / STEP_TIMES_FILE).exists()
