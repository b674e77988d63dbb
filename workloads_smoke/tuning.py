"""Hyperparameter settings of a study: read a search space, draw its points.

A search space is a JSON file in the official format, one of

- an object of ranges, sampled by a scrambled and shifted Halton sequence::

      {"learning_rate": {"min": 1e-4, "max": 1e-2, "scaling": "log"},
       "dropout_rate": {"feasible_points": [0.0, 0.1]}}

- a list of points, taken as they are: `[{"learning_rate": 1e-3, "dropout_rate": 0.0}, ...]`.

The points are those of the official generator. It then shuffles them with an unseeded generator;
we keep the order of the sequence, so that trial 3 is the same point in every process, whatever
slice of the trials it runs, and 5 trials are the first 5 of 20.

Source: Bousquet et al. 2017, "Critical Hyper-Parameters: No Random, No Cry"; behaviour of
mlcommons/algorithmic-efficiency v0.6, `algoperf/halton.py`.
"""

import json
import keyword
import math
from collections import namedtuple
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workloads_smoke.errors import UserError

# Early points of a Halton sequence in large bases lie on a few lines.
_SKIPPED_POINTS = 100


def read_hyperparameters(path: Path, num_trials: int) -> list[Any]:
    """Read a search space and draw the setting of each trial.

    Args:
        path: JSON file, a search space as described above.
        num_trials: How many settings, >= 1. A list of points that is shorter gives all its points.

    Returns:
        One named tuple `Hyperparameters` per trial, in trial order.

    Raises:
        UserError: The file is missing, is not JSON or is not a search space; the message names
            the file and, where one is at fault, the hyperparameter.
    """
    if num_trials < 1:
        raise UserError(f"--num_tuning_trials must be at least 1, got {num_trials}")
    space = _read_json(path)
    if isinstance(space, dict):
        points = sample_ranges(space, num_trials, source=str(path))
    elif isinstance(space, list):
        points = _checked_points(space, path)[:num_trials]
    else:
        raise UserError(
            f"search space {path} must hold an object of ranges or a list of points, "
            f"got {json.dumps(space)[:40]}"
        )
    setting = namedtuple("Hyperparameters", list(points[0]))  # type: ignore[misc]
    return [setting(**point) for point in points]


def sample_ranges(
    space: Mapping[str, Any], num_trials: int, source: str = "search space"
) -> list[dict[str, Any]]:
    """Draw points from an object of ranges.

    Args:
        space: Range of each hyperparameter: `{"min": a, "max": b, "scaling": "linear" or "log"}` or
            `{"feasible_points": [...]}`.
        num_trials: How many points.
        source: Where the ranges come from, for error messages.

    Returns:
        One dict per point, hyperparameters in the order of `space`.

    Raises:
        UserError: A range is incomplete or empty.
    """
    _check_names(space, source)
    for name, values in space.items():
        _check_range(name, values, source)
    columns = halton_sequence(num_trials, len(space))
    return [
        {
            name: _scale(values, fraction)
            for (name, values), fraction in zip(space.items(), row, strict=True)
        }
        for row in zip(*columns, strict=True)
    ]


def halton_sequence(num_points: int, num_dimensions: int) -> list[list[float]]:
    """Scrambled, randomly shifted Halton sequence; the same at every call.

    Args:
        num_points: Points to return; the first 100 of the sequence are left out beforehand.
        num_dimensions: Coordinates of a point; the k-th last one has the (k+1)-th largest prime
            below 1000 as its base.

    Returns:
        One list of `num_points` numbers in [0, 1) per dimension.
    """
    limit = 1000
    while len(primes := _odd_primes_below(limit)) < num_dimensions + 1:
        limit += 1000
    bases = primes[-num_dimensions - 1 : -1]
    return [_van_der_corput(num_points, base) for base in bases]


def _van_der_corput(num_points: int, base: int) -> list[float]:
    """One coordinate: digits permuted by a generator seeded with the base, then a shift mod 1."""
    random = np.random.RandomState(base)
    nonzero_digits = list(range(1, base))
    random.shuffle(nonzero_digits)
    permuted = [0, *nonzero_digits]
    shift = random.random_sample()
    sequence = []
    for index in range(_SKIPPED_POINTS + 1, _SKIPPED_POINTS + num_points + 1):
        value, denominator = 0.0, base
        while index:
            index, digit = divmod(index, base)
            value += permuted[digit] / denominator
            denominator *= base
        sequence.append(math.fmod(value + shift, 1.0))
    return sequence


def _odd_primes_below(limit: int) -> list[int]:
    """Primes in [3, limit)."""
    is_prime = np.ones(limit, dtype=bool)
    for factor in range(3, math.isqrt(limit) + 1, 2):
        is_prime[factor * factor :: factor] = False
    return [number for number in range(3, limit, 2) if is_prime[number]]


def _scale(values: Mapping[str, Any], fraction: float) -> Any:
    """Place a number of [0, 1) in a range."""
    if "feasible_points" in values:
        points = values["feasible_points"]
        return points[math.floor(fraction * len(points))]
    low, high = values["min"], values["max"]
    if values["scaling"] == "log":
        return low * math.exp(fraction * math.log(high / low))
    return fraction * (high - low) + low


def _read_json(path: Path) -> Any:
    """Parse a file, turning each way to fail into one line that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read search space {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"search space {path} is not JSON: it is not UTF-8 text") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"search space {path} is not JSON: line {error.lineno}, column {error.colno}: "
            f"{error.msg}"
        ) from error


def _checked_points(space: Sequence[Any], path: Path) -> list[dict[str, Any]]:
    """Points that all have the hyperparameters of the first one."""
    if not space:
        raise UserError(f"search space {path} is an empty list; it needs at least one point")
    for number, point in enumerate(space, start=1):
        if not isinstance(point, dict):
            raise UserError(
                f"search space {path}: point {number} must be an object "
                f"of hyperparameters, got {json.dumps(point)[:40]}"
            )
    names = list(dict.fromkeys(name for point in space for name in point))
    _check_names(names, str(path))
    for number, point in enumerate(space, start=1):
        missing = [name for name in names if name not in point]
        if missing:
            raise UserError(
                f"search space {path}: point {number} lacks hyperparameter "
                f"{', '.join(map(repr, missing))}, which another point has"
            )
    return list(space)


def _check_names(names: Mapping[str, Any] | Sequence[str], source: str) -> None:
    """Hyperparameters become attributes, so their names must be identifiers."""
    if not names:
        raise UserError(f"search space {source} has no hyperparameters")
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise UserError(
                f"search space {source}: hyperparameter {name!r} must be a Python name "
                "that does not start with an underscore"
            )


def _check_range(name: str, values: Any, source: str) -> None:
    """One entry of an object of ranges."""
    problem = None
    if not isinstance(values, dict):
        problem = f"must be an object, got {json.dumps(values)[:40]}"
    elif "feasible_points" in values:
        if not isinstance(values["feasible_points"], list) or not values["feasible_points"]:
            problem = "needs a non-empty list as 'feasible_points'"
    elif missing := [key for key in ("min", "max", "scaling") if key not in values]:
        problem = f"lacks {', '.join(map(repr, missing))} (or a list 'feasible_points')"
    else:
        problem = _interval_problem(values)
    if problem is not None:
        raise UserError(f"search space {source}: hyperparameter {name!r} {problem}")


def _interval_problem(values: Mapping[str, Any]) -> str | None:
    """What is wrong with `{"min", "max", "scaling"}`, or None."""
    low, high = values["min"], values["max"]
    for key in ("min", "max"):
        if isinstance(values[key], bool) or not isinstance(values[key], int | float):
            return f"needs a number as {key!r}, got {json.dumps(values[key])[:40]}"
        if not math.isfinite(values[key]):  # which are no JSON, but Python reads them
            return f"needs a finite number as {key!r}, got {values[key]}"
    if values["scaling"] not in ("linear", "log"):
        return f"needs 'linear' or 'log' as 'scaling', got {values['scaling']!r}"
    if low > high:
        return f"needs 'min' <= 'max', got {low} > {high}"
    if values["scaling"] == "log" and low <= 0:
        return f"needs 'min' > 0 under log scaling, got {low}"
    return None
