"""Random keys: the seeds that the runner hands to workloads and submissions.

A key is a pair of integers in [0, 2**31 - 1); the three functions derive keys from keys. Under
`--framework=pytorch` the official runner derives them with NumPy's Mersenne Twister, and so do we,
bit for bit: a submission sees the same keys in both.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `algoperf/random_utils.py`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Key = int | Sequence[int] | NDArray[np.int32]

_LIMIT = 2**31 - 1


def split(key: Key, num: int = 2) -> NDArray[np.int32]:
    """Derive independent keys.

    Args:
        key: A key, or any integer (negative and large ones wrap around).
        num: How many keys.

    Returns:
        Array of shape `(num, 2)`, one key a row.
    """
    return _generator(key).randint(0, _LIMIT, dtype=np.int32, size=[num, 2])


def fold_in(key: Key, data: int) -> list[int]:
    """Derive a key from a key and a number, such as the step: `[fresh integer, data]`."""
    return [int(_generator(key).randint(0, _LIMIT, dtype=np.int32)), data]


def PRNGKey(seed: Key) -> NDArray[np.int32]:
    """Turn a seed into a key of shape `(2,)`; the capitals are those that submissions import."""
    return split(seed, num=2)[0]


def _generator(key: Key) -> np.random.RandomState:
    """The generator a key stands for; the legacy one, whose stream NumPy never changes."""
    wrapped = key % _LIMIT if isinstance(key, int) else [int(part) % _LIMIT for part in key]
    return np.random.RandomState(seed=wrapped)
