"""From runs to targets: search, repeat the best points on seeds, take the median.

The benchmark's recipe (Dahl et al. 2023, section 4.3, and its documentation): tune each standard
algorithm, repeat the best points on further seeds with the schedule's length at three quarters of
the step hint, and take the median of what they reach. The remaining quarter is what makes a
target reachable for a submission that trains to the end of the hint.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from workloads_smoke.atomic_files import write_text
from workloads_smoke.registry import load_workload
from workloads_smoke.target_setting.algorithms import ALGORITHMS, Point, search_points
from workloads_smoke.target_setting.training import Curve, Run, train
from workloads_smoke.workloads.base import SmokeWorkload

HORIZON = 0.75
EASING = 5e-7
"""Of targets, which have to be exceeded."""
NUM_EVALUATIONS = 10
# A learning rate this much below the best one is a poor one.
POOR_LEARNING_RATE_FACTOR = 1 / 30


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        points: Points per algorithm, each on seed 0.
        finalists: Best points over all algorithms that are repeated.
        seeds: Seeds of each finalist, seed 0 included.
    """

    points: int
    finalists: int
    seeds: int


@dataclass(frozen=True)
class Result:
    """A run and its curve."""

    run: Run
    curve: Curve

    def best(self, larger_is_better: bool, split: str) -> float:
        """Best value of the target metric on a split, or the worst possible one."""
        values: list[float] = getattr(self.curve, split)
        sign = 1 if larger_is_better else -1
        return max(values, key=lambda value: sign * value, default=-sign * float("inf"))


class TargetSetter:
    """Finds one workload's targets; finished runs are kept in a folder and not run again.

    Runs are known by setting, workload and the text its data are made of. Delete the folder after a
    change of a model or data generator, which these do not tell.
    """

    def __init__(self, name: str, runs_dir: Path, report: Callable[[str], None]) -> None:
        """Build the workload to find targets for.

        Args:
            name: The workload.
            runs_dir: Where runs are kept, one JSON file each.
            report: Called with a line of text after each run.
        """
        self.name = name
        self.workload = load_workload(name)
        self._folder = runs_dir / name
        self._report = report

    @property
    def larger_is_better(self) -> bool:
        """Direction of the target metric."""
        return self.workload.facts.larger_is_better

    def find(self, effort: Effort) -> dict[str, Any]:
        """Return the workload's entry of targets.json."""
        results = self._search(effort.points)
        finalists = sorted(results, key=self._rank)[: effort.finalists]
        repeats = [[self._repeat(f, seed) for seed in range(effort.seeds)] for f in finalists]
        winner = min(repeats, key=lambda runs: self._signed(self._median(runs, "validation")))
        targets = {
            f"{split}_target_value": eased(self._median(winner, split), self.larger_is_better)
            for split in ("validation", "test")
        }
        if not all(map(math.isfinite, targets.values())):
            raise RuntimeError(f"{self.name}: most repeats diverged; try more points or finalists.")
        return {
            "metric": self.workload.target_metric_name,
            **targets,
            "algorithm": winner[0].run.algorithm,
            "point": winner[0].run.point.as_dict(),
            "effort": asdict(effort),
            "num_steps": winner[0].run.num_steps,
            "batch_size": self.workload.smoke_batch_size,
            "step_hint": self.workload.step_hint,
            "runs": [self._summary(result) for result in [*results, *chain.from_iterable(repeats)]],
            "check": self._check(results, targets["validation_target_value"]),
        }

    def _search(self, count: int) -> list[Result]:
        horizon = int(HORIZON * self.workload.step_hint)
        return [
            self._train(Run(algorithm, point, 0, horizon, NUM_EVALUATIONS))
            for algorithm in ALGORITHMS
            for point in search_points(algorithm, count, self.workload.loss_type)
        ]

    def _repeat(self, result: Result, seed: int) -> Result:
        return self._train(replace(result.run, seed=seed))

    def _check(self, results: list[Result], target: float) -> dict[str, Any]:
        """Train NAdamW over the whole step hint, well tuned and with a poor learning rate.

        Not used for the target: it shows whether the target separates the two. The few points of the
        search are far apart, so that the best one's learning rate is tuned once more around it.
        """
        best = min((r for r in results if r.run.algorithm == "nadamw"), key=self._rank).run.point

        def trained(point: Point, seed: int) -> Result:
            steps = self.workload.step_hint
            return self._train(Run("nadamw", point, seed, steps, 2 * NUM_EVALUATIONS))

        def reached(result: Result) -> float | None:
            marks = zip(result.curve.steps, result.curve.validation, strict=True)
            hits = (s for s, value in marks if self._signed(value) < self._signed(target))
            return next((s / result.run.num_steps for s in hits), None)

        around = (scaled(best, factor) for factor in (0.5, 1.0, 2.0))
        tuned = min((trained(point, 0) for point in around), key=self._rank).run.point
        return {
            "nadamw_tuned_learning_rate": tuned.learning_rate,
            "nadamw_tuned_reaches_at": [reached(trained(tuned, seed)) for seed in range(3)],
            "nadamw_poor_learning_rate_reaches_at": reached(
                trained(scaled(tuned, POOR_LEARNING_RATE_FACTOR), 0)
            ),
        }

    def _train(self, run: Run) -> Result:
        file = self._folder / f"{run.algorithm}-{self._key(run)}.json"
        if file.exists():
            return Result(run, Curve(**json.loads(file.read_text(encoding="utf-8"))["curve"]))
        result = Result(run, train(fresh(self.workload), run))
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"run": asdict(run), "curve": asdict(result.curve)}))
        best = result.best(self.larger_is_better, "validation")
        self._report(
            f"{self.name} {run.algorithm} lr {run.point.learning_rate:g} seed {run.seed} "
            f"steps {run.num_steps}: {best:.5g} in {result.curve.seconds:.0f} s"
        )
        return result

    def _key(self, run: Run) -> str:
        """Return a hash of the run and of the workload's facts, the same in every process."""
        facts = {
            "facts": str(self.workload.facts),
            "batch": self.workload.smoke_batch_size,
            "text": self.workload.text_fingerprint,
        }
        text = json.dumps(asdict(run) | facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _rank(self, result: Result) -> float:
        return self._signed(result.best(self.larger_is_better, "validation"))

    def _signed(self, value: float) -> float:
        """Return a number that is smaller the better the value is."""
        return -value if self.larger_is_better else value

    def _median(self, results: list[Result], split: str) -> float:
        return statistics.median(r.best(self.larger_is_better, split) for r in results)

    def _summary(self, result: Result) -> dict[str, Any]:
        return {
            "algorithm": result.run.algorithm,
            **result.run.point.as_dict(),
            "seed": result.run.seed,
            "validation": _finite(result.best(self.larger_is_better, "validation")),
            "test": _finite(result.best(self.larger_is_better, "test")),
        }


def eased(value: float, larger_is_better: bool) -> float:
    """Return what is half a unit of the sixth decimal easier: a target has to be exceeded.

    So the run that set it reaches it, also where its value was kept to six decimals.
    """
    return value - EASING if larger_is_better else value + EASING


def scaled(point: Point, factor: float) -> Point:
    """Return the point with another learning rate."""
    return replace(point, learning_rate=point.learning_rate * factor)


def fresh(workload: SmokeWorkload) -> SmokeWorkload:
    """Return a new workload of the same kind: evaluation queues belong to one run."""
    return type(workload)()


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
