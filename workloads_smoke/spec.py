"""The benchmark's interface: `algoperf.spec` where it is installed, else our stand-in for it.

Importing the names from here keeps one class of each in a process, so that a `ParameterType` or a
`TrainingCompleteError` of a submission that imports `algoperf.spec` is the one that the runner
and the workloads know. An installation of algoperf that does not import (jax missing, say) is an
error here and not a silent fall-back.
"""

import importlib.util
from pathlib import Path
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


def harness_installed(name: str = "algoperf") -> bool:
    """Whether the official package can be found, without importing it.

    The folder of a checkout, which is a package of that name to a Python started beside it, is none.

    Args:
        name: Its name, or its former one.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return False
    return (Path(found.origin).parent / "spec.py").exists()


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
