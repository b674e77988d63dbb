"""Generated click records in the shape of Criteo's: 13 numbers, 26 Zipf-distributed ids, a click.

Each id of each field has an effect of its own on the log-odds of a click, and the ids of pairs of
fields have a joint effect through hidden factors, which a dot product of embeddings can express.
The numbers act through bends. Clicks are drawn from the resulting probabilities, so even the true
model has a loss well above zero.

A record is a function of its number, computed when asked for. So the training split can be longer
than a run, as in the benchmark, where no record is seen twice.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from workloads_smoke.data.queue import Batch, Gather

NUM_DENSE = 13
NUM_SPARSE = 26
# Ids per field: few for some fields, many for others, as in the real data.
FIELD_SIZES = tuple(int(16 * 1.29**field) for field in range(NUM_SPARSE))
# Rows of a table for all fields, a multiple of the number of its chunks.
VOCABULARY_SIZE = 45_056
# Records of each split, numbered from the first.
SPLIT_RECORDS = {
    "train": (0, 1_000_000),
    "eval_train": (0, 8_000),
    "validation": (1_000_000, 8_000),
    "test": (1_008_000, 8_000),
}
_ZIPF_EXPONENT = 1.1
_NUM_FACTORS = 4
_SEED = 70240


@dataclass(frozen=True)
class TrueModel:
    """Effects that decide the clicks.

    Attributes:
        bends: Directions of the numbers' effects, shape (13, bends).
        bend_offsets: Where each bend lies.
        bend_effects: Its effect on the log-odds.
        id_effects: Effect of each row of the table of all fields' ids.
        id_factors: Hidden factors of each row, shape (rows, factors).
        field_starts: First row of each field.
        cumulative: Cumulative probabilities of the ids of each field.
    """

    bends: np.ndarray
    bend_offsets: np.ndarray
    bend_effects: np.ndarray
    id_effects: np.ndarray
    id_factors: np.ndarray
    field_starts: np.ndarray
    cumulative: tuple[np.ndarray, ...]

    def log_odds(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the log-odds of a click of records with these numbers and rows of ids."""
        odds = np.tanh(numbers @ self.bends - self.bend_offsets) @ self.bend_effects
        odds += self.id_effects[rows].sum(axis=1)
        factors = self.id_factors[rows]
        # Sum over pairs of fields of the products of their factors (Rendle 2010, equation 5).
        pairs = (factors.sum(axis=1) ** 2 - (factors**2).sum(axis=1)).sum(axis=1)
        result: np.ndarray = odds + 0.5 * pairs - 2.5
        return result


@functools.cache
def true_model() -> TrueModel:
    """Return the effects, the same for all splits and seeds."""
    rng = np.random.default_rng(_SEED)
    rows = sum(FIELD_SIZES)
    weights = [np.arange(1, size + 1) ** -_ZIPF_EXPONENT for size in FIELD_SIZES]
    return TrueModel(
        bends=rng.normal(size=(NUM_DENSE, 8)) * 0.6,
        bend_offsets=rng.normal(size=8) * 0.5,
        bend_effects=rng.normal(size=8) * 0.7,
        id_effects=rng.normal(size=rows) * 0.25,
        id_factors=rng.normal(size=(rows, _NUM_FACTORS)) * 0.22,
        field_starts=np.cumsum((0, *FIELD_SIZES[:-1])),
        cumulative=tuple(np.cumsum(w / w.sum()) for w in weights),
    )


def uniforms(numbers: np.ndarray, columns: int) -> np.ndarray:
    """Return numbers in [0, 1), a fixed function of record number and column.

    The mixing function is splitmix64 (Steele et al. 2014), whose outputs on successive inputs pass
    tests of randomness.

    Args:
        numbers: Record numbers, shape (records,).
        columns: How many to draw for each record.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    counters = numbers.astype(np.uint64)[:, None] * np.uint64(columns) + np.arange(
        1, columns + 1, dtype=np.uint64
    )
    mixed: np.ndarray = (counters + np.uint64(_SEED)) * golden
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    result: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def records(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs, shape (records, 39), and clicks, shape (records, 1), of numbered records.

    Inputs are 13 numbers and 26 rows of the table as floats, as the benchmark has them.
    """
    model = true_model()
    drawn = uniforms(numbers, NUM_DENSE + NUM_SPARSE + 1)
    dense = np.log1p(-np.log1p(-drawn[:, :NUM_DENSE]))
    rows = np.empty((len(numbers), NUM_SPARSE), dtype=np.int64)
    for field, cumulative in enumerate(model.cumulative):
        ranks = np.searchsorted(cumulative, drawn[:, NUM_DENSE + field])
        rows[:, field] = model.field_starts[field] + np.minimum(ranks, len(cumulative) - 1)
    probabilities = 1 / (1 + np.exp(-model.log_odds(dense, rows)))
    clicks = drawn[:, -1:] < probabilities[:, None]
    return np.concatenate([dense, rows], axis=1).astype(np.float32), clicks.astype(np.float32)


def gather_clicks(split: str) -> tuple[Gather, int]:
    """Return a function that makes a split's records by index, and how many there are."""
    first, count = SPLIT_RECORDS[split]

    def gather(indices: torch.Tensor) -> Batch:
        inputs, clicks = records(indices.numpy() + first)
        return {
            "inputs": torch.from_numpy(inputs),
            "targets": torch.from_numpy(clicks),
            "weights": torch.ones(len(clicks)),
        }

    return gather, count
