"""A stand-in for `algoperf.spec` (v0.6) where the benchmark is not installed.

Same names, signatures and behaviour on the PyTorch side; jax is needed only where a caller asks
for jax. Enumeration values are the official ones, because logs and pickles may carry them.
"""

import abc
import enum
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from absl import logging
from torch import nn


class LossType(enum.Enum):
    """What `Workload.loss_fn` computes."""

    SOFTMAX_CROSS_ENTROPY = 0
    SIGMOID_CROSS_ENTROPY = 1
    MEAN_SQUARED_ERROR = 2
    CTC_LOSS = 3
    MEAN_ABSOLUTE_ERROR = 4


class ForwardPassMode(enum.Enum):
    """Whether a forward pass trains (dropout, batch statistics) or evaluates."""

    TRAIN = 0
    EVAL = 1


class ParameterType(enum.Enum):
    """The role of a parameter, for optimizers that treat roles differently."""

    WEIGHT = 0
    BIAS = 1
    CONV_WEIGHT = 2
    BATCH_NORM_SCALE = 3
    BATCH_NORM_BIAS = 4
    LAYER_NORM_SCALE = 5
    LAYER_NORM_BIAS = 6
    EMBEDDING = 7
    ATTENTION_Q = 8
    ATTENTION_K = 9
    ATTENTION_V = 10
    ATTENTION_OUT = 11
    ATTENTION_QKV = 12
    ATTENTION_KV = 13
    ATTENTION_BIAS = 14


class ShapeTuple:
    """A shape as one leaf of a tree, so that mapping over a tree does not enter it."""

    def __init__(self, shape_tuple: tuple[int, ...]) -> None:
        self.shape_tuple = shape_tuple

    def __repr__(self) -> str:
        return f"ShapeTuple({self.shape_tuple})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShapeTuple) and self.shape_tuple == other.shape_tuple

    # The official class defines equality without a hash, hence is unhashable as well.
    __hash__ = None  # type: ignore[assignment]


Tensor = Any
Shape = tuple[int, ...] | ShapeTuple
ParameterKey = str
ParameterShapeTree = dict[str, Any]
ParameterTypeTree = dict[str, Any]
ParameterContainer = dict[str, Any] | nn.Module
RandomState = Any
OptimizerState = dict[str, Any] | tuple[Any, Any]
Hyperparameters = Any
Timing = int
Steps = int
ModelAuxiliaryState = Any
ModelInitState = tuple[ParameterContainer, ModelAuxiliaryState]


class TrainingCompleteError(Exception):
    """Raised by `update_params` to end training; one last evaluation follows."""


class Workload(abc.ABC):
    """A data set, a model, a loss, metrics and the targets to reach."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._param_shapes: ParameterShapeTree | None = None
        self._param_types: ParameterTypeTree | None = None
        self._eval_iters: dict[str, Iterator[dict[str, Any]]] = {}
        self.metrics_logger: Any = None

    def attach_metrics_logger(self, metrics_logger: Any) -> None:
        """Give the workload (and through it the submission) a logger for metrics."""
        self.metrics_logger = metrics_logger

    @property
    @abc.abstractmethod
    def target_metric_name(self) -> str:
        """Name of the metric that the targets refer to, without the split."""

    @property
    @abc.abstractmethod
    def validation_target_value(self) -> float:
        """Value of the target metric to reach on the validation split."""

    @property
    @abc.abstractmethod
    def test_target_value(self) -> float:
        """Value of the target metric to reach on the test split."""

    @abc.abstractmethod
    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool:
        """Whether an evaluation has reached the validation target."""

    @abc.abstractmethod
    def has_reached_test_target(self, eval_result: dict[str, float]) -> bool:
        """Whether an evaluation has reached the test target."""

    @property
    @abc.abstractmethod
    def loss_type(self) -> LossType:
        """The type of the training loss."""

    @property
    @abc.abstractmethod
    def num_train_examples(self) -> int:
        """Size of the training split."""

    @property
    @abc.abstractmethod
    def num_eval_train_examples(self) -> int:
        """How many training examples an evaluation looks at."""

    @property
    @abc.abstractmethod
    def num_validation_examples(self) -> int:
        """Size of the validation split."""

    @property
    @abc.abstractmethod
    def num_test_examples(self) -> int:
        """Size of the test split."""

    @property
    @abc.abstractmethod
    def eval_batch_size(self) -> int:
        """Global batch size of an evaluation."""

    @property
    @abc.abstractmethod
    def train_mean(self) -> Any:
        """Mean of the training inputs, per channel."""

    @property
    @abc.abstractmethod
    def train_stddev(self) -> Any:
        """Standard deviation of the training inputs, per channel."""

    @property
    @abc.abstractmethod
    def max_allowed_runtime_sec(self) -> int:
        """Budget of submission time in seconds."""

    @property
    @abc.abstractmethod
    def eval_period_time_sec(self) -> int:
        """Seconds between two evaluations."""

    @property
    @abc.abstractmethod
    def step_hint(self) -> int:
        """About how many steps the baseline makes within the budget."""

    @property
    def param_shapes(self) -> ParameterShapeTree:
        """Shapes of the parameters by name; known once the model is built."""
        if self._param_shapes is None:
            raise ValueError("param_shapes is not known yet: call init_model_fn() first.")
        return self._param_shapes

    @property
    def model_params_types(self) -> ParameterTypeTree:
        """Types of the parameters by name; known once the model is built."""
        if self._param_types is None:
            raise ValueError("model_params_types is not known yet: call init_model_fn() first.")
        return self._param_types

    @abc.abstractmethod
    def is_output_params(self, param_key: ParameterKey) -> bool:
        """Whether a parameter belongs to the output layer."""

    @abc.abstractmethod
    def _build_input_queue(
        self,
        data_rng: RandomState,
        split: str,
        data_dir: str,
        global_batch_size: int,
        cache: bool | None = None,
        repeat_final_dataset: bool | None = None,
        num_batches: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Return batches with the keys 'inputs', 'targets' and where needed 'weights'.

        The one method that submissions may not call.
        """

    @abc.abstractmethod
    def init_model_fn(self, rng: RandomState) -> ModelInitState:
        """Return the initial parameters and auxiliary state."""

    @abc.abstractmethod
    def model_fn(
        self,
        params: ParameterContainer,
        augmented_and_preprocessed_input_batch: dict[str, Tensor],
        model_state: ModelAuxiliaryState,
        mode: ForwardPassMode,
        rng: RandomState,
        update_batch_norm: bool,
        dropout_rate: float,
    ) -> tuple[Tensor, ModelAuxiliaryState]:
        """Return logits and the new auxiliary state; may update batch-norm statistics."""

    @abc.abstractmethod
    def loss_fn(
        self,
        label_batch: Any,
        logits_batch: Any,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return 'summed', 'n_valid_examples' and 'per_example' of this process's batch."""

    def output_activation_fn(self, logits_batch: Tensor, framework: str) -> Tensor:
        """Turn logits into predictions as the loss type demands."""
        if framework not in ("pytorch", "jax"):
            raise ValueError(f"`framework` has to be either `pytorch` or `jax`, got {framework}.")
        if self.loss_type in (LossType.MEAN_SQUARED_ERROR, LossType.MEAN_ABSOLUTE_ERROR):
            return logits_batch
        sigmoid = self.loss_type is LossType.SIGMOID_CROSS_ENTROPY
        if framework == "jax":
            jax = importlib.import_module("jax")
            return jax.nn.sigmoid(logits_batch) if sigmoid else jax.nn.softmax(logits_batch)
        return torch.sigmoid(logits_batch) if sigmoid else torch.softmax(logits_batch, dim=-1)

    @abc.abstractmethod
    def _eval_model_on_split(
        self,
        split: str,
        num_examples: int,
        global_batch_size: int,
        params: ParameterContainer,
        model_state: ModelAuxiliaryState,
        rng: RandomState,
        data_dir: str,
        global_step: int = 0,
    ) -> dict[str, float]:
        """Evaluate on one split and return final scalars."""

    def eval_model(
        self,
        global_batch_size: int,
        params: ParameterContainer,
        model_state: ModelAuxiliaryState,
        rng: RandomState,
        data_dir: str,
        imagenet_v2_data_dir: str | None,
        global_step: int,
    ) -> dict[str, float]:
        """Evaluate on training examples, validation and, where there is one, the test split.

        Returns:
            Metrics with the prefixes 'train/', 'validation/' and 'test/', and the sizes of the
            latter two as 'num_examples'.
        """

        def evaluate(split: str, num_examples: int, folder: str) -> dict[str, float]:
            logging.info("Evaluating on the %s split.", split)
            return self._eval_model_on_split(
                split=split,
                num_examples=num_examples,
                global_batch_size=global_batch_size,
                params=params,
                model_state=model_state,
                rng=rng,
                data_dir=folder,
                global_step=global_step,
            )

        results: dict[str, float] = {}
        train = evaluate("eval_train", self.num_eval_train_examples, data_dir)
        results.update({f"train/{name}": value for name, value in train.items()})
        validation = evaluate("validation", self.num_validation_examples, data_dir)
        results.update({f"validation/{name}": value for name, value in validation.items()})
        results["validation/num_examples"] = self.num_validation_examples
        # A workload says that it has no test split by None or by NotImplementedError.
        try:
            if self.num_test_examples is not None:
                folder = imagenet_v2_data_dir or data_dir
                test = evaluate("test", self.num_test_examples, folder)
                results.update({f"test/{name}": value for name, value in test.items()})
                results["test/num_examples"] = self.num_test_examples
        except NotImplementedError:
            logging.info("%s has no test split.", type(self).__name__)
        return results


UpdateReturn = tuple[OptimizerState, ParameterContainer, ModelAuxiliaryState]
InitOptimizerFn = Callable[
    [Workload, ParameterContainer, ModelAuxiliaryState, Hyperparameters, RandomState],
    OptimizerState,
]
UpdateParamsFn = Callable[..., UpdateReturn]
PrepareForEvalFn = Callable[..., UpdateReturn]
DataSelectionFn = Callable[..., dict[str, Tensor]]


def init_optimizer_state(
    workload: Workload,
    model_params: ParameterContainer,
    model_state: ModelAuxiliaryState,
    hyperparameters: Hyperparameters,
    rng: RandomState,
) -> OptimizerState:
    """Template for submissions: build the optimizer. Every value needs a `state_dict`."""
    raise NotImplementedError("a submission defines init_optimizer_state")


def update_params(
    workload: Workload,
    current_param_container: ParameterContainer,
    current_params_types: ParameterTypeTree,
    model_state: ModelAuxiliaryState,
    hyperparameters: Hyperparameters,
    batch: dict[str, Tensor],
    loss_type: LossType,
    optimizer_state: OptimizerState,
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: RandomState,
    train_state: dict[str, Any] | None = None,
) -> UpdateReturn:
    """Template for submissions: one training step."""
    raise NotImplementedError("a submission defines update_params")


def prepare_for_eval(
    workload: Workload,
    current_param_container: ParameterContainer,
    current_params_types: ParameterTypeTree,
    model_state: ModelAuxiliaryState,
    hyperparameters: Hyperparameters,
    loss_type: LossType,
    optimizer_state: OptimizerState,
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: RandomState,
) -> UpdateReturn:
    """Template for submissions: put the weights to evaluate in place."""
    raise NotImplementedError("a submission defines prepare_for_eval")


def data_selection(
    workload: Workload,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: OptimizerState,
    current_param_container: ParameterContainer,
    model_state: ModelAuxiliaryState,
    hyperparameters: Hyperparameters,
    global_step: int,
    rng: RandomState,
) -> dict[str, Tensor]:
    """Template for submissions: take the next batch from the queue."""
    raise NotImplementedError("a submission defines data_selection")


def get_batch_size(workload_name: str) -> int:
    """Template for submissions: the global batch size of a workload."""
    raise NotImplementedError("a submission defines get_batch_size")
