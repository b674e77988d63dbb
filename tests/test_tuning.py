"""Search spaces: the official generator's points, and errors that name file and hyperparameter."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads_smoke.errors import UserError
from workloads_smoke.tuning import halton_sequence, read_hyperparameters, sample_ranges

# First three points of `algoperf.halton.generate_search`, mlcommons/algorithmic-efficiency v0.6, its
# final shuffle left out, for two of its own search spaces.
# algorithms/development_algorithms/mnist/tuning_search_space.json
MNIST_SPACE = {
    "learning_rate": {"min": 1e-4, "max": 1e-2, "scaling": "log"},
    "one_minus_beta_1": {"min": 0.9, "max": 0.999, "scaling": "log"},
    "epsilon": {"feasible_points": [1e-8, 1e-5, 1e-3]},
}
MNIST_POINTS = [
    (0.00018805814126031094, 0.9261041856291229, 1e-08),
    (0.004102837916179185, 0.9980795034695658, 0.001),
    (0.0003264380984723828, 0.9218860746682127, 1e-05),
]
# algorithms/archived_paper_baselines/adamw/tuning_search_space.json
ADAMW_SPACE = {
    "learning_rate": {"min": 1e-4, "max": 1e-2, "scaling": "log"},
    "one_minus_beta1": {"min": 2e-2, "max": 0.5, "scaling": "log"},
    "beta2": {"feasible_points": [0.999]},
    "warmup_factor": {"feasible_points": [0.05]},
    "weight_decay": {"min": 5e-3, "max": 1.0, "scaling": "log"},
    "label_smoothing": {"feasible_points": [0.1, 0.2]},
    "dropout_rate": {"feasible_points": [0.0, 0.1]},
}
ADAMW_POINTS = [
    (0.0019814680146414726, 0.22838767981804783, 0.999, 0.05, 0.010340635370188849, 0.1, 0.0),
    (0.0002366315233112939, 0.03838470136970223, 0.999, 0.05, 0.358796133013872, 0.2, 0.1),
    (0.0009554263254837416, 0.26408799816091044, 0.999, 0.05, 0.01950318659958426, 0.1, 0.0),
]
# `generate_sequence(3, 2, shuffle_sequence=False)` of the same file.
SEQUENCE = [
    (0.2739744372653363, 0.28612427728381884),
    (0.9911667058309517, 0.8300193327833143),
    (0.23023079535282354, 0.36079632571974196),
]


def write(folder: Path, content: Any) -> Path:
    path = folder / "space.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("space", "points"), [(MNIST_SPACE, MNIST_POINTS), (ADAMW_SPACE, ADAMW_POINTS)]
)
def test_points_are_the_official_ones(tmp_path: Path, space: Any, points: Any) -> None:
    drawn = read_hyperparameters(write(tmp_path, space), 3)
    assert [tuple(point) for point in drawn] == points
    assert drawn[0]._fields == tuple(space)
    assert type(drawn[0]).__name__ == "Hyperparameters"


def test_the_sequence_is_the_official_one() -> None:
    assert list(zip(*halton_sequence(3, 2), strict=True)) == SEQUENCE


def test_linear_scaling() -> None:
    space = {"a": {"min": -1.0, "max": 3.0, "scaling": "linear"}}
    (column,) = halton_sequence(4, 1)
    assert [point["a"] for point in sample_ranges(space, 4)] == [x * 4.0 - 1.0 for x in column]


def test_fewer_trials_are_the_first_of_more() -> None:
    assert sample_ranges(ADAMW_SPACE, 20)[:5] == sample_ranges(ADAMW_SPACE, 5)


def test_more_dimensions_than_primes_below_a_thousand() -> None:
    columns = halton_sequence(5, 200)
    assert len(columns) == 200
    assert len({tuple(column) for column in columns}) == 200


@settings(max_examples=30)
@given(
    low=st.floats(1e-8, 1.0), ratio=st.floats(1.0, 1e6), scaling=st.sampled_from(["linear", "log"])
)
def test_points_stay_in_their_range(low: float, ratio: float, scaling: str) -> None:
    space = {"a": {"min": low, "max": low * ratio, "scaling": scaling}}
    for point in sample_ranges(space, 30):
        assert low <= point["a"] <= low * ratio or math.isclose(point["a"], low * ratio)


def test_a_list_gives_its_points_in_order(tmp_path: Path) -> None:
    points = [{"lr": 0.1, "wd": 0}, {"lr": 0.2, "wd": 1}, {"wd": 2, "lr": 0.3}]
    path = write(tmp_path, points)
    assert [point._asdict() for point in read_hyperparameters(path, 2)] == points[:2]
    assert [point.lr for point in read_hyperparameters(path, 7)] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'lr': 1}", "is not JSON: line 1, column 2: Expecting property name enclosed"),
        ("", "is not JSON: line 1, column 1"),
        ("3", "must hold an object of ranges or a list of points, got 3"),
        ([], "is an empty list"),
        ({}, "has no hyperparameters"),
        ([{}], "has no hyperparameters"),
        ([{"lr": 1}, 4], "point 2 must be an object of hyperparameters, got 4"),
        ([{"lr": 1, "wd": 0}, {"lr": 1}], "point 2 lacks hyperparameter 'wd', which another"),
        ([{"lr": 1}, {"lr": 1, "wd": 0}], "point 1 lacks hyperparameter 'wd', which another"),
        ({"lr": {"min": 1, "max": 2}}, "hyperparameter 'lr' lacks 'scaling'"),
        ({"lr": {"max": 2}}, "hyperparameter 'lr' lacks 'min', 'scaling'"),
        ({"lr": 0.1}, "hyperparameter 'lr' must be an object, got 0.1"),
        ({"lr": {"feasible_points": []}}, "hyperparameter 'lr' needs a non-empty list"),
        (
            {"lr": {"min": 2, "max": 1, "scaling": "log"}},
            "hyperparameter 'lr' needs 'min' <= 'max', got 2 > 1",
        ),
        (
            {"lr": {"min": 0, "max": float("inf"), "scaling": "linear"}},
            "hyperparameter 'lr' needs a finite number as 'max', got inf",
        ),
        (
            {"lr": {"min": 0, "max": 1, "scaling": "log"}},
            "hyperparameter 'lr' needs 'min' > 0 under log scaling, got 0",
        ),
        (
            {"lr": {"min": 0, "max": 1, "scaling": "exp"}},
            "hyperparameter 'lr' needs 'linear' or 'log' as 'scaling', got 'exp'",
        ),
        (
            {"lr": {"min": "0", "max": 1, "scaling": "log"}},
            "hyperparameter 'lr' needs a number as 'min', got \"0\"",
        ),
        ({"learning rate": {"feasible_points": [1]}}, "'learning rate' must be a Python name"),
        ({"_lr": {"feasible_points": [1]}}, "'_lr' must be a Python name"),
        ({"lambda": {"feasible_points": [1]}}, "'lambda' must be a Python name"),
    ],
)
def test_errors_name_file_and_hyperparameter(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_hyperparameters(path, 2)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_binary_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read search space .*none.json: No such file"):
        read_hyperparameters(tmp_path / "none.json", 1)
    path = tmp_path / "space.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_hyperparameters(path, 1)


def test_no_trials() -> None:
    with pytest.raises(UserError, match="--num_tuning_trials must be at least 1, got 0"):
        read_hyperparameters(Path("space.json"), 0)
