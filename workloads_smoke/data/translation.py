"""Sentence pairs: Python's prose without its vowels, and the prose itself.

The source is like a text in a consonant script; the translator must know the words and choose by
context where several share their consonants ('frm': form, from, frame).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from workloads_smoke.data.byte_pairs import PAD_ID, BytePairEncoder
from workloads_smoke.data.python_text import drop_vowels, sentences

VOCABULARY_SIZE = 512
MAX_TOKENS = 24
# Sizes that the texts of Python 3.11 to 3.13 all allow.
SPLIT_SIZES = {"train": 5_600, "validation": 320, "test": 320}


@dataclass(frozen=True)
class Translation:
    """Token numbers of all splits, shape (pairs, MAX_TOKENS), padded with zeros."""

    encoder: BytePairEncoder
    sources: dict[str, Tensor]
    targets: dict[str, Tensor]


def _padded(rows: list[list[int]]) -> Tensor:
    tokens = torch.full((len(rows), MAX_TOKENS), PAD_ID, dtype=torch.int64)
    for row, numbers in zip(tokens, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    return tokens


@functools.cache
def load_translation() -> Translation:
    """Return the pairs of all splits.

    The vocabulary is learned from both sides of the training pairs alone.

    Raises:
        RuntimeError: If this Python's documentation has too few sentences.
    """
    texts = sentences()
    spelled = [" ".join(drop_vowels(word) for word in text.split()) for text in texts]
    learned = SPLIT_SIZES["train"]
    encoder = BytePairEncoder(texts[:learned] + tuple(spelled[:learned]), VOCABULARY_SIZE)
    pairs = [
        (source, target)
        for source, target in zip(
            map(encoder.encode, spelled), map(encoder.encode, texts), strict=True
        )
        if max(len(source), len(target)) <= MAX_TOKENS
    ]
    needed = sum(SPLIT_SIZES.values())
    if len(pairs) < needed:
        raise RuntimeError(
            f"this Python's documentation gives {len(pairs)} sentence pairs, {needed} are needed."
        )
    sources, targets, start = {}, {}, 0
    for split, size in SPLIT_SIZES.items():
        chosen = pairs[start : start + size]
        sources[split] = _padded([source for source, _ in chosen])
        targets[split] = _padded([target for _, target in chosen])
        start += size
    return Translation(encoder, sources, targets)
