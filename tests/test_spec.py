"""The stand-in for `algoperf.spec`: what submissions and the runner see of it."""

import inspect
import json

import pytest
import torch
from official_harness import require_harness

from workloads_smoke import spec, spec_stand_in

PROPERTIES = [
    "target_metric_name",
    "validation_target_value",
    "test_target_value",
    "loss_type",
    "num_train_examples",
    "num_eval_train_examples",
    "num_validation_examples",
    "num_test_examples",
    "eval_batch_size",
    "train_mean",
    "train_stddev",
    "max_allowed_runtime_sec",
    "eval_period_time_sec",
    "step_hint",
]
METHODS = [
    "has_reached_validation_target",
    "has_reached_test_target",
    "_build_input_queue",
    "is_output_params",
    "init_model_fn",
    "model_fn",
    "loss_fn",
    "_eval_model_on_split",
]


def workload(**attributes: object) -> spec_stand_in.Workload:
    """A workload that defines everything abstract as None, but for the given attributes."""
    defined = dict.fromkeys([*PROPERTIES, *METHODS]) | attributes
    return type("Defined", (spec_stand_in.Workload,), defined)()


def test_everything_that_the_benchmark_leaves_open_is_abstract() -> None:
    assert spec_stand_in.Workload.__abstractmethods__ == {*PROPERTIES, *METHODS}


def test_shapes_and_types_are_unknown_before_the_model_is_built() -> None:
    unbuilt = workload()
    with pytest.raises(ValueError, match="init_model_fn"):
        _ = unbuilt.param_shapes
    with pytest.raises(ValueError, match="init_model_fn"):
        _ = unbuilt.model_params_types


def test_eval_model_prefixes_metrics_and_counts_examples() -> None:
    calls = []

    def evaluate(self: object, split: str, num_examples: int, **rest: object) -> dict[str, float]:
        calls.append((split, num_examples, rest["data_dir"], rest["global_step"]))
        return {"loss": float(num_examples)}

    measured = workload(
        _eval_model_on_split=evaluate,
        num_eval_train_examples=1,
        num_validation_examples=2,
        num_test_examples=3,
    )
    results = measured.eval_model(5, torch.nn.Identity(), None, [0, 1], "here", "there", 7)
    assert calls == [
        ("eval_train", 1, "here", 7),
        ("validation", 2, "here", 7),
        ("test", 3, "there", 7),
    ]
    assert results == {
        "train/loss": 1.0,
        "validation/loss": 2.0,
        "validation/num_examples": 2,
        "test/loss": 3.0,
        "test/num_examples": 3,
    }


@pytest.mark.parametrize("absent", ["None", "raises"])
def test_eval_model_without_a_test_split(absent: str) -> None:
    def raising(self: object) -> int:
        raise NotImplementedError

    measured = workload(
        _eval_model_on_split=lambda self, split, **rest: {"loss": 1.0},
        num_eval_train_examples=1,
        num_validation_examples=2,
        num_test_examples=None if absent == "None" else property(raising),
    )
    results = measured.eval_model(5, torch.nn.Identity(), None, [0, 1], "", None, 7)
    assert not any(name.startswith("test/") for name in results)


@pytest.mark.parametrize("loss_type", list(spec_stand_in.LossType))
def test_output_activation(loss_type: spec_stand_in.LossType) -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    kinds = spec_stand_in.LossType
    if loss_type in (kinds.MEAN_SQUARED_ERROR, kinds.MEAN_ABSOLUTE_ERROR):
        expected = logits
    elif loss_type is kinds.SIGMOID_CROSS_ENTROPY:
        expected = 1 / (1 + (-logits).exp())
    else:
        expected = logits.exp() / logits.exp().sum()
    activated = workload(loss_type=loss_type).output_activation_fn(logits, "pytorch")
    torch.testing.assert_close(activated, expected)


def test_output_activation_refuses_other_frameworks() -> None:
    with pytest.raises(ValueError, match="got tensorflow"):
        workload().output_activation_fn(torch.zeros(1), "tensorflow")


def test_shape_tuples_compare_by_shape() -> None:
    shape = spec_stand_in.ShapeTuple((2, 3))
    assert shape == spec_stand_in.ShapeTuple(torch.Size([2, 3]))
    assert shape != spec_stand_in.ShapeTuple((3, 2))
    assert repr(shape) == "ShapeTuple((2, 3))"


def test_spec_offers_every_public_name_of_the_stand_in() -> None:
    public = {
        name
        for name, value in vars(spec_stand_in).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public - {"Any", "Callable", "Iterator", "nn"} == set(spec.__all__)


COMPARISON = """
import inspect, json
from algoperf import spec as official
from workloads_smoke import spec, spec_stand_in

def describe(module):
    workload = module.Workload
    enums = (module.LossType, module.ForwardPassMode, module.ParameterType)
    members = {n: m for n, m in vars(workload).items() if inspect.isfunction(m)}
    return {
        "enums": [{kind.name: kind.value for kind in enum} for enum in enums],
        "abstract": sorted(workload.__abstractmethods__),
        "arguments": {n: list(inspect.signature(m).parameters) for n, m in members.items()},
        "properties": sorted(n for n, m in vars(workload).items() if isinstance(m, property)),
        "templates": {
            name: list(inspect.signature(getattr(module, name)).parameters)
            for name in ("init_optimizer_state", "update_params", "prepare_for_eval",
                         "data_selection", "get_batch_size")
        },
    }

print(json.dumps({
    "official": describe(official),
    "ours": describe(spec_stand_in),
    "same_class": spec.Workload is official.Workload,
    "missing": [name for name in spec.__all__ if not hasattr(official, name)],
}))
"""


@pytest.mark.harness
def test_stand_in_has_the_official_interface() -> None:
    done = require_harness().run("-c", COMPARISON)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] == found["official"]
    assert found["same_class"]
    assert found["missing"] == []
