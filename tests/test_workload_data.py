"""The data of the smoke workloads: queues, splits without leakage, generators as described."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads_smoke.data import (
    clicks,
    digits,
    language,
    molecules,
    phantoms,
    python_text,
    speech,
    street_digits,
    translation,
)
from workloads_smoke.data.byte_pairs import BytePairEncoder
from workloads_smoke.data.queue import InputQueue, gather_rows, seed_words
from workloads_smoke.registry import load_workload

# The queue.


def numbered(num_examples: int, batch_size: int, train: bool = True, **options: Any) -> InputQueue:
    gather = gather_rows({"inputs": torch.arange(num_examples)})
    return InputQueue(
        gather, num_examples, batch_size, seed=options.pop("seed", [1, 2]), train=train, **options
    )


def served(queue: InputQueue, num_batches: int) -> list[int]:
    batches = itertools.islice(queue, num_batches)
    return [number for batch in batches for number in batch["inputs"].tolist()]


@given(st.integers(1, 12), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_each_epoch_serves_each_example_once(num_examples: int, batch_size: int) -> None:
    """Across batch borders, also where a batch is longer than an epoch."""
    epochs = 3
    num_batches = -(-epochs * num_examples // batch_size)
    numbers = served(numbered(num_examples, batch_size), num_batches)
    for epoch in range(epochs):
        part = numbers[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part) == list(range(num_examples))


def test_epochs_differ_in_order() -> None:
    numbers = served(numbered(50, 50), 2)
    assert numbers[:50] != numbers[50:]


@given(st.integers(0, 20), st.booleans())
@settings(max_examples=20, deadline=None)
def test_skipping_is_serving_and_throwing_away(num_batches: int, train: bool) -> None:
    straight, skipping = numbered(7, 3, train), numbered(7, 3, train)
    served(straight, num_batches)
    skipping.skip(num_batches)
    assert straight.position == skipping.position == num_batches
    assert served(straight, 4) == served(skipping, 4)


def test_processes_take_their_rows_of_one_batch() -> None:
    whole = served(numbered(10, 6), 3)
    parts = [numbered(10, 6, rank=rank, world_size=3) for rank in range(3)]
    together = [number for _ in range(3) for part in parts for number in served(part, 1)]
    assert together == whole


def test_augmentation_is_of_the_global_batch() -> None:
    def add_noise(batch: Any, generator: torch.Generator) -> Any:
        return {"inputs": batch["inputs"] + torch.rand(len(batch["inputs"]), generator=generator)}

    whole = numbered(10, 6, augment=add_noise)
    parts = [numbered(10, 6, rank=rank, world_size=2, augment=add_noise) for rank in range(2)]
    for _ in range(3):
        assert served(whole, 1) == [n for part in parts for n in served(part, 1)]


def test_evaluation_repeats_in_order_and_fills_up() -> None:
    queue = numbered(5, 3, train=False)
    passes = [next(queue) for _ in range(4)]
    assert [b["weights"].tolist() for b in passes] == [[1, 1, 1], [1, 1, 0]] * 2
    assert [b["inputs"][b["weights"] > 0].tolist() for b in passes] == [[0, 1, 2], [3, 4]] * 2


def test_num_batches_ends_a_queue() -> None:
    assert len(list(numbered(5, 3, num_batches=4))) == 4


@pytest.mark.parametrize("size", [0, -2, 5])
def test_batch_sizes_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of the number of processes .2., got {size}"):
        numbered(10, size, world_size=2)


def test_seeds_of_all_official_kinds() -> None:
    assert seed_words(7) == [7]
    assert seed_words(np.array([3, 4], dtype=np.int32)) == seed_words([3, 4]) == [3, 4]
    assert seed_words([-1]) == [2**32 - 1]


# No example of one split is in another.


def rows(tensor: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in tensor}


def test_real_digits_are_in_one_split_only() -> None:
    images = {split: rows(digits.real_digits(split)[0]) for split in digits.REAL_IMAGES}
    assert sum(len(i) for i in images.values()) == len(set.union(*images.values()))
    assert sum(len(digits.real_digits(split)[0]) for split in images) == 1797
    with pytest.raises(ValueError, match="got 'dev'"):
        digits.real_digits("dev")


def test_backgrounds_of_splits_do_not_overlap() -> None:
    for picture in street_digits.photographs():
        width = picture.shape[2]
        columns = [
            range(int(low * width), int(high * width))
            for low, high in street_digits.REGIONS.values()
        ]
        assert not any(set(a) & set(b) for a, b in itertools.combinations(columns, 2))


def test_translations_share_no_source_and_no_target() -> None:
    data = translation.load_translation()
    for side in (data.sources, data.targets):
        every = [rows(side[split]) for split in translation.SPLIT_SIZES]
        assert sum(map(len, every)) == len(set.union(*every))
        assert [len(side[split]) for split in side] == list(translation.SPLIT_SIZES.values())


def test_language_splits_share_no_sequence() -> None:
    splits = language.load_language()
    every = [rows(sequences) for sequences in splits.values()]
    shared = [len(a & b) for a, b in itertools.combinations(every, 2)]
    assert max(shared) <= 2


def test_training_text_holds_no_passage_of_the_other_splits() -> None:
    """Wherever it begins: topics of the reference contain each other word for word."""
    streams = {
        split: [*sequences[:, :-1].flatten().tolist(), int(sequences[-1, -1])]
        for split, sequences in language.load_language().items()
    }
    known = set(language.passages(streams["train"]))
    assert len(known) > 300_000
    for split in ("validation", "test"):
        kept = language.without_passages(streams[split], known)
        # But where what was left out has brought two ends together.
        assert len(kept) > 0.995 * len(streams[split]), split


def test_passages_are_left_out_whole() -> None:
    length = language.PASSAGE_LENGTH
    known = set(language.passages(list(range(100, 100 + length + 1))))
    assert len(known) == 2
    tokens = [7, *range(100, 100 + length + 1), 8, *range(100, 100 + length - 1), 9]
    assert language.without_passages(tokens, known) == [7, 8, *range(100, 100 + length - 1), 9]
    assert language.passages([1, 2]) == []


@pytest.mark.parametrize(
    "load",
    [
        lambda split: phantoms.load_phantoms(split)["targets"],
        lambda split: speech.load_speech(split).features,
        lambda split: torch.from_numpy(molecules.load_molecules(split).bonds),
    ],
    ids=["phantoms", "speech", "molecules"],
)
def test_generated_splits_share_no_example(load: Any) -> None:
    every = [rows(load(split)) for split in ("train", "validation", "test")]
    assert sum(map(len, every)) == len(set.union(*every))


def test_click_records_of_splits_are_numbered_apart() -> None:
    spans = {s: range(f, f + n) for s, (f, n) in clicks.SPLIT_RECORDS.items()}
    assert spans["eval_train"][-1] in spans["train"]
    assert not set(spans["train"]) & set(spans["validation"])
    assert not set(spans["test"]) & (set(spans["train"]) | set(spans["validation"]))


# The generators do what they say.


def test_translation_drops_vowels_and_articles() -> None:
    assert translation.source_of("return a list of the items in use") == "rtrn lst f tms n s"
    assert translation.consonants("i") == "i"
    data = translation.load_translation()
    source, target = (side["validation"][0].tolist() for side in (data.sources, data.targets))
    assert data.decode(source) == translation.source_of(data.decode(target))
    assert data.decode([5, translation.END_ID, 6]) == data.tokens[5]


def test_too_short_documentation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "sentences", lambda: python_text.sentences()[:100])
    with pytest.raises(RuntimeError, match="sentence pairs, 3640 are needed"):
        translation.load_translation.__wrapped__()


def test_byte_pairs_by_hand() -> None:
    """The most frequent pair first, ties in the order of the alphabet."""
    encoder = BytePairEncoder(["aab aab ab", "b"], vocabulary_size=9)
    # (_, a) and (a, b) occur three times each; then (_a, a) and (a, b) twice; '_' is before 'a'.
    assert encoder.pieces[3:] == ["_", "a", "b", "_a", "_aa", "_aab"]
    assert [encoder.pieces[n] for n in encoder.encode("aab b")] == ["_aab", "_", "b", "<end>"]


@given(st.lists(st.text("abc-", min_size=1, max_size=6), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_byte_pairs_round_trip(words: list[str]) -> None:
    sentence = " ".join(words)
    encoder = BytePairEncoder([sentence, "a b c -"], vocabulary_size=20)
    assert encoder.decode(encoder.encode(sentence)) == sentence


def test_byte_pairs_refuse_a_vocabulary_below_the_characters() -> None:
    with pytest.raises(ValueError, match="at least 7"):
        BytePairEncoder(["abc"], vocabulary_size=6)


def test_clicks_follow_their_true_model() -> None:
    """Predicted probabilities match frequencies, and cannot be told from records' numbers."""
    numbers = np.arange(40_000)
    inputs, clicked = clicks.records(numbers)
    dense, rows = inputs[:, :13].astype(float), inputs[:, 13:].astype(int)
    odds = clicks.true_model().log_odds(dense, rows)
    probabilities = 1 / (1 + np.exp(-odds))
    for low in np.arange(0, 1, 0.2):
        chosen = (probabilities >= low) & (probabilities < low + 0.2)
        assert clicked[chosen].mean() == pytest.approx(probabilities[chosen].mean(), abs=0.02)
    again, _ = clicks.records(numbers[::-1])
    np.testing.assert_array_equal(again[::-1], inputs)
    assert rows.max() < clicks.VOCABULARY_SIZE


def test_click_ids_are_zipf_distributed() -> None:
    inputs, _ = clicks.records(np.arange(40_000))
    last = inputs[:, -1].astype(int) - clicks.true_model().field_starts[-1]
    counts = np.bincount(last, minlength=clicks.FIELD_SIZES[-1])
    weights = np.arange(1, clicks.FIELD_SIZES[-1] + 1) ** -1.1
    expected = 40_000 * weights / weights.sum()
    np.testing.assert_allclose(counts[:20], expected[:20], rtol=0.2)


def test_molecules_are_connected_with_symmetric_bonds() -> None:
    data = molecules.load_molecules("validation")
    for kinds, bonds in zip(data.kinds[:50], data.bonds[:50], strict=True):
        size = int((kinds >= 0).sum())
        assert not bonds[size:].any()
        np.testing.assert_array_equal(bonds, bonds.T)
        reached = np.linalg.matrix_power((bonds > 0) + np.eye(len(bonds), dtype=int), size)
        assert (reached[0, :size] > 0).all()


def test_molecule_labels_are_paths_of_atoms_but_for_noise() -> None:
    data = molecules.load_molecules("validation")
    paths = molecules._task_paths()
    wrong = total = 0
    for kinds, bonds, labels in zip(
        data.kinds[:60], data.bonds[:60], data.labels[:60], strict=True
    ):
        for task, (left, middle, right) in enumerate(paths):
            if np.isnan(labels[task]):
                continue
            found = any(
                kinds[i] == left and kinds[j] == middle and kinds[k] == right
                for j in range(len(kinds))
                for i in np.flatnonzero(bonds[j] > (1 if task % 2 else 0))
                for k in np.flatnonzero(bonds[j])
                if i != k
            )
            wrong += found != bool(labels[task])
            total += 1
    assert 0.5 < total / (60 * molecules.NUM_TASKS) < 0.85
    assert wrong / total == pytest.approx(molecules.LABEL_NOISE, abs=0.025)


def test_graph_batches_join_molecules() -> None:
    gather = molecules.gather_molecules(molecules.load_molecules("validation"))
    together = gather(torch.tensor([4, 9]))
    alone = [gather(torch.tensor([number])) for number in (4, 9)]
    graphs = [batch["inputs"] for batch in alone]
    joined = together["inputs"]
    torch.testing.assert_close(joined.nodes, torch.cat([g.nodes for g in graphs]))
    torch.testing.assert_close(joined.edges, torch.cat([g.edges for g in graphs]))
    shift = int(graphs[0].n_node[0])
    torch.testing.assert_close(
        joined.senders, torch.cat([graphs[0].senders, graphs[1].senders + shift])
    )
    model, _ = load_workload("ogbg").init_model_fn([0, 1])
    model.eval()
    separate = torch.cat([model(graph, 0.0) for graph in graphs])
    torch.testing.assert_close(model(joined, 0.0), separate, rtol=1e-4, atol=1e-5)


def test_absent_molecule_labels_touch_neither_loss_nor_gradient() -> None:
    workload = load_workload("ogbg")
    logits = torch.zeros(2, 3, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    loss = workload.loss_fn(labels, logits, mask)
    assert loss["n_valid_examples"] == 4
    assert loss["summed"].item() == pytest.approx(4 * np.log(2))
    (gradient,) = torch.autograd.grad(loss["summed"], logits)
    assert torch.equal(gradient == 0, ~mask)
    with pytest.raises(ValueError, match="mask_batch"):  # officially an AttributeError
        workload.loss_fn(labels, logits)


def test_absent_molecule_labels_are_zero_as_officially() -> None:
    """A submission that multiplies losses by weights gets no NaN."""
    known = molecules.load_molecules("validation")
    batch = molecules.gather_molecules(known)(torch.arange(len(known.labels)))
    absent = torch.from_numpy(np.isnan(known.labels))
    assert absent.any()
    assert torch.equal(batch["weights"], ~absent)
    assert bool((batch["targets"][absent] == 0.0).all())
    assert set(batch["targets"].unique().tolist()) == {0.0, 1.0}


def test_undersampling_keeps_a_quarter_of_the_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    images = phantoms.draw_phantoms(200, generator)
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(1, 2))
    measured = phantoms.undersample(images, generator)
    # Energy can only be lost, by Parseval; the middle of the spectrum always survives.
    assert (measured.square().sum(dim=(1, 2)) <= images.square().sum(dim=(1, 2)) + 1e-3).all()
    torch.testing.assert_close(
        measured.mean(dim=(1, 2)) >= spectrum[:, 16, 16].abs() / 32**2 - 1e-5,
        torch.ones(200, dtype=torch.bool),
    )


def test_speech_tokens_spell_words_of_the_lexicon() -> None:
    words = set(speech.lexicon())
    data = speech.load_speech("validation")
    for tokens, paddings in zip(data.tokens, data.token_paddings, strict=True):
        text = speech.text_of(tokens[paddings == 0].tolist())
        assert len(text.split()) == speech.NUM_WORDS
        assert set(text.split()) <= words
        assert speech.tokens_of(text) == tokens[paddings == 0].tolist()


def test_speech_has_enough_frames_for_ctc() -> None:
    """A quarter of the frames must hold all tokens, and a blank between equal neighbours."""
    data = speech.load_speech("train")
    frames = ((1 - data.feature_paddings)[:, ::4]).sum(dim=1)
    tokens = (1 - data.token_paddings).sum(dim=1)
    repeats = ((data.tokens[:, 1:] == data.tokens[:, :-1]) & (data.tokens[:, 1:] > 0)).sum(dim=1)
    assert (frames >= tokens + repeats).float().mean() == 1.0


def test_mixed_up_targets_are_soft_labels() -> None:
    batch = {"inputs": torch.rand(6, 3, 24, 24), "targets": torch.arange(6)}
    mixed = street_digits.mix_up(batch, torch.Generator().manual_seed(3))
    torch.testing.assert_close(mixed["targets"].sum(dim=1), torch.ones(6))
    weight = mixed["targets"][2, 2]
    expected = weight * batch["inputs"][2] + (1 - weight) * batch["inputs"][1]
    torch.testing.assert_close(mixed["inputs"][2], expected)


def test_shifts_move_whole_images() -> None:
    images = torch.rand(20, 3, 24, 24)
    moved = street_digits.shift({"inputs": images}, torch.Generator().manual_seed(0))["inputs"]
    for image, shifted in zip(images, moved, strict=True):
        candidates = [
            (shifted[:, 2:-2, 2:-2] == image[:, 2 + i : 22 + i, 2 + j : 22 + j]).all()
            for i in range(-2, 3)
            for j in range(-2, 3)
        ]
        assert sum(bool(c) for c in candidates) == 1
