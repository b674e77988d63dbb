"""What all smoke workloads share: the benchmark's methods around a model, a loss and data.

A workload states its facts, builds its model, serves its splits and measures a batch. The order
of calls, the modes of a forward pass, the evaluation loop and the division of work among
processes are here.
"""

import abc
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from workloads_smoke import spec
from workloads_smoke.data.python_text import fingerprint
from workloads_smoke.data.queue import Augment, Batch, Gather, InputQueue, seed_words
from workloads_smoke.targets import load_targets
from workloads_smoke.workloads.layers import MaskedBatchNorm
from workloads_smoke.workloads.parameter_types import parameter_shapes, parameter_types
from workloads_smoke.workloads.placement import current_placement

SPLITS = ("train", "eval_train", "validation", "test")


@dataclass(frozen=True)
class WorkloadFacts:
    """The numbers and names of one workload; times in seconds."""

    target_metric: str
    larger_is_better: bool
    loss_type: spec.LossType
    num_train_examples: int
    num_eval_train_examples: int
    num_validation_examples: int
    num_test_examples: int
    eval_batch_size: int
    step_hint: int
    max_allowed_runtime_sec: int
    eval_period_time_sec: int
    default_dropout_rate: float = 0.0


class SmokeWorkload(spec.Workload):
    """A tiny shadow of an official workload.

    Attributes:
        name: The official workload's name.
        facts: Sizes, budget and names.
        smoke_batch_size: The training batch size that step hint and targets refer to; the local
            runner takes it in place of a submission's `get_batch_size`, whose values belong to
            the official data.
        output_parameters: Names of the output layer's parameters.
    """

    name: ClassVar[str]
    facts: ClassVar[WorkloadFacts]
    smoke_batch_size: ClassVar[int]
    output_parameters: ClassVar[tuple[str, ...]]
    sets_training_mode: ClassVar[bool] = True
    """Whether a TRAIN pass puts the model into training mode; officially of two workloads none does, which
    keep that of the last evaluation unless the submission calls ``model.train()``."""
    refuses_statistics_in_evaluation: ClassVar[bool] = False
    """Whether an EVAL pass that shall move batch statistics is an error; officially of ResNet alone."""
    averages_statistics: ClassVar[bool] = False
    """Whether an evaluation takes the mean of all processes' batch statistics; officially that of speech
    does, the others have those of rank 0, which DDP sends around."""
    made_of_python_text: ClassVar[bool] = False
    """Whether the data are other ones under another version of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.placement = current_placement()

    # What a workload defines.

    @abc.abstractmethod
    def _build_model(self) -> nn.Module:
        """Return the freshly initialised model; torch's generator is seeded by the caller."""

    @abc.abstractmethod
    def _split_data(self, split: str) -> tuple[Gather, int]:
        """Return a function that gathers a split's examples by index, and how many there are.

        'eval_train' is a fixed part of 'train', so that a resumed run evaluates on the same one.
        """

    @abc.abstractmethod
    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Any:
        """Return the logits of a batch."""

    @abc.abstractmethod
    def _batch_metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Return sums over this process's valid examples of an evaluation batch."""

    @abc.abstractmethod
    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Turn the sums over a split into metrics, 'loss' (or 'ctc_loss') and the target metric."""

    def _augmentation(self) -> Augment | None:
        """Return the random change of training batches, if any."""
        return None

    # Facts under the benchmark's names.

    @property
    def target_metric_name(self) -> str:
        """Name of the target metric."""
        return self.facts.target_metric

    @property
    def validation_target_value(self) -> float:
        """Target on the validation split, from targets.json."""
        return load_targets(self.name).validation_target_value

    @property
    def test_target_value(self) -> float:
        """Target on the test split, from targets.json."""
        return load_targets(self.name).test_target_value

    @property
    def text_fingerprint(self) -> str | None:
        """Of the text that the data are made of; None without one."""
        return fingerprint() if self.made_of_python_text else None

    @property
    def caveat(self) -> str | None:
        """What keeps results from being compared with the target, if anything does."""
        targets = load_targets(self.name)
        if self.text_fingerprint in (None, targets.text_fingerprint):
            return None
        return (
            f"this Python's documentation, of which the data are made, is not that of {targets.python}, "
            "on which the target was set: compare runs of one version, the target is a rough one"
        )

    def _reached(self, value: float, target: float) -> bool:
        return value > target if self.facts.larger_is_better else value < target

    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool:
        """Whether the target metric is strictly beyond the validation target."""
        value = eval_result[f"validation/{self.target_metric_name}"]
        return self._reached(value, self.validation_target_value)

    def has_reached_test_target(self, eval_result: dict[str, float]) -> bool:
        """Whether the target metric is strictly beyond the test target."""
        value = eval_result[f"test/{self.target_metric_name}"]
        return self._reached(value, self.test_target_value)

    @property
    def loss_type(self) -> spec.LossType:
        """Type of the loss."""
        return self.facts.loss_type

    @property
    def num_train_examples(self) -> int:
        """Size of the training split."""
        return self.facts.num_train_examples

    @property
    def num_eval_train_examples(self) -> int:
        """Number of training examples that an evaluation looks at."""
        return self.facts.num_eval_train_examples

    @property
    def num_validation_examples(self) -> int:
        """Size of the validation split."""
        return self.facts.num_validation_examples

    @property
    def num_test_examples(self) -> int:
        """Size of the test split."""
        return self.facts.num_test_examples

    @property
    def eval_batch_size(self) -> int:
        """Global batch size of evaluations."""
        return self.facts.eval_batch_size

    @property
    def train_mean(self) -> Any:
        """Not needed here: inputs come normalised."""
        raise NotImplementedError(f"{self.name}: inputs come normalised.")

    @property
    def train_stddev(self) -> Any:
        """Not needed here: inputs come normalised."""
        raise NotImplementedError(f"{self.name}: inputs come normalised.")

    @property
    def max_allowed_runtime_sec(self) -> int:
        """Budget in seconds; generous, because laptops and loaded machines differ."""
        return self.facts.max_allowed_runtime_sec

    @property
    def eval_period_time_sec(self) -> int:
        """Seconds between evaluations."""
        return self.facts.eval_period_time_sec

    @property
    def step_hint(self) -> int:
        """Steps of a full training run at `smoke_batch_size`."""
        return self.facts.step_hint

    def is_output_params(self, param_key: spec.ParameterKey) -> bool:
        """Whether the parameter belongs to the output layer."""
        return param_key in self.output_parameters

    # The benchmark's methods.

    def init_model_fn(self, rng: spec.RandomState) -> spec.ModelInitState:
        """Build the model from a seed, on this process's device, wrapped for DDP where needed."""
        torch.random.manual_seed(seed_words(rng)[0])
        model = self._build_model()
        self._param_shapes = parameter_shapes(model)
        self._param_types = parameter_types(list(self._param_shapes))
        model.to(self.placement.device)
        if self.placement.distributed:
            device_ids = [self.placement.device] if self.placement.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=device_ids)
        return model, None

    def model_fn(
        self,
        params: spec.ParameterContainer,
        augmented_and_preprocessed_input_batch: dict[str, spec.Tensor],
        model_state: spec.ModelAuxiliaryState,
        mode: spec.ForwardPassMode,
        rng: spec.RandomState,
        update_batch_norm: bool,
        dropout_rate: float | None = None,
    ) -> tuple[spec.Tensor, spec.ModelAuxiliaryState]:
        """Run the model in the given mode.

        Args:
            params: The model.
            augmented_and_preprocessed_input_batch: A batch of the input queue.
            model_state: Unused; PyTorch models carry their batch statistics themselves.
            mode: TRAIN, or EVAL without gradients, dropout and batch statistics.
            rng: Unused; dropout draws from torch's generator.
            update_batch_norm: Whether a TRAIN pass moves the running batch statistics; an EVAL pass never
                does.
            dropout_rate: Probability; None for the workload's default.

        Raises:
            ValueError: If batch statistics shall be updated in EVAL mode, where that is refused.
        """
        assert isinstance(params, nn.Module)
        training = mode == spec.ForwardPassMode.TRAIN
        if update_batch_norm and not training and self.refuses_statistics_in_evaluation:
            raise ValueError("update_batch_norm=True needs mode=TRAIN, got mode=EVAL.")
        if self.sets_training_mode or not training:
            params.train(training)
        if training:
            _set_batch_norm_update(params, update_batch_norm)
        if dropout_rate is None:
            dropout_rate = self.facts.default_dropout_rate
        with contextlib.nullcontext() if training else torch.no_grad():
            logits = self._forward(params, augmented_and_preprocessed_input_batch, dropout_rate)
        return logits, None

    def _build_input_queue(
        self,
        data_rng: spec.RandomState,
        split: str,
        data_dir: str,
        global_batch_size: int,
        cache: bool | None = None,
        repeat_final_dataset: bool | None = None,
        num_batches: int | None = None,
    ) -> Iterator[Batch]:
        """Return the endless queue of a split; `num_batches` ends one that does not repeat.

        Args:
            data_rng: Seed of the training order and augmentation.
            split: 'train', 'eval_train', 'validation' or 'test'.
            data_dir: Unused; the data is made in memory.
            global_batch_size: Batch size over all processes.
            cache: Unused; the data is always in memory.
            repeat_final_dataset: Go on after `num_batches`.
            num_batches: Number of batches after which a queue that does not repeat ends.

        Raises:
            ValueError: If the split is unknown or the batch does not divide among processes.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        gather, num_examples = self._split_data(split)
        train = split == "train"
        return InputQueue(
            gather,
            num_examples,
            global_batch_size,
            seed=seed_words(data_rng),
            train=train,
            rank=self.placement.rank,
            world_size=self.placement.world_size,
            device=self.placement.device,
            augment=self._augmentation() if train else None,
            num_batches=None if repeat_final_dataset else num_batches,
        )

    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: spec.ParameterContainer,
        model_state: spec.ModelAuxiliaryState,
        rng: spec.RandomState,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]:
        """Add up the metrics of a split's batches over all processes."""
        assert isinstance(params, nn.Module)
        if split not in self._eval_iters:
            # Endless and kept, as in the benchmark: all evaluations see the same examples.
            self._eval_iters[split] = self._build_input_queue(
                rng, split, data_dir, global_batch_size, repeat_final_dataset=True
            )
        if self.placement.distributed and self.averages_statistics:
            _average_buffers(params)
        num_batches = math.ceil(num_examples / global_batch_size)
        return self._measure(params, islice(self._eval_iters[split], num_batches))

    def _measure(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return the metrics over batches; for metrics that are not functions of sums, override."""
        sums: dict[str, float] = {}
        for batch in batches:
            for name, value in self._batch_metrics(model, batch).items():
                sums[name] = sums.get(name, 0.0) + value
        return self._final_metrics(self._add_over_processes(sums))

    def _add_over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        if not self.placement.distributed:
            return sums
        values = torch.tensor(
            list(sums.values()), dtype=torch.float64, device=self.placement.device
        )
        distributed.all_reduce(values)
        return dict(zip(sums, values.tolist(), strict=True))

    def _evaluate_logits(self, model: nn.Module, batch: Batch) -> Any:
        """Forward pass of an evaluation batch."""
        return self.model_fn(
            model, batch, None, spec.ForwardPassMode.EVAL, None, update_batch_norm=False
        )[0]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a DDP or compile wrapper."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _set_batch_norm_update(model: nn.Module, update: bool) -> None:
    """Let the running statistics of a model's batch norms move, or freeze them."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm | MaskedBatchNorm):
            continue
        # A momentum of zero keeps the running statistics; torch knows no switch for it.
        kept = vars(module).setdefault("momentum_while_training", module.momentum)
        module.momentum = kept if update else 0.0


def _average_buffers(model: nn.Module) -> None:
    """Make the running statistics of all processes their mean."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            distributed.all_reduce(buffer)
            buffer /= distributed.get_world_size()
