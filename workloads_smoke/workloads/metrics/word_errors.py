"""Word errors of transcripts: edit distance on words."""

from collections.abc import Sequence


def edit_distance(source: Sequence[str], target: Sequence[str]) -> int:
    """Return the least number of insertions, deletions and replacements between two sequences."""
    previous = list(range(len(target) + 1))
    for i, word in enumerate(source, start=1):
        current = [i]
        for j, expected in enumerate(target, start=1):
            replaced = previous[j - 1] + (word != expected)
            current.append(min(replaced, previous[j] + 1, current[j - 1] + 1))
        previous = current
    return previous[-1]


def word_errors(transcript: str, reference: str) -> tuple[int, int]:
    """Return the number of word errors of a transcript and of words in the reference."""
    expected = reference.split()
    return edit_distance(transcript.split(), expected), len(expected)
