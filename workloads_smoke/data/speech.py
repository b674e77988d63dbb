"""Generated speech: spectra of spoken words from Python's prose, letter by letter.

A speaker says three words. Each letter has a smooth spectrum of its own and lasts a random time;
neighbours blend into each other; a speaker has a pitch shift and a loudness tilt; the recording
has noise. What is hard about real speech is there: variable lengths, unknown alignment, speakers
not heard in training, and words that help to tell letters apart.
"""

import functools
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workloads_smoke.data.python_text import sentences

BLANK_ID = 0
SPACE_ID = 1
# Blank, space, then the letters.
NUM_TOKENS = 28
NUM_BINS = 20
MAX_FRAMES = 128
MAX_TOKENS = 20
NUM_WORDS = 3
SPLIT_SIZES = {"train": 3_200, "validation": 320, "test": 320}
_LEXICON_SIZE = 300
_LETTER_FRAMES = (4, 8)
_NOISE = 0.35
_SEED = 90240


class Speech(NamedTuple):
    """Utterances of a split; paddings are 1 beyond the end.

    Attributes:
        features: Shape (utterances, MAX_FRAMES, NUM_BINS).
        feature_paddings: Shape (utterances, MAX_FRAMES).
        tokens: Shape (utterances, MAX_TOKENS), 0 beyond the end.
        token_paddings: Shape (utterances, MAX_TOKENS).
    """

    features: Tensor
    feature_paddings: Tensor
    tokens: Tensor
    token_paddings: Tensor


def lexicon() -> list[str]:
    """Return the most frequent words of three to five letters."""
    counts = Counter(
        word
        for sentence in sentences()
        for word in sentence.split()
        if word.isalpha() and 3 <= len(word) <= 5
    )
    # Ties in the order of the alphabet, so that the list is unique.
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][
        :_LEXICON_SIZE
    ]


def tokens_of(text: str) -> list[int]:
    """Return the token of each character of lower-case words."""
    return [SPACE_ID if letter == " " else ord(letter) - ord("a") + 2 for letter in text]


def text_of(tokens: list[int]) -> str:
    """Return the text of tokens; blanks are left out."""
    letters = (" " if t == SPACE_ID else chr(t - 2 + ord("a")) for t in tokens if t != BLANK_ID)
    return "".join(letters)


@functools.cache
def _letter_spectra() -> np.ndarray:
    """Return the spectrum of each token, shape (NUM_TOKENS, NUM_BINS): two or three peaks."""
    rng = np.random.default_rng(_SEED)
    bins = np.arange(NUM_BINS)
    centers = rng.uniform(0, NUM_BINS - 1, size=(NUM_TOKENS, 3, 1))
    heights = rng.uniform(0.3, 1.5, size=(NUM_TOKENS, 3, 1))
    widths = rng.uniform(0.8, 2.0, size=(NUM_TOKENS, 3, 1))
    spectra = (heights * np.exp(-0.5 * ((bins - centers) / widths) ** 2)).sum(axis=1)
    # A pause between words is nearly silent.
    spectra[[BLANK_ID, SPACE_ID]] = 0.05
    result: np.ndarray = spectra
    return result


@functools.cache
def load_speech(split: str) -> Speech:
    """Return the utterances of a split: 'train', 'validation' or 'test'."""
    rng = np.random.default_rng([_SEED, list(SPLIT_SIZES).index(split)])
    words = lexicon()
    # Zipf's law, as in running text.
    weights = 1 / np.arange(2, len(words) + 2)
    count = SPLIT_SIZES[split]
    chosen = rng.choice(len(words), p=weights / weights.sum(), size=(count, NUM_WORDS))
    features = np.zeros((count, MAX_FRAMES, NUM_BINS), dtype=np.float32)
    feature_paddings = np.ones((count, MAX_FRAMES), dtype=np.float32)
    tokens = np.zeros((count, MAX_TOKENS), dtype=np.int64)
    token_paddings = np.ones((count, MAX_TOKENS), dtype=np.float32)
    for row, numbers in enumerate(chosen):
        said = tokens_of(" ".join(words[number] for number in numbers))
        spectra = speak(said, rng)
        features[row, : len(spectra)] = spectra
        feature_paddings[row, : len(spectra)] = 0
        tokens[row, : len(said)] = said
        token_paddings[row, : len(said)] = 0
    arrays = (features, feature_paddings, tokens, token_paddings)
    return Speech(*(torch.from_numpy(array) for array in arrays))


def speak(tokens: list[int], rng: np.random.Generator) -> np.ndarray:
    """Return the frames of an utterance by a new speaker, at most MAX_FRAMES, (frames, bins)."""
    low, high = _LETTER_FRAMES
    durations = rng.integers(low, high + 1, size=len(tokens))
    # Long utterances are spoken faster instead of being cut off.
    durations = np.maximum(durations * min(1.0, MAX_FRAMES / durations.sum()), 1).astype(int)
    frames = _letter_spectra()[np.repeat(tokens, durations)]
    # Neighbours blend: a mean over five frames.
    padded = np.pad(frames, ((2, 2), (0, 0)), mode="edge")
    frames = np.stack([padded[i : i + len(frames)] for i in range(5)]).mean(axis=0)
    pitch = rng.uniform(-0.8, 0.8)
    places = np.arange(NUM_BINS) - pitch
    below = np.clip(np.floor(places).astype(int), 0, NUM_BINS - 2)
    share = np.clip(places - below, 0, 1)
    frames = frames[:, below] * (1 - share) + frames[:, below + 1] * share
    loudness = rng.uniform(0.7, 1.3) + rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, NUM_BINS)
    result: np.ndarray = 2 * (frames * loudness + _NOISE * rng.normal(size=frames.shape) - 0.35)
    return result
