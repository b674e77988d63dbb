"""The hyperparameters of the submission, checked once where they enter.

Under the external ruleset the harness hands over a namespace drawn from
`tuning_search_space.json`; under the self-tuning ruleset it hands over None and one built-in
setting, `SELF_TUNING`, takes its place. Behind this door the code trusts the numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Interval:
    """Numbers between two ends; an end that is `open` does not belong."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.low_open else self.low <= number
        below = number < self.high if self.high_open else number <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


_POSITIVE = Interval(0.0, math.inf, low_open=True, high_open=True)
_NOT_NEGATIVE = Interval(0.0, math.inf, high_open=True)
_PROPER_FRACTION = Interval(0.0, 1.0, high_open=True)
_DECAY = Interval(0.0, 1.0, low_open=True)


def _number(allowed: Interval, *, whole: bool = False, optional: bool = False) -> Any:
    """Declare a numeric field; `whole` asks for an int, `optional` also allows None."""
    return dataclasses.field(metadata={"allowed": allowed, "whole": whole, "optional": optional})


def _choice(*names: str) -> Any:
    """Declare a field that holds one of `names`."""
    return dataclasses.field(metadata={"choices": names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """One point of the search space. Every field must be given.

    Decay rates are written as one minus the rate, as published search spaces have them.

    Raises:
        ValueError: A value is of the wrong kind or out of range; the message names field, value
            and what is allowed.
    """

    #: Peak learning rate, in units of an Adam step; for matrices under the spectral method the largest
    #: singular value of a step.
    learning_rate: float = _number(_POSITIVE)
    #: Parameters that the benchmark types as embeddings learn at this many times the rate; the tables of
    #: criteo1tb are none of these.
    embedding_rate_factor: float = _number(_POSITIVE)
    #: One minus the decay rate of the first moment; 1 switches the first moment off.
    one_minus_beta1: float = _number(_DECAY)
    #: One minus the decay rate of factors and second moments. Raised in short runs, see pace.py.
    one_minus_beta2: float = _number(_DECAY)
    #: Added to second-moment denominators; factors get no ridge.
    epsilon: float = _number(_POSITIVE)
    #: Decoupled weight decay: a step shrinks weights by learning rate times this.
    weight_decay: float = _number(_NOT_NEGATIVE)
    #: Use the first moment one step ahead of its decay (Nesterov's form, as in NAdam).
    nesterov: bool = dataclasses.field(metadata={})
    #: Decay rate of a second momentum, on the preconditioned direction; 0 has none.
    momentum: float = _number(_PROPER_FRACTION)
    #: Method for weights that are matrices or convolutions.
    preconditioner: str = _choice("shampoo", "eigenvalue_corrected", "spectral")
    #: Power to which each side's factor is inverted; None is the method's own default.
    inverse_exponent: float | None = _number(_DECAY, optional=True)
    #: Largest side of a preconditioned block. Lowered in short runs, see pace.py, but not for the
    #: spectral method, which is about whole matrices.
    max_block_size: int = _number(Interval(1, 2**20), whole=True)
    #: Most steps between two refreshes of a root or basis. Shortened in short runs, see pace.py.
    refresh_interval: int = _number(Interval(1, 2**20), whole=True)
    #: Which average of the weights is evaluated.
    averaging: str = _choice("none", "weight_ema", "schedule_free", "primal")
    #: Shape of the learning rate after warm-up.
    schedule: str = _choice("cosine", "linear", "trapezoid", "constant")
    #: Warm-up, as a share of the schedule's steps.
    warmup_factor: float = _number(_PROPER_FRACTION)
    #: Length of the schedule, as a multiple of the workload's step hint.
    step_hint_factor: float = _number(_POSITIVE)
    #: Share of the target probability spread over all classes.
    label_smoothing: float = _number(_PROPER_FRACTION)
    #: Dropout rate handed to the model; None keeps the model's own.
    dropout_rate: float | None = _number(_PROPER_FRACTION, optional=True)
    #: Largest global norm of the gradient; None does not clip.
    grad_clip: float | None = _number(_POSITIVE, optional=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            problem = _problem(field, getattr(self, field.name))
            if problem:
                raise ValueError(
                    f"hyperparameter {field.name} = {getattr(self, field.name)!r}: {problem}"
                )
        if self.momentum > 0.0 and self.averaging != "none":
            raise ValueError(
                f"hyperparameter momentum = {self.momentum!r}: must be 0 where averaging is not "
                f"'none', got averaging = {self.averaging!r}"
            )

    @classmethod
    def from_namespace(cls, namespace: Any) -> Hyperparameters:
        """Read what the harness hands over.

        Args:
            namespace: A named tuple, a simple namespace or a mapping with exactly the fields of
                this class; an instance of it; or None for the built-in setting.

        Raises:
            ValueError: Names are missing or unknown (the message lists them), or a value is
                not allowed.
            TypeError: `namespace` is none of the kinds above.
        """
        if namespace is None:
            return SELF_TUNING
        if isinstance(namespace, cls):
            return namespace
        values = _as_mapping(namespace)
        known = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in known if name not in values]
        unknown = [name for name in values if name not in known]
        if missing or unknown:
            parts = []
            if missing:
                parts.append(f"missing: {_listed(missing)}")
            if unknown:
                parts.append(f"unknown: {_listed(unknown)}")
            raise ValueError(
                f"hyperparameters do not fit, {'; '.join(parts)}. "
                f"A point has exactly these names: {_listed(known)}"
            )
        return cls(**values)


def _as_mapping(namespace: Any) -> Mapping[str, Any]:
    """Return names and values of a named tuple, a simple namespace or a mapping."""
    if isinstance(namespace, Mapping):
        return namespace
    if hasattr(namespace, "_asdict"):
        values: Mapping[str, Any] = namespace._asdict()
        return values
    if hasattr(namespace, "__dict__"):
        return vars(namespace)
    raise TypeError(
        "hyperparameters must be a named tuple, a namespace, a mapping or None, "
        f"got {type(namespace).__name__}"
    )


def _problem(field: dataclasses.Field[Any], value: Any) -> str | None:
    """Say what is wrong with `value`, or None."""
    choices = field.metadata.get("choices")
    if choices is not None:
        return None if value in choices else f"must be one of {_listed(choices)}"
    allowed = field.metadata.get("allowed")
    if allowed is None:
        return None if isinstance(value, bool) else "must be true or false"
    if value is None and field.metadata["optional"]:
        return None
    wanted = int if field.metadata["whole"] else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or value not in allowed:
        kind = "a whole number" if field.metadata["whole"] else "a number"
        return f"must be {kind} {allowed}{' or null' if field.metadata['optional'] else ''}"
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


#: The one setting of the self-tuning ruleset.
SELF_TUNING = Hyperparameters(
    learning_rate=0.0025,
    embedding_rate_factor=1.0,
    one_minus_beta1=0.1,
    one_minus_beta2=0.005,
    epsilon=1e-8,
    weight_decay=0.08,
    nesterov=True,
    momentum=0.0,
    preconditioner="eigenvalue_corrected",
    inverse_exponent=None,
    max_block_size=1024,
    refresh_interval=50,
    averaging="weight_ema",
    schedule="cosine",
    warmup_factor=0.05,
    step_hint_factor=0.6,
    label_smoothing=0.1,
    dropout_rate=0.0,
    grad_clip=None,
)
