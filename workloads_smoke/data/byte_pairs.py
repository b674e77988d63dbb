"""Byte-pair encoding of words, learned from a list of sentences (Sennrich et al. 2016).

A word is spelled with its characters behind a mark of its beginning, and the most frequent
neighbours are merged into one piece again and again. Every word over the known characters can be
spelled, so there is no unknown token.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain, pairwise

PAD_ID = 0
BEGIN_ID = 1
END_ID = 2
NUM_SPECIAL = 3
_WORD_START = "_"
# Merges are learned from the most frequent words; rarer ones hardly change them but cost time.
_LEARNING_WORDS = 3_000

Pair = tuple[str, str]


class BytePairEncoder:
    """Turns sentences into token numbers and back.

    Attributes:
        pieces: The vocabulary; a piece's number is its place. The first three are special.
    """

    def __init__(self, sentences: Iterable[str], vocabulary_size: int) -> None:
        """Learn the pieces.

        Args:
            sentences: Words separated by single spaces.
            vocabulary_size: Number of pieces, special ones included.

        Raises:
            ValueError: If the characters alone exceed the vocabulary.
        """
        counts = Counter(word for sentence in sentences for word in sentence.split())
        characters = sorted({_WORD_START, *chain.from_iterable(counts)})
        frequent = (word for word, _ in counts.most_common(_LEARNING_WORDS))
        spelled = {word: [_WORD_START, *word] for word in frequent}
        self.pieces = ["<pad>", "<begin>", "<end>", *characters]
        if len(self.pieces) > vocabulary_size:
            raise ValueError(
                f"vocabulary_size must be at least {len(self.pieces)} for the characters in the "
                f"text, got {vocabulary_size}."
            )
        self._ranks: dict[Pair, int] = {}
        self._learn(spelled, counts, vocabulary_size)
        self._numbers = {piece: number for number, piece in enumerate(self.pieces)}
        self._cache: dict[str, list[int]] = {}

    def _learn(
        self, spelled: dict[str, list[str]], counts: Counter[str], vocabulary_size: int
    ) -> None:
        """Merge the most frequent pair until the vocabulary is full or no pair is left.

        Pair counts are kept up to date word by word, and their order by a heap whose outdated
        entries are skipped: counting and sorting anew after each merge would take seconds.
        """
        frequency: Counter[Pair] = Counter()
        words_with: defaultdict[Pair, set[str]] = defaultdict(set)

        def count_pairs(word: str, sign: int) -> None:
            pieces = spelled[word]
            for pair in pairwise(pieces):
                frequency[pair] += sign * counts[word]
                words_with[pair].add(word)
                changed.add(pair)

        changed: set[Pair] = set()
        for word in spelled:
            count_pairs(word, 1)
        # Ties go to the pair first in the alphabet, so that the result is unique.
        heap = [(-count, pair) for pair, count in frequency.items()]
        heapq.heapify(heap)
        while heap and len(self.pieces) < vocabulary_size:
            count, pair = heapq.heappop(heap)
            if -count != frequency[pair] or count == 0:
                continue
            self._ranks[pair] = len(self._ranks)
            if "".join(pair) not in self.pieces:
                self.pieces.append("".join(pair))
            changed.clear()
            for word in words_with.pop(pair):
                count_pairs(word, -1)
                spelled[word] = merge(spelled[word], pair)
                count_pairs(word, 1)
            for other in changed:
                heapq.heappush(heap, (-frequency[other], other))

    def _spell(self, word: str) -> list[int]:
        if word not in self._cache:
            pieces = [_WORD_START, *word]
            while True:
                pairs = [p for p in pairwise(pieces) if p in self._ranks]
                if not pairs:
                    break
                pieces = merge(pieces, min(pairs, key=self._ranks.__getitem__))
            self._cache[word] = [self._numbers[piece] for piece in pieces]
        return self._cache[word]

    def encode(self, sentence: str) -> list[int]:
        """Return the token numbers of a sentence, the end token last.

        Raises:
            KeyError: If the sentence has a character that the learning text lacked.
        """
        return [number for word in sentence.split() for number in self._spell(word)] + [END_ID]

    def decode(self, numbers: Iterable[int]) -> str:
        """Return the sentence up to the first end token; other special tokens are left out."""
        pieces = []
        for number in numbers:
            if number == END_ID:
                break
            if number >= NUM_SPECIAL:
                pieces.append(self.pieces[number])
        return "".join(pieces).replace(_WORD_START, " ").strip()


def merge(pieces: list[str], pair: Pair) -> list[str]:
    """Join every occurrence of a pair of neighbours, from left to right."""
    merged: list[str] = []
    position = 0
    while position < len(pieces):
        if tuple(pieces[position : position + 2]) == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(pieces[position])
            position += 1
    return merged
