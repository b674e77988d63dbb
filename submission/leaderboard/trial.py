"""Import an entry from the leaderboard's layout and train a few steps: a program of its own.

usage: python -I -B trial.py ROOT MODULE

`ROOT` is what the benchmark's runner has on its path, `MODULE` the dotted name that it makes of
`--submission_path`. Nothing but torch may be needed, and nothing of this repository may be found: the
folder has to work where it is all there is. Every point of the folder's tuning search space is
tried, or the built-in setting if it has none. Ends with an error where something is amiss.
"""

from __future__ import annotations

import enum
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

REPOSITORY_PACKAGES = ("shampoo_core", "submission", "workloads_smoke", "algoperf")
STEPS = 4
NUM_EXAMPLES, NUM_FEATURES, NUM_WORDS, NUM_CLASSES = 16, 6, 32, 3


class ForwardPassMode(enum.Enum):
    """The harness's word for what a forward pass is for."""

    TRAIN = 0
    EVAL = 1


class LossType(enum.Enum):
    """The harness's word for the loss; its module is where a submission finds the modes."""

    SOFTMAX_CROSS_ENTROPY = 0


class Model(nn.Module):
    """Words and images to logits: an embedding, a convolution, a batch norm and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, NUM_FEATURES)
        self.conv = nn.Conv2d(1, NUM_FEATURES, 3)
        self.norm = nn.BatchNorm2d(NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return logits (N, 3) of words (N,) and images (N, 1, 8, 8)."""
        features = torch.relu(self.norm(self.conv(inputs["images"]))).mean(dim=(2, 3))
        logits: torch.Tensor = self.head(features + self.embedding(inputs["words"]))
        return logits


class Workload:
    """As much of the harness's workload as a submission touches."""

    step_hint = 100
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY
    metrics_logger = None

    def __init__(self) -> None:
        self.model_params_types: dict[str, Any] = {}

    def batch(self, step: int) -> dict[str, Any]:
        """Return the batch of a step."""
        generator = torch.Generator().manual_seed(step)
        words = torch.randint(NUM_WORDS, (NUM_EXAMPLES,), generator=generator)
        images = torch.randn(NUM_EXAMPLES, 1, 8, 8, generator=generator)
        return {"inputs": {"words": words, "images": images}, "targets": words % NUM_CLASSES}

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: dict[str, Any],
        model_state: Any,
        mode: ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float | None = None,
    ) -> tuple[Any, Any]:
        """Run the model forward."""
        del rng, update_batch_norm, dropout_rate
        params.train(mode is ForwardPassMode.TRAIN)
        return params(augmented_and_preprocessed_input_batch["inputs"]), model_state

    def loss_fn(
        self,
        label_batch: torch.Tensor,
        logits_batch: torch.Tensor,
        mask_batch: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Any]:
        """Return the summed loss and the number of examples."""
        del mask_batch
        losses = nn.functional.cross_entropy(
            logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing
        )
        return {
            "summed": losses.sum(),
            "n_valid_examples": torch.tensor(float(len(losses))),
            "per_example": losses,
        }


def train(entry: Any, hyperparameters: Any) -> None:
    """Train a fresh model for a few steps, ready it for an evaluation, and train on."""
    torch.manual_seed(0)
    workload, model = Workload(), Model()
    before = [weight.detach().clone() for weight in model.parameters()]
    state = entry.init_optimizer_state(workload, model, None, hyperparameters, [0, 0])
    common = {
        "workload": workload,
        "current_params_types": {},
        "model_state": None,
        "hyperparameters": hyperparameters,
        "loss_type": workload.loss_type,
        "eval_results": [],
        "rng": [0, 0],
    }
    for step in range(STEPS):
        queue = iter([workload.batch(step)])
        batch = entry.data_selection(workload, queue, state, model, None, None, step, [0, 0])
        changing = {"current_param_container": model, "optimizer_state": state}
        state, model, _ = entry.update_params(**common, **changing, batch=batch, global_step=step)
        if step == STEPS // 2:
            changing = {"current_param_container": model, "optimizer_state": state}
            state, model, _ = entry.prepare_for_eval(**common, **changing, global_step=step)
    for name, weight in zip(dict(model.named_parameters()), before, strict=True):
        now = model.get_parameter(name)
        if not torch.isfinite(now).all():
            sys.exit(f"{name} is no longer finite after {STEPS} steps at {hyperparameters}")
        if torch.equal(now, weight):
            sys.exit(f"{name} has not moved in {STEPS} steps at {hyperparameters}")


def main(root: str, module: str) -> None:
    """Run the trial; see the head of this file."""
    # The first place on the path is this file's own folder, which the benchmark does not have.
    sys.path[:] = [root] + [place for place in sys.path if place != str(Path(__file__).parent)]
    entry = importlib.import_module(module)
    folder = Path(entry.__file__ or "").parent
    if not folder.is_relative_to(root):
        sys.exit(f"{module} was found at {folder}, not below {root}")
    space = folder / "tuning_search_space.json"
    points = json.loads(space.read_text(encoding="utf-8")) if space.exists() else [None]
    for point in points:
        train(entry, None if point is None else SimpleNamespace(**point))
    strangers = [name for name in REPOSITORY_PACKAGES if name in sys.modules]
    if strangers:
        sys.exit(f"the entry imports {', '.join(strangers)} from outside its folder")
    sys.stdout.write(f"{module}: {len(points)} setting(s) trained {STEPS} steps\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
