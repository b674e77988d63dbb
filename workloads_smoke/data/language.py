"""Token sequences of Python's documentation, for a language model.

Whole documents are dealt out to the splits, since one module's docstrings repeat each other. Documents
contain passages of others, too: of those, training keeps none that the other splits have.
"""

import functools
import itertools
import random
import re
from array import array

import torch
from torch import Tensor

from workloads_smoke.data.byte_pairs import BytePairEncoder
from workloads_smoke.data.python_text import documents

VOCABULARY_SIZE = 512
SEQUENCE_LENGTH = 64
# Sequences of each split; the texts of Python 3.11 to 3.13 all allow these sizes.
SPLIT_SIZES = {"validation": 256, "test": 256, "train": 5_632}
# So many tokens in a row, some sentences, are a passage.
PASSAGE_LENGTH = 32
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
    held_out: set[bytes] = set()
    for split, size in SPLIT_SIZES.items():
        num_tokens = size * SEQUENCE_LENGTH + 1
        tokens: list[int] = []
        while len(tokens) < num_tokens:
            text = next(remaining, None)
            if text is None:
                raise RuntimeError(
                    f"this Python's documentation is too short for {size} sequences of {split}."
                )
            encoded = encoder.encode(text)
            tokens += without_passages(encoded, held_out) if split == "train" else encoded
        del tokens[num_tokens:]
        if split != "train":
            held_out |= set(passages(tokens))
        stream = torch.tensor(tokens)
        splits[split] = stream.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH).clone()
    return splits


def passages(tokens: list[int]) -> list[bytes]:
    """Every PASSAGE_LENGTH tokens in a row, from each of them on; none of fewer tokens than that."""
    packed = array("H", tokens)
    size = packed.itemsize
    data, length = packed.tobytes(), PASSAGE_LENGTH * size
    return [data[at : at + length] for at in range(0, len(data) - length + 1, size)]


def without_passages(tokens: list[int], known: set[bytes]) -> list[int]:
    """Leave out every token that belongs to a known passage."""
    kept = [True] * len(tokens)
    for start, passage in enumerate(passages(tokens)):
        if passage in known:
            kept[start : start + PASSAGE_LENGTH] = [False] * PASSAGE_LENGTH
    return list(itertools.compress(tokens, kept))
