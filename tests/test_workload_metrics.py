"""The workloads' metrics against plain references and cases computed by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from workloads_smoke.workloads.metrics.average_precision import (
    average_precision,
    mean_average_precision,
)
from workloads_smoke.workloads.metrics.bleu import corpus_bleu
from workloads_smoke.workloads.metrics.ssim import structural_similarity
from workloads_smoke.workloads.metrics.word_errors import edit_distance, word_errors
from workloads_smoke.workloads.speech import greedy_decode

# BLEU.


def test_bleu_of_the_reference_itself_is_100() -> None:
    sentences = ["the cat is on the mat", "a dog ran away quickly"]
    assert corpus_bleu(sentences, sentences) == pytest.approx(100.0)


def test_bleu_by_hand() -> None:
    """Matches: 5/6 unigrams, 3/5 bigrams, 2/4 trigrams, 1/3 four-grams; lengths equal."""
    score = corpus_bleu(["the cat sat on the mat"], ["the cat is on the mat"])
    # 'the cat', 'on the', 'the mat'; 'on the mat'; no four-gram: smoothed to one half.
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25
    assert score == pytest.approx(expected, rel=1e-12)


def test_bleu_clips_counts_and_penalises_brevity() -> None:
    """'the the' against one 'the' matches once; shorter than its reference: exp(1 - 4/2)."""
    score = corpus_bleu(["the the", "a b c d"], ["the cat is on", "a b c d"])
    # Orders 1 to 4: matches (1+4, 0+3, 2, 1) of (2+4, 1+3, 2, 1); lengths 6 and 8.
    expected = 100 * math.exp(1 - 8 / 6) * (5 / 6 * 3 / 4 * 1 * 1) ** 0.25
    assert score == pytest.approx(expected, rel=1e-12)


def test_bleu_is_not_symmetric_in_length_and_zero_without_four_grams() -> None:
    assert corpus_bleu(["a b c"], ["a b c"]) == 0.0
    assert corpus_bleu([""], ["a b c d"]) == 0.0
    longer = corpus_bleu(["a b c d e"], ["a b c d"])
    assert longer == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rel=1e-12)


# Word errors.


def plain_edit_distance(source: tuple[str, ...], target: tuple[str, ...]) -> int:
    """The definition, by recursion."""
    if not source or not target:
        return len(source) + len(target)
    return min(
        plain_edit_distance(source[1:], target) + 1,
        plain_edit_distance(source, target[1:]) + 1,
        plain_edit_distance(source[1:], target[1:]) + (source[0] != target[0]),
    )


words = st.lists(st.sampled_from("abc"), max_size=5).map(tuple)


@given(words, words)
@settings(max_examples=60, deadline=None)
def test_edit_distance_is_its_definition(source: tuple[str, ...], target: tuple[str, ...]) -> None:
    assert edit_distance(source, target) == plain_edit_distance(source, target)


def test_word_errors_count_words_of_the_reference() -> None:
    assert word_errors("one too three four", "one two three") == (2, 3)
    assert word_errors("", "one two") == (2, 2)
    assert word_errors(" one  two ", "one two") == (0, 2)


def test_greedy_decoding_merges_repeats_and_drops_blanks_and_padding() -> None:
    best = torch.tensor([[0, 2, 2, 0, 2, 3, 3, 0], [4, 4, 1, 5, 5, 5, 6, 6]])
    paddings = torch.tensor([[0.0] * 8, [0.0] * 5 + [1.0] * 3])
    logits = torch.nn.functional.one_hot(best, 7).float()
    assert greedy_decode(logits, paddings) == [[2, 2, 3], [4, 1, 5]]


# Mean average precision.


@given(st.integers(0, 10_000), st.integers(2, 30), st.booleans())
@settings(max_examples=40, deadline=None)
def test_average_precision_is_sklearns(seed: int, count: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size=count)
    labels[0] = 1
    scores = rng.integers(0, 4, size=count).astype(float) if ties else rng.normal(size=count)
    assert average_precision(labels, scores) == pytest.approx(
        average_precision_score(labels, scores), abs=1e-12
    )


def test_mean_average_precision_leaves_out_absent_labels_and_one_sided_tasks() -> None:
    labels = np.array([[1, 1, np.nan], [0, 1, 0], [1, 1, 1], [np.nan, 1, 1]])
    scores = np.array([[0.9, 0.1, 9.0], [0.5, 0.2, 0.5], [0.1, 0.3, 0.4], [5.0, 0.4, 0.6]])
    present = ~np.isnan(labels)
    # Task 0: ranked 1, 0, 1: (1 + 2/3) / 2. Task 1 has no negative. Task 2: ranked 1, 0, 1.
    assert mean_average_precision(labels, scores, present) == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(mean_average_precision(labels[:, [1]], scores[:, [1]], present[:, [1]]))


def test_scores_that_are_not_finite_have_no_average_precision() -> None:
    """A model that diverged has no order of scores, but where the label is absent anyway."""
    labels = np.array([[1.0], [0.0], [1.0]])
    present = np.array([[True], [True], [False]])
    finite, absent, diverged = ([0.2, 0.1, 0.3], [0.2, 0.1, np.nan], [0.2, np.nan, 0.3])
    values = [mean_average_precision(labels, np.c_[s], present) for s in (finite, absent, diverged)]
    assert values[:2] == [1.0, 1.0]
    assert math.isnan(values[2])


# Structural similarity.


def plain_ssim(x: np.ndarray, y: np.ndarray, data_range: float, window: int = 7) -> float:
    """The formula of Wang et al. 2004, one window after the other."""
    values = []
    height, width = x.shape
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for i, j in itertools.product(range(height - window + 1), range(width - window + 1)):
        a = x[i : i + window, j : j + window].ravel()
        b = y[i : i + window, j : j + window].ravel()
        covariance = np.cov(a, b)
        top = (2 * a.mean() * b.mean() + c1) * (2 * covariance[0, 1] + c2)
        bottom = (a.mean() ** 2 + b.mean() ** 2 + c1) * (covariance.trace() + c2)
        values.append(top / bottom)
    return float(np.mean(values))


def test_ssim_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((3, 12, 15))
    y = x + 0.2 * rng.normal(size=x.shape)
    ranges = np.array([1.0, 2.0, 0.5])
    found = structural_similarity(*(torch.from_numpy(a) for a in (x, y, ranges)))
    expected = [plain_ssim(*triple) for triple in zip(x, y, ranges, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_ssim_of_equal_images_is_one_even_where_padding_left_no_range() -> None:
    images = torch.rand(2, 9, 9)
    similarity = structural_similarity(images, images, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(similarity, torch.ones(2, dtype=torch.float64))
