"""The benchmark's interface: `algoperf.spec` where it is installed, else our stand-in for it.

Importing the names from here keeps one class of each in a process, so that a `ParameterType` or a
`TrainingCompleteError` of a submission that imports `algoperf.spec` is the one that the runner
and the workloads know. An installation of algoperf that does not import (jax missing, say) is an
error here and not a silent fall-back.
"""

import importlib.util
from typing import TYPE_CHECKING

__all__ = [
    "DataSelectionFn",
    "ForwardPassMode",
    "Hyperparameters",
    "InitOptimizerFn",
    "LossType",
    "ModelAuxiliaryState",
    "ModelInitState",
    "OptimizerState",
    "ParameterContainer",
    "ParameterKey",
    "ParameterShapeTree",
    "ParameterType",
    "ParameterTypeTree",
    "PrepareForEvalFn",
    "RandomState",
    "Shape",
    "ShapeTuple",
    "Steps",
    "Tensor",
    "Timing",
    "TrainingCompleteError",
    "UpdateParamsFn",
    "UpdateReturn",
    "Workload",
    "data_selection",
    "get_batch_size",
    "init_optimizer_state",
    "prepare_for_eval",
    "update_params",
]


def harness_installed() -> bool:
    """Whether the official `algoperf` package can be found, without importing it."""
    return is_package("algoperf")


def is_package(name: str) -> bool:
    """Whether a package can be found, without importing it.

    A folder of its name on the path, such as a checkout that is not installed, is none.
    """
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


# The type checker always reads the stand-in: algoperf carries no types.
if TYPE_CHECKING or not harness_installed():
    from workloads_smoke.spec_stand_in import (
        DataSelectionFn,
        ForwardPassMode,
        Hyperparameters,
        InitOptimizerFn,
        LossType,
        ModelAuxiliaryState,
        ModelInitState,
        OptimizerState,
        ParameterContainer,
        ParameterKey,
        ParameterShapeTree,
        ParameterType,
        ParameterTypeTree,
        PrepareForEvalFn,
        RandomState,
        Shape,
        ShapeTuple,
        Steps,
        Tensor,
        Timing,
        TrainingCompleteError,
        UpdateParamsFn,
        UpdateReturn,
        Workload,
        data_selection,
        get_batch_size,
        init_optimizer_state,
        prepare_for_eval,
        update_params,
    )
else:
    from algoperf.spec import (
        DataSelectionFn,
        ForwardPassMode,
        Hyperparameters,
        InitOptimizerFn,
        LossType,
        ModelAuxiliaryState,
        ModelInitState,
        OptimizerState,
        ParameterContainer,
        ParameterKey,
        ParameterShapeTree,
        ParameterType,
        ParameterTypeTree,
        PrepareForEvalFn,
        RandomState,
        Shape,
        ShapeTuple,
        Steps,
        Tensor,
        Timing,
        TrainingCompleteError,
        UpdateParamsFn,
        UpdateReturn,
        Workload,
        data_selection,
        get_batch_size,
        init_optimizer_state,
        prepare_for_eval,
        update_params,
    )
