"""Performance profiles, the AlgoPerf score and speed-ups.

Source: Dolan and More 2002 (arXiv cs/0102001); Dahl et al. 2023 (arXiv 2306.07179), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

R_MAX = 4.0
# The official scorer samples profiles at this many equally spaced points of [1, r_max].
NUM_POINTS = 100


def performance_ratios(times: pd.DataFrame, r_max: float = R_MAX) -> pd.DataFrame:
    """Each time divided by the fastest of its workload.

    Args:
        times: steps or seconds to target, a row a submission and a column a workload; infinite
            or NaN where the target was not reached.
        r_max: a time above ``r_max`` times the fastest counts as not reached.

    Returns:
        Ratios >= 1 of the same shape, infinite where not reached.
    """
    if not 1 < r_max < np.inf:
        raise ValueError(f"a finite r_max > 1 is needed, got r_max={r_max}")
    known = times.astype(float).fillna(np.inf)
    ratios = known.div(known.min(axis=0), axis=1)
    # Where nobody reached the target, inf / inf is NaN, which is not below anything either.
    return ratios.where(ratios <= r_max, np.inf)


def performance_profiles(
    times: pd.DataFrame, r_max: float = R_MAX, num_points: int = NUM_POINTS
) -> pd.DataFrame:
    """Share of workloads that a submission finishes within tau times the fastest.

    Args:
        times: as in `performance_ratios`; every column counts in the share.
        r_max: largest tau.
        num_points: equally spaced points of [1, r_max], both ends included.

    Returns:
        A row a submission, a column for each tau.
    """
    if times.shape[1] == 0:
        raise ValueError("a performance profile needs at least one workload, got none")
    ratios = performance_ratios(times, r_max).to_numpy()
    taus = np.linspace(1.0, r_max, num_points)
    shares = (ratios[:, :, None] <= taus).mean(axis=1)
    return pd.DataFrame(shares, index=times.index, columns=pd.Index(taus, name="tau"))


def algoperf_scores(profiles: pd.DataFrame) -> pd.Series:
    """Area under each profile by the trapezoid rule, divided by its width, in [0, 1]."""
    taus = profiles.columns.to_numpy(dtype=float)
    area = np.trapezoid(profiles.to_numpy(dtype=float), x=taus, axis=1)
    return pd.Series(area / (taus[-1] - taus[0]), index=profiles.index, name="score")


def speedups(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """How many times faster each submission is than a reference, per workload.

    Args:
        times: as in `performance_ratios`.
        reference: a row of ``times``.

    Returns:
        ``t_reference / t_submission``, NaN where either did not reach the target.
    """
    if reference not in times.index:
        raise ValueError(
            f"reference {reference!r} is not a submission; known are {', '.join(times.index)}"
        )
    reached = times.astype(float).replace(np.inf, np.nan)
    return reached.rdiv(reached.loc[reference], axis=1)


def geometric_means(values: pd.DataFrame) -> pd.Series:
    """Geometric mean of each row, NaN entries left out; NaN where nothing is left."""
    return pd.Series(np.exp(np.log(values).mean(axis=1)), index=values.index, name="geometric_mean")


def within_budget(times: pd.DataFrame, max_seconds: Mapping[str, float]) -> pd.DataFrame:
    """Replace every miss by the workload's budget plus one second.

    The official speed-ups count misses so, which keeps every workload in the geometric mean and
    gives a lower bound on how far behind a miss is.

    Args:
        times: seconds to target as in `performance_ratios`.
        max_seconds: runtime budget by workload.
    """
    filled = times.astype(float).replace(np.inf, np.nan)
    return filled.fillna({name: max_seconds[name] + 1.0 for name in filled.columns})
