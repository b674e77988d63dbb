"""The local runner with a workload that trains in milliseconds.

As a script it is `python -m workloads_smoke.run` with one more workload, `tiny`; as a module it lends
that workload and a submission to tests in this process.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from workloads_smoke import spec
from workloads_smoke.registry import WORKLOADS

NUM_FEATURES, NUM_CLASSES = 6, 3


class TinyModel(nn.Module):
    """Features (N, 6) -> batch norm (or not) -> dropout -> logits (N, 3)."""

    def __init__(self, has_batch_norm: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(NUM_FEATURES) if has_batch_norm else nn.Identity()
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, features: torch.Tensor, dropout_rate: float) -> torch.Tensor:
        return self.head(functional.dropout(self.bn(features), dropout_rate, self.training))


def examples(seed: int, num: int) -> dict[str, torch.Tensor]:
    """Random features and the class that a fixed matrix gives them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, NUM_FEATURES, generator=generator)
    matrix = torch.randn(NUM_FEATURES, NUM_CLASSES, generator=torch.Generator().manual_seed(99))
    return {"inputs": features, "targets": (features @ matrix).argmax(1)}


class TinyWorkload(spec.Workload):
    """All of the benchmark's interface, on a problem of 21 parameters."""

    target_metric_name = "accuracy"
    validation_target_value = 0.99
    test_target_value = 0.99
    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY
    num_train_examples = 100_000
    num_eval_train_examples = num_validation_examples = num_test_examples = 64
    eval_batch_size = 64
    smoke_batch_size = 8
    train_mean = train_stddev = 0.0
    max_allowed_runtime_sec = 60
    eval_period_time_sec = 1
    step_hint = 40
    has_batch_norm = True
    dropout_rate = 0.25
    caveat = None

    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool:
        return eval_result["validation/accuracy"] > self.validation_target_value

    def has_reached_test_target(self, eval_result: dict[str, float]) -> bool:
        return eval_result["test/accuracy"] > self.test_target_value

    def is_output_params(self, param_key: str) -> bool:
        return param_key.startswith("head")

    def _build_input_queue(
        self,
        data_rng: Any,
        split: str,
        data_dir: str,
        global_batch_size: int,
        cache: bool | None = None,
        repeat_final_dataset: bool | None = None,
        num_batches: int | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        seed = {"train": 0, "eval_train": 0, "validation": 1, "test": 2}[split]
        if split in ("train", "eval_train"):
            # As in the benchmark: which training examples an evaluation sees hangs on the random
            # key of the first evaluation.
            seed = int(data_rng[0])
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        position = 0
        while True:
            batch = examples(seed + position, global_batch_size)
            yield {name: tensor.chunk(ranks)[rank] for name, tensor in batch.items()}
            position += split == "train"

    def init_model_fn(self, rng: Any) -> tuple[nn.Module, None]:
        torch.manual_seed(int(rng[0]))
        model: nn.Module = TinyModel(self.has_batch_norm)
        self._param_types = {
            name: spec.ParameterType.WEIGHT for name, _ in model.named_parameters()
        }
        if distributed.is_initialized():
            model = DistributedDataParallel(model)
        return model, None

    def model_fn(
        self,
        params: Any,
        augmented_and_preprocessed_input_batch: dict[str, torch.Tensor],
        model_state: Any,
        mode: spec.ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float | None = None,
    ) -> tuple[torch.Tensor, Any]:
        params.train(mode == spec.ForwardPassMode.TRAIN)
        if dropout_rate is None:
            dropout_rate = self.dropout_rate
        return params(augmented_and_preprocessed_input_batch["inputs"], dropout_rate), None

    def loss_fn(
        self,
        label_batch: torch.Tensor,
        logits_batch: torch.Tensor,
        mask_batch: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        losses = functional.cross_entropy(logits_batch, label_batch, reduction="none")
        count = torch.tensor(float(len(losses)))
        return {"summed": losses.sum(), "n_valid_examples": count, "per_example": losses}

    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: Any,
        model_state: Any,
        rng: Any,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]:
        if split not in self._eval_iters:
            self._eval_iters[split] = self._build_input_queue(
                rng, split, data_dir, global_batch_size
            )
        batch = next(self._eval_iters[split])
        with torch.no_grad():
            logits, _ = self.model_fn(params, batch, None, spec.ForwardPassMode.EVAL, rng, False)
        accuracy = (logits.argmax(1) == batch["targets"]).float().mean()
        loss = self.loss_fn(batch["targets"], logits)["summed"] / len(logits)
        if distributed.is_initialized():
            for value in (accuracy, loss):
                distributed.all_reduce(value)
                value /= distributed.get_world_size()
        return {"accuracy": accuracy.item(), "loss": loss.item()}


class TinyTooWorkload(TinyWorkload):
    """One whose loss is a mean over examples and nothing else, on any number of processes."""

    has_batch_norm = False
    dropout_rate = 0.0


@dataclass(frozen=True)
class TinyEntry:
    """A workload's place in the registry."""

    workload: type[TinyWorkload]

    def load(self) -> type[TinyWorkload]:
        return self.workload


ENTRIES: dict[str, Any] = {"tiny": TinyEntry(TinyWorkload), "tiny_too": TinyEntry(TinyTooWorkload)}

# A submission that leans on everything a resumed run must bring back: three random generators, a
# scheduler, weights that differ between training and evaluation, a varying number of batches a step.
SUBMISSION = '''
import os, random, signal
import numpy as np
import torch
import torch.distributed.nn as dist_nn
from algoperf import spec
from algoperf.pytorch_utils import pytorch_setup

USE_PYTORCH_DDP = pytorch_setup()[0]
KILL_AT_STEP = int(os.environ.get("KILL_AT_STEP", "-1"))
KILL_IN_SAVE = int(os.environ.get("KILL_IN_SAVE", "-1"))


class Average:
    """Running mean of the weights; holds the training weights while they are swapped out."""

    def __init__(self, model):
        self.mean = [p.detach().clone() for p in model.parameters()]
        self.training_weights = None

    def state_dict(self):
        return {"mean": self.mean, "training_weights": self.training_weights}

    def load_state_dict(self, state):
        self.mean, self.training_weights = state["mean"], state["training_weights"]


def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
    optimizer = torch.optim.AdamW(model_params.parameters(), lr=hyperparameters.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, workload.step_hint)
    return {"optimizer": optimizer, "scheduler": scheduler, "average": Average(model_params)}


def update_params(workload, current_param_container, current_params_types, model_state,
                  hyperparameters, batch, loss_type, optimizer_state, eval_results, global_step,
                  rng, train_state=None):
    model, average = current_param_container, optimizer_state["average"]
    if global_step == KILL_AT_STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    if average.training_weights is not None:
        for p, w in zip(model.parameters(), average.training_weights):
            p.data.copy_(w)
        average.training_weights = None
    optimizer_state["optimizer"].zero_grad()
    logits, _ = workload.model_fn(model, batch, model_state, spec.ForwardPassMode.TRAIN, rng, True)
    losses = workload.loss_fn(batch["targets"], logits)
    summed, count = losses["summed"], losses["n_valid_examples"]
    if USE_PYTORCH_DDP:
        summed, count = dist_nn.all_reduce(summed), dist_nn.all_reduce(count)
    (summed / count).backward()
    noise = 1e-3 * (random.random() + np.random.rand())
    for p in model.parameters():
        p.grad += noise * torch.randn_like(p)
    optimizer_state["optimizer"].step()
    optimizer_state["scheduler"].step()
    for m, p in zip(average.mean, model.parameters()):
        m.lerp_(p.detach(), 0.1)
    if workload.metrics_logger is not None:
        workload.metrics_logger.append_scalar_metrics({"loss": summed.item()}, global_step)
    return optimizer_state, model, model_state


def prepare_for_eval(workload, current_param_container, current_params_types, model_state,
                     hyperparameters, loss_type, optimizer_state, eval_results, global_step, rng):
    average = optimizer_state["average"]
    parameters = list(current_param_container.parameters())
    average.training_weights = [p.detach().clone() for p in parameters]
    for p, m in zip(parameters, average.mean):
        p.data.copy_(m)
    return optimizer_state, current_param_container, model_state


def data_selection(workload, input_queue, optimizer_state, current_param_container, model_state,
                   hyperparameters, global_step, rng):
    if global_step % 3 == 0:
        next(input_queue)
    return next(input_queue)


def get_batch_size(workload_name):
    return 16


if KILL_IN_SAVE >= 0:
    whole_save, num_saves = torch.save, 0

    def save_half(content, file):
        global num_saves
        num_saves += 1
        if num_saves == KILL_IN_SAVE:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole_save(content, file)

    torch.save = save_half
'''


def write_submission(folder: Path, text: str = SUBMISSION, name: str = "entry.py") -> Path:
    """Put a submission into a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def forget_modules(folder: Path) -> None:
    """Undo imports from a folder: the next test imports files of the same names from another."""
    imported = [
        name
        for name, module in sys.modules.items()
        # Packages without an __init__.py have a path only.
        for place in (vars(module).get("__file__"), *vars(module).get("__path__", []))
        if str(place).startswith(str(folder))
    ]
    for name in imported:
        sys.modules.pop(name, None)


if __name__ in ("__main__", "__mp_main__"):  # the latter in the processes of parallel trials
    WORKLOADS |= ENTRIES

if __name__ == "__main__":
    from workloads_smoke.run import command_line

    command_line()
