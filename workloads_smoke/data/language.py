"""Token sequences of Python's documentation, for a language model.

Whole documents are dealt out to the splits, since one module's docstrings repeat each other.
"""

import functools
import random
import re

import torch
from torch import Tensor

from workloads_smoke.data.byte_pairs import BytePairEncoder
from workloads_smoke.data.python_text import documents

VOCABULARY_SIZE = 512
SEQUENCE_LENGTH = 64
# Sequences of each split; the texts of Python 3.11 to 3.13 all allow these sizes.
SPLIT_SIZES = {"validation": 256, "test": 256, "train": 5_632}
_SEED = 40240


@functools.cache
def load_language() -> dict[str, Tensor]:
    """Return the sequences of each split, shape (sequences, SEQUENCE_LENGTH + 1).

    Each sequence overlaps the next by one token, so that inputs and targets are its first and last
    SEQUENCE_LENGTH tokens. The vocabulary is learned from a part of the training documents.

    Raises:
        RuntimeError: If this Python's documentation is too short.
    """
    texts = [" ".join(re.findall(r"[!-~]+", text.lower())) for text in documents()]
    random.Random(_SEED).shuffle(texts)
    # Training documents come last; learning from all of them would take seconds for nothing.
    encoder = BytePairEncoder(texts[len(texts) // 2 :], VOCABULARY_SIZE)
    splits = {}
    remaining = iter(texts)
    for split, size in SPLIT_SIZES.items():
        tokens: list[int] = []
        while len(tokens) <= size * SEQUENCE_LENGTH:
            text = next(remaining, None)
            if text is None:
                raise RuntimeError(
                    f"this Python's documentation is too short for {size} sequences of {split}."
                )
            tokens += encoder.encode(text)
        stream = torch.tensor(tokens[: size * SEQUENCE_LENGTH + 1])
        splits[split] = stream.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH).clone()
    return splits
