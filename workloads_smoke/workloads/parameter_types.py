"""Parameter types from parameter names, by the benchmark's naming rules."""

from torch import nn

from workloads_smoke.spec import ParameterType, ShapeTuple

# First match wins, in this order, as in the benchmark's own assignment.
_ATTENTION_RULES = (
    ("bias", ParameterType.ATTENTION_BIAS),
    ("in_proj", ParameterType.ATTENTION_QKV),
    ("qkv", ParameterType.ATTENTION_QKV),
    ("kv_proj", ParameterType.ATTENTION_KV),
    ("k_proj", ParameterType.ATTENTION_K),
    ("key", ParameterType.ATTENTION_K),
    ("q_proj", ParameterType.ATTENTION_Q),
    ("query", ParameterType.ATTENTION_Q),
    ("v_proj", ParameterType.ATTENTION_V),
    ("value", ParameterType.ATTENTION_V),
    ("out", ParameterType.ATTENTION_OUT),
    ("scale", ParameterType.WEIGHT),
)


def parameter_shapes(model: nn.Module) -> dict[str, ShapeTuple]:
    """Shapes of a model's parameters by name."""
    return {name: ShapeTuple(p.shape) for name, p in model.named_parameters()}


def parameter_types(names: list[str]) -> dict[str, ParameterType]:
    """Types of parameters by name.

    Args:
        names: Names as `named_parameters()` gives them.

    Raises:
        ValueError: If a norm's or attention's parameter fits no rule.
    """
    return {name: parameter_type(name) for name in names}


def parameter_type(name: str) -> ParameterType:
    """Type of one parameter; see `parameter_types`."""
    if "bn" in name:
        return _norm_type(name, ParameterType.BATCH_NORM_SCALE, ParameterType.BATCH_NORM_BIAS)
    if "norm" in name or "ln" in name:
        return _norm_type(name, ParameterType.LAYER_NORM_SCALE, ParameterType.LAYER_NORM_BIAS)
    if "conv" in name:
        return ParameterType.BIAS if "bias" in name else ParameterType.CONV_WEIGHT
    if "embed" in name and "weight" in name:
        return ParameterType.EMBEDDING
    if "attn" in name or "attention" in name:
        for part, kind in _ATTENTION_RULES:
            if part in name:
                return kind
        raise ValueError(f"unrecognised attention parameter: {name}.")
    return ParameterType.BIAS if "bias" in name else ParameterType.WEIGHT


def _norm_type(name: str, scale: ParameterType, bias: ParameterType) -> ParameterType:
    if "weight" in name or "scale" in name:
        return scale
    if "bias" in name:
        return bias
    raise ValueError(f"unrecognised norm parameter: {name}.")
