"""Saves and restores a run with the official harness's own code; run by its interpreter.

usage: official_checkpoint_driver.py FOLDER

For the self-tuning setting, every point of the tuning search space, and every method that a point
can name: trains the official mnist model (and cifar's, which has batch norm) on random batches,
saves a checkpoint right after `prepare_for_eval` as the runner does, trains on; then restores the
checkpoint into a fresh model and optimizer, as a restarted process would, and trains those on.
Prints one JSON object: for each setting, whether both ended with the same weights and the same
optimizer state, bit for bit.
"""

import collections
import dataclasses
import json
import sys
from pathlib import Path

import torch
from algoperf import checkpoint_utils
from algoperf.workloads.cifar.cifar_pytorch.workload import CifarWorkload
from algoperf.workloads.mnist.mnist_pytorch.workload import MnistWorkload

from submission import submission
from submission.hyperparameters import Hyperparameters

STEPS_BEFORE, STEPS_AFTER, BATCH_SIZE = 23, 9, 8
REPOSITORY = Path(__file__).resolve().parents[1]


class Run:
    """A workload, its model and the optimizer state, as `train_once` of the runner sets them up."""

    def __init__(self, setting, workload_class, seed):
        self.workload, self.setting, self.step = workload_class(), setting, 0
        self.image_shape = (3, 32, 32) if workload_class is CifarWorkload else (1, 28, 28)
        model, self.model_state = self.workload.init_model_fn([seed, seed])
        # The runner compiles; this backend gives the same module names and no compilation.
        self.model = torch.compile(model, backend="eager")
        self.state = submission.init_optimizer_state(
            self.workload, self.model, self.model_state, setting, [seed, seed]
        )

    def train(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            batch = {
                "inputs": torch.randn(BATCH_SIZE, *self.image_shape, generator=generator),
                "targets": torch.randint(10, (BATCH_SIZE,), generator=generator),
                "weights": torch.ones(BATCH_SIZE, dtype=torch.bool),
            }
            self.state, self.model, self.model_state = submission.update_params(
                **self.common(), batch=batch
            )
            self.step += 1

    def prepare_for_eval(self):
        self.state, self.model, self.model_state = submission.prepare_for_eval(**self.common())

    def common(self):
        return {
            "workload": self.workload,
            "current_param_container": self.model,
            "current_params_types": self.workload.model_params_types,
            "model_state": self.model_state,
            "hyperparameters": self.setting,
            "loss_type": self.workload.loss_type,
            "optimizer_state": self.state,
            "eval_results": [],
            "global_step": self.step,
            "rng": [0, self.step],
        }

    def save(self, folder):
        folder.mkdir()
        checkpoint_utils.save_checkpoint(
            "pytorch", self.state, self.model, self.model_state, {}, [], self.step, 0,
            str(folder), save_intermediate_checkpoints=True,
        )  # fmt: skip

    def restore(self, folder):
        restored = checkpoint_utils.maybe_restore_checkpoint(
            "pytorch", self.state, self.model, self.model_state, {}, [], 0, 0, str(folder)
        )
        self.state, self.model, self.model_state, _, _, self.step, preemptions = restored
        assert preemptions == 1, "no checkpoint was found"


def settings():
    """Name, hyperparameters and workload of every run."""
    yield "self", None, MnistWorkload
    points = json.loads((REPOSITORY / "tuning_search_space.json").read_text())
    for number, point in enumerate(points, start=1):
        point_tuple = collections.namedtuple("Hyperparameters", point)(**point)
        yield f"point {number}", point_tuple, MnistWorkload
    for field in dataclasses.fields(Hyperparameters):
        for choice in field.metadata.get("choices", ()):
            varied = points[0] | {field.name: choice}
            yield f"{field.name}={choice}", Hyperparameters.from_namespace(varied), MnistWorkload
    # Small blocks: the cost of the refreshes is not the matter here.
    batch_norm = points[0] | {"averaging": "weight_ema", "max_block_size": 64}
    yield "batch norm", Hyperparameters.from_namespace(batch_norm), CifarWorkload


def differences(left, right, path=""):
    """Paths at which two nested states differ."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and torch.equal(left, right)
        return [] if same else [path]
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [d for key in left for d in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [path]
        pairs = enumerate(zip(left, right, strict=True))
        return [d for key, pair in pairs for d in differences(*pair, f"{path}/{key}")]
    return [] if left == right else [path]


def snapshot(run):
    parts = {name: part.state_dict() for name, part in run.state.items()}
    return {"model": run.model.state_dict(), **parts}


def main(folder):
    report = {}
    for name, setting, workload_class in settings():
        uninterrupted = Run(setting, workload_class, seed=1)
        uninterrupted.train(STEPS_BEFORE)
        trained = [p.detach().clone() for p in uninterrupted.model.parameters()]
        uninterrupted.prepare_for_eval()
        uninterrupted.save(folder / name)

        resumed = Run(setting, workload_class, seed=2)
        resumed.restore(folder / name)
        on_restore = differences(snapshot(uninterrupted), snapshot(resumed))
        swapped = not all(map(torch.equal, trained, uninterrupted.model.parameters()))

        uninterrupted.train(STEPS_AFTER)
        resumed.train(STEPS_AFTER)
        moved = not all(map(torch.equal, trained, resumed.model.parameters()))
        report[name] = {
            "evaluates_other_weights": swapped,
            "trained_on": moved and resumed.step == STEPS_BEFORE + STEPS_AFTER,
            "differences_on_restore": on_restore,
            "differences_at_the_end": differences(snapshot(uninterrupted), snapshot(resumed)),
        }
    print("REPORT " + json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
