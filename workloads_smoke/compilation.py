"""Compile what the official runner compiles (`--torch_compile`).

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `submission_runner.py`.
"""

from typing import Any

import torch
from absl import logging

from workloads_smoke.batch_sizes import base_workload_name
from workloads_smoke.spec import Workload

# The benchmark runs these models uncompiled.
_UNCOMPILED_MODELS = {
    "criteo1tb",
    "imagenet_vit",
    "librispeech_conformer",
    "librispeech_deepspeech",
    "ogbg",
}
_COMPILED_LOSSES = {"fastmri", "librispeech_deepspeech", "ogbg", "wmt"}


def compile_as_official(workload: Workload, workload_name: str, model: Any) -> Any:
    """Compile the model and the loss of a workload, each where the benchmark does.

    Args:
        workload: Its `loss_fn` may be replaced.
        workload_name: Official name.
        model: What `init_model_fn` returned, wrapped for several processes or not.

    Returns:
        The model to train; a compiled one has parameter names that start with `_orig_mod.`.
    """
    base = base_workload_name(workload_name)
    if base in _COMPILED_LOSSES:
        workload.loss_fn = torch.compile(workload.loss_fn)  # type: ignore[method-assign]
    if base in _UNCOMPILED_MODELS:
        logging.warning("--torch_compile: the benchmark does not compile %s; nor do we", base)
        return model
    return torch.compile(model)
