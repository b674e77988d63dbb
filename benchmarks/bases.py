"""Bases of side 1024 over a run: one iteration a refresh, beside an eigendecomposition.

A language model of two hidden layers of 1024 units on the text of the smoke workload finewebedu_lm: the
models of `benchmarks.training` have factors of side 128 at most, the benchmark's own of 1024. Runs of one
seed have weights and batches in common. Minutes a run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.courses import schedule
from benchmarks.flags import add_out, count, out_folder
from benchmarks.tables import publish
from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    EighSolver,
    OrthogonalIterationSolver,
    StaggeredRefresh,
)
from shampoo_core.preconditioners.eigenvalue_corrected import EigenvalueCorrected
from shampoo_core.refresh import whole_stacks
from shampoo_core.solvers import BasisSolver, off_diagonal_ratio
from workloads_smoke.registry import load_workload

WIDTH = 1024
CONTEXT = 8
"""Tokens that the next one is told from."""
EMBEDDING = 64
NUM_TOKENS = 200_000
HELD_OUT = 20_000
"""Positions at the end of the text, of which `NUM_VALIDATION` are looked at."""
NUM_VALIDATION = 2048
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
BETAS = (0.9, 0.99)
EVERY = 50
"""Steps from one look at loss and bases to the next; the losses of as many are averaged."""
INTERVALS = (20, 50)
SOLVERS: dict[str, BasisSolver] = {
    "eigendecomposition": EighSolver(),
    "one iteration": OrthogonalIterationSolver(max_iterations=1),
}


class Model(nn.Module):
    """Embeddings of the context, two hidden layers beside each other's sum, logits of the next token."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, EMBEDDING)
        self.first = nn.Linear(CONTEXT * EMBEDDING, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, num_tokens)

    def forward(self, contexts: Tensor) -> Tensor:
        """(examples, `CONTEXT`) tokens to (examples, tokens) logits."""
        hidden = functional.relu(self.first(self.embedding(contexts).flatten(1)))
        logits: Tensor = self.head(hidden + functional.relu(self.second(hidden)))
        return logits

    def matrices(self) -> list[Tensor]:
        """What is preconditioned by factors."""
        return [self.first.weight, self.second.weight, self.head.weight]


class Text(NamedTuple):
    """A sequence of tokens, and where examples of it begin."""

    tokens: Tensor
    num_training: int

    @classmethod
    def load(cls) -> Text:
        """That of the smoke workload."""
        queue = load_workload("finewebedu_lm")._build_input_queue([0, 1], "train", "", 64)
        parts: list[Tensor] = []
        while sum(map(len, parts)) < NUM_TOKENS:
            parts.append(next(queue)["inputs"].flatten())
        tokens = torch.cat(parts)
        return cls(tokens, len(tokens) - CONTEXT - HELD_OUT)

    def loss(self, model: Model, places: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens behind the contexts that begin at some places."""
        contexts = self.tokens[places[:, None] + torch.arange(CONTEXT)]
        return functional.cross_entropy(model(contexts), self.tokens[places + CONTEXT])


@dataclass
class Run:
    """What is kept of a run, a number for every `EVERY` steps."""

    training: list[float]
    validation: list[float]
    ratios: list[float]
    """Largest relative off-diagonal norm of a factor in its basis."""


def train(text: Text, solver: BasisSolver, interval: int, num_steps: int, seed: int) -> Run:
    """Train one model.

    Args:
        text: To learn.
        solver: Of bases.
        interval: Steps from one refresh of a factor to its next, staggered.
        num_steps: Of the run and its schedule.
        seed: Of weights and batches.
    """
    torch.manual_seed(seed)
    model = Model(int(text.tokens.max()) + 1)
    others = [p for p in model.parameters() if not any(p is matrix for matrix in model.matrices())]
    optimizer = DistributedShampoo(
        [
            {
                "params": model.matrices(),
                "preconditioner": EigenvalueCorrectedConfig(solver=solver),
            },
            {"params": others, "preconditioner": AdamConfig()},
        ],
        betas=BETAS,
        max_block_size=WIDTH,
        refresh=StaggeredRefresh(interval),
    )
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.randint(HELD_OUT, (NUM_VALIDATION,), generator=generator) + text.num_training
    run, losses = Run([], [], []), []
    for step in range(1, num_steps + 1):
        places = torch.randint(text.num_training, (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        loss = text.loss(model, places)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step / num_steps)
        optimizer.step()
        losses.append(loss.item())
        if step % EVERY == 0:
            run.training.append(statistics.mean(losses[-EVERY:]))
            with torch.no_grad():
                run.validation.append(text.loss(model, held_out).item())
                run.ratios.append(largest_ratio(optimizer))
    return run


def largest_ratio(optimizer: DistributedShampoo) -> float:
    """How far the worst basis is from diagonalising its factor."""
    ratios = []
    for engine in optimizer._engines[0]:
        method = engine.preconditioner
        assert isinstance(method, EigenvalueCorrected)
        slices = whole_stacks(tuple(method.factors.sizes))
        for factors, where in zip(method.factors.corrected(slices), slices, strict=True):
            ratios.append(off_diagonal_ratio(factors, method.bases.read_slice(where)).max())
    return torch.stack(ratios).max().item()


def rows(num_steps: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row per solver and interval; means over seeds."""
    text = Text.load()
    found = []
    for interval in INTERVALS:
        for name, solver in SOLVERS.items():
            runs = [train(text, solver, interval, num_steps, seed) for seed in seeds]
            found.append(
                {
                    "basis": name,
                    "interval": interval,
                    "seeds": len(seeds),
                    "training": statistics.mean(run.training[-1] for run in runs),
                    "validation": statistics.mean(run.validation[-1] for run in runs),
                    "ratio": statistics.mean(statistics.mean(run.ratios) for run in runs),
                    "last_ratio": statistics.mean(run.ratios[-1] for run in runs),
                }
            )
    return found


COLUMNS = {
    "basis": "basis by",
    "interval": "interval",
    "seeds": "seeds",
    "training": "training loss",
    "validation": "validation loss",
    "ratio": "off-diagonal",
    "last_ratio": "at the end",
}


def run(num_steps: int, seeds: Sequence[int], folder: Path) -> list[Path]:
    """Print and write the table; return the files written."""
    torch.set_num_threads(1)
    return publish(
        f"Bases: of side {WIDTH}, {num_steps} steps of a language model, refreshes staggered",
        rows(num_steps, seeds),
        COLUMNS,
        folder,
        "off-diagonal: relative norm of what the worst basis leaves of its factor beside the diagonal, a "
        f"mean over looks every {EVERY} steps.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=count, default=800, help=f"at least {EVERY}, default 800")
    parser.add_argument("--seeds", type=count, default=1)
    add_out(parser)
    options = parser.parse_args(arguments)
    if options.steps < EVERY:
        parser.error(f"argument --steps: must be at least {EVERY}, got {options.steps}")
    options.workload = None
    run(options.steps, range(options.seeds), out_folder(options))


if __name__ == "__main__":
    main()
