"""Endless batches of one split, the same on any number of processes, cheap to fast-forward.

Batch k is a function of (seed, split, k) alone. Hence a resumed run skips to its batch without
making those before it, and each of R processes takes its R-th part of the same global batch.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

Batch = dict[str, Any]
Gather = Callable[[torch.Tensor], Batch]
Augment = Callable[[Batch, torch.Generator], Batch]


def seed_words(rng: Any) -> list[int]:
    """Turn an official RandomState (an int, a pair of ints or an array) into seed words >= 0.

    Args:
        rng: Whatever the runner's splitting of random states gives.
    """
    return [int(word) % 2**32 for word in np.asarray(rng).reshape(-1)]


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to each tensor of a batch entry, which may be a tuple of tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    mapped = [map_tensors(function, item) for item in value]
    return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)


def gather_rows(arrays: Mapping[str, Any]) -> Gather:
    """Return a function that picks examples by index out of tensors with one row an example."""

    def gather(indices: torch.Tensor) -> Batch:
        return {
            name: map_tensors(lambda tensor: tensor[indices], value)
            for name, value in arrays.items()
        }

    return gather


def mask_absent(batch: Batch, present: torch.Tensor) -> Batch:
    """Give the examples that only fill up a batch weight zero.

    Args:
        batch: A batch with or without 'weights'.
        present: Shape (batch,), false for the examples that fill up.
    """
    weights = batch.get("weights")
    if weights is None:
        return batch | {"weights": present.float()}
    shape = (-1, *(1,) * (weights.ndim - 1))
    return batch | {"weights": weights * present.to(weights.dtype).reshape(shape)}


class InputQueue(Iterator[Batch]):
    """Iterator over the batches of one split, as `Workload._build_input_queue` returns it.

    A training queue runs through one fresh permutation of the examples after the other, across
    batch borders. An evaluation queue goes through the examples in a fixed order, fills its last
    batch up with examples of weight zero, and starts again.
    """

    def __init__(
        self,
        gather: Gather,
        num_examples: int,
        global_batch_size: int,
        *,
        seed: list[int],
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        augment: Augment | None = None,
        num_batches: int | None = None,
    ) -> None:
        """Start before the first batch.

        Args:
            gather: Returns the batch of a tensor of example indices.
            num_examples: Size of the split.
            global_batch_size: Batch size over all processes; a multiple of `world_size`.
            seed: Seed words of order and augmentation.
            train: Shuffle and drop nothing, or evaluate in order and fill up.
            rank: This process.
            world_size: Number of processes.
            device: Where batches are put.
            augment: Random change of a global batch, applied before it is cut among processes.
            num_batches: Stop after that many batches; None goes on for ever.

        Raises:
            ValueError: If the batch size is not positive or does not divide among processes.
        """
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size must be a positive multiple of the number of processes "
                f"({world_size}), got {global_batch_size}."
            )
        self._gather = gather
        self._num_examples = num_examples
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._train = train
        per_process = global_batch_size // world_size
        self._rows = slice(rank * per_process, (rank + 1) * per_process)
        self._device = torch.device(device)
        self._augment = augment
        self._num_batches = num_batches
        self._position = 0
        self._permutations: dict[int, torch.Tensor] = {}

    @property
    def position(self) -> int:
        """Number of batches served or skipped so far."""
        return self._position

    def skip(self, num_batches: int) -> None:
        """Move on by that many batches without making them (to resume a run)."""
        if num_batches < 0:
            raise ValueError(f"num_batches must be >= 0, got {num_batches}.")
        self._position += num_batches

    def __next__(self) -> Batch:
        if self._num_batches is not None and self._position >= self._num_batches:
            raise StopIteration
        indices = self._train_indices() if self._train else self._eval_indices()
        if self._augment is None:
            # Cutting before gathering spares each process the others' examples.
            indices = indices[self._rows]
            batch = self._gather(indices.clamp(min=0))
        else:
            generator = torch.Generator().manual_seed(self._batch_seed())
            batch = self._augment(self._gather(indices.clamp(min=0)), generator)
            indices = indices[self._rows]
            batch = {k: map_tensors(lambda t: t[self._rows], v) for k, v in batch.items()}
        if not self._train:
            batch = mask_absent(batch, indices >= 0)
        self._position += 1
        return {k: map_tensors(lambda t: t.to(self._device), v) for k, v in batch.items()}

    def _batch_seed(self) -> int:
        words = np.random.SeedSequence([*self._seed, 1, self._position]).generate_state(1)
        return int(words[0])

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            # Only neighbouring epochs meet in a batch (more, where a batch exceeds an epoch).
            keep = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            generator = np.random.default_rng([*self._seed, 0, epoch])
            keep[epoch] = torch.from_numpy(generator.permutation(self._num_examples))
            self._permutations = keep
        return self._permutations[epoch]

    def _train_indices(self) -> torch.Tensor:
        start = self._position * self._global_batch_size
        end = start + self._global_batch_size
        size = self._num_examples
        parts = []
        for epoch in range(start // size, (end - 1) // size + 1):
            low, high = max(start - epoch * size, 0), min(end - epoch * size, size)
            parts.append(self._permutation(epoch)[low:high])
        return torch.cat(parts)

    def _eval_indices(self) -> torch.Tensor:
        """Indices of the next batch in order; -1 where the examples have run out."""
        batches_a_pass = -(-self._num_examples // self._global_batch_size)
        start = self._position % batches_a_pass * self._global_batch_size
        indices = torch.arange(start, start + self._global_batch_size)
        return torch.where(indices < self._num_examples, indices, -1)
