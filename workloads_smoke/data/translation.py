"""Sentence pairs: Python's prose without vowels and articles, and the prose itself.

The source is like a text in a script and language that have neither. The translator must know the
words, choose by context where several share their consonants ('n': in, on, no, one, an), and find
the places of 'a', 'an' and 'the', so that the two sides do not run word by word in parallel.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from workloads_smoke.data.python_text import sentences

PAD_ID = 0
END_ID = 2
_SPECIAL = ("<pad>", "<begin>", "<end>")
NUM_WORDS = 1_200
# Room for the words, for what consonants they leave, and for the special tokens.
VOCABULARY_SIZE = 2_304
MAX_TOKENS = 16
# Sizes that the texts of Python 3.11 to 3.13 all allow.
SPLIT_SIZES = {"train": 3_000, "validation": 320, "test": 320}
_ARTICLES = ("a", "an", "the")


def consonants(word: str) -> str:
    """Return a word without its vowels, or the word where nothing else is in it."""
    return re.sub("[aeiou]", "", word) or word


def source_of(sentence: str) -> str:
    """Return the source of a sentence: consonants, without articles."""
    return " ".join(consonants(word) for word in sentence.split() if word not in _ARTICLES)


@dataclass(frozen=True)
class Translation:
    """Pairs of all splits.

    Attributes:
        tokens: All tokens; a token's number is its place.
        sources: Numbers of each split's sources, shape (pairs, MAX_TOKENS), padded with zeros.
        targets: Likewise of the targets.
    """

    tokens: tuple[str, ...]
    sources: dict[str, Tensor]
    targets: dict[str, Tensor]

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the sentence up to the first end token; other special tokens are left out."""
        words = []
        for number in numbers:
            if number == END_ID:
                break
            if len(_SPECIAL) <= number < len(self.tokens):
                words.append(self.tokens[number])
        return " ".join(words)


def known_sentences() -> list[str]:
    """Return sentences made of the NUM_WORDS most frequent words, no two of the same source."""
    every = sentences()
    counts = Counter(word for sentence in every for word in sentence.split())
    # Ties in the order of the alphabet, so that the choice is unique.
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    known = set(ordered[:NUM_WORDS])
    distinct: dict[str, str] = {}
    for sentence in every:
        source = source_of(sentence)
        if source and known.issuperset(sentence.split()):
            distinct.setdefault(source, sentence)
    return list(distinct.values())


@functools.cache
def load_translation() -> Translation:
    """Return the pairs of all splits.

    Raises:
        RuntimeError: If this Python's documentation has too few sentences.
    """
    pairs = [(source_of(target), target) for target in known_sentences()]
    needed = sum(SPLIT_SIZES.values())
    if len(pairs) < needed:
        raise RuntimeError(
            f"this Python's documentation gives {len(pairs)} sentence pairs, {needed} are needed."
        )
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    tokens = (*_SPECIAL, *words)
    if len(tokens) > VOCABULARY_SIZE:
        raise RuntimeError(f"{len(tokens)} tokens do not fit a vocabulary of {VOCABULARY_SIZE}.")
    numbers = {token: number for number, token in enumerate(tokens)}
    sources, targets, start = {}, {}, 0
    for split, size in SPLIT_SIZES.items():
        chosen = pairs[start : start + size]
        sources[split] = _numbered((source for source, _ in chosen), numbers)
        targets[split] = _numbered((target for _, target in chosen), numbers)
        start += size
    return Translation(tokens, sources, targets)


def _numbered(texts: Iterable[str], numbers: dict[str, int]) -> Tensor:
    rows = []
    for text in texts:
        row = [*(numbers[word] for word in text.split()), END_ID]
        rows.append(row + [PAD_ID] * (MAX_TOKENS - len(row)))
    return torch.tensor(rows)
