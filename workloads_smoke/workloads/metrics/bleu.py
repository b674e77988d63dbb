"""Corpus BLEU (Papineni et al. 2002) on words, smoothed as in the benchmark.

An n-gram order without a match counts 1/2, 1/4, ... matches, halved for each such order ("exp"
smoothing of sacrebleu, Chen & Cherry 2014, technique 3).
"""

import math
from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4


def ngram_counts(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Count the n-grams of one order."""
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def bleu_statistics(prediction: str, reference: str) -> list[int]:
    """Return what BLEU adds up over a corpus.

    Args:
        prediction: Words separated by blanks.
        reference: Likewise.

    Returns:
        Lengths of prediction and reference, then for each order 1 to 4 the number of matching
        and of all n-grams of the prediction.
    """
    predicted, expected = prediction.split(), reference.split()
    statistics = [len(predicted), len(expected)]
    for order in range(1, MAX_ORDER + 1):
        found = ngram_counts(predicted, order)
        matches = found & ngram_counts(expected, order)
        statistics += [matches.total(), found.total()]
    return statistics


def bleu_score(statistics: Sequence[float]) -> float:
    """Return BLEU in [0, 100] from the sums of `bleu_statistics` over a corpus."""
    predicted_length, expected_length = statistics[:2]
    log_precisions = 0.0
    smoothing = 1.0
    for order in range(1, MAX_ORDER + 1):
        matches, total = statistics[2 * order : 2 * order + 2]
        if total == 0:
            return 0.0
        if matches == 0:
            smoothing /= 2
            matches = smoothing
        log_precisions += math.log(matches / total)
    brevity = min(0.0, 1 - expected_length / predicted_length)
    return 100 * math.exp(log_precisions / MAX_ORDER + brevity)


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return BLEU in [0, 100] of predictions with one reference each."""
    pairs = zip(predictions, references, strict=True)
    columns = zip(*(bleu_statistics(p, r) for p, r in pairs), strict=True)
    return bleu_score([sum(column) for column in columns])
