"""The offline data set for the official harness: its files, its digits, and who can read it."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_harness import REPOSITORY, require_harness
from PIL import Image
from test_tfrecord import decode_example, read_records

from workloads_smoke.data.digits import real_digits
from workloads_smoke.harness_data import NUM_EXAMPLES, encode_png, offline_digits, write_mnist

SMALL = {"train": 30, "validation": 7, "test": 5}


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workloads_smoke.harness_data", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_hold_the_digits_in_order(tmp_path: Path) -> None:
    target = write_mnist(tmp_path, seed=3, num_examples=SMALL)
    for name, split in offline_digits(3, SMALL).items():
        records = read_records(target / f"mnist-{name}.tfrecord-00000-of-00001")
        examples = [decode_example(record) for record in records]
        assert [example["label"] for example in examples] == split.labels.tolist()
        for example, pixels in zip(examples, split.images, strict=True):
            assert example.keys() == {"image", "label"}
            assert isinstance(example["image"], bytes)
            image = Image.open(io.BytesIO(example["image"]))
            assert (image.format, image.mode) == ("PNG", "L")
            assert np.array_equal(np.asarray(image), pixels)


def test_the_description_agrees_with_the_records(tmp_path: Path) -> None:
    target = write_mnist(tmp_path, num_examples=SMALL)
    info = json.loads((target / "dataset_info.json").read_text())
    assert (info["name"], info["version"], info["fileFormat"]) == ("mnist", "3.0.1", "tfrecord")
    described = {split["name"]: split for split in info["splits"]}
    assert described.keys() == {"train", "test"}
    for name, split in described.items():
        records = read_records(target / f"mnist-{name}.tfrecord-00000-of-00001")
        assert split["shardLengths"] == [str(len(records))]
        assert split["numBytes"] == str(sum(map(len, records)))
    features = json.loads((target / "features.json").read_text())["featuresDict"]["features"]
    assert features["image"]["image"]["shape"]["dimensions"] == ["28", "28", "1"]
    assert features["label"]["classLabel"]["numClasses"] == "10"
    assert (target / "label.labels.txt").read_text().split() == list("0123456789")


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        files_of(write_mnist(tmp_path / name, seed=seed, num_examples=SMALL))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert (
        first["mnist-train.tfrecord-00000-of-00001"] != other["mnist-train.tfrecord-00000-of-00001"]
    )


def test_splits_are_balanced_as_large_as_asked_and_of_their_own_originals() -> None:
    splits = offline_digits(0, {"train": 1300, "validation": 300, "test": 600})
    assert {name: split.images.shape for name, split in splits.items()} == {
        "train": (1600, 28, 28),
        "test": (600, 28, 28),
    }
    # Each original is used equally often, up to one copy.
    made = {"validation": splits["train"].labels[1300:], "test": splits["test"].labels}
    for split, labels in made.items():
        originals = np.bincount(real_digits(split)[1], minlength=10)
        copies = len(labels) / originals.sum()
        counts = np.bincount(labels, minlength=10)
        assert np.all(counts >= originals * math.floor(copies))
        assert np.all(counts <= originals * math.ceil(copies))
    for split in splits.values():
        assert split.images.dtype == np.uint8
        assert split.images.max() == 255


def test_the_default_size_is_that_of_the_official_workload() -> None:
    assert NUM_EXAMPLES["train"] + NUM_EXAMPLES["validation"] == 60_000
    assert NUM_EXAMPLES["test"] == 10_000


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (28, 28)])
def test_png_is_lossless(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


def test_a_data_set_that_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "mnist" / "3.0.1"
    target.mkdir(parents=True)
    (target / "precious").write_text("the real thing")
    with pytest.raises(FileExistsError, match=r"may be a real MNIST: .* --overwrite"):
        write_mnist(tmp_path, num_examples=SMALL)
    assert files_of(target) == {"precious": b"the real thing"}

    write_mnist(tmp_path, num_examples=SMALL, overwrite=True)
    assert "precious" not in files_of(target)
    assert [path.name for path in target.parent.iterdir()] == ["3.0.1"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_mnist(tmp_path, num_examples=SMALL)
    before = files_of(target)

    def disk_full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("workloads_smoke.harness_data.write_records", disk_full)
    with pytest.raises(OSError, match="disk full"):
        write_mnist(tmp_path, seed=1, num_examples=SMALL, overwrite=True)
    assert files_of(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["3.0.1"]


def test_the_command_refuses_before_it_works(tmp_path: Path) -> None:
    write_mnist(tmp_path, num_examples=SMALL)
    refused = run_command(f"--data_dir={tmp_path}")
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr
    assert "Traceback" not in refused.stderr
    file = tmp_path / "file"
    file.touch()
    taken = run_command(f"--data_dir={file}")
    assert taken.returncode == 1
    assert f"--data_dir: {file} is no folder; move it away" in taken.stderr
    assert "Traceback" not in taken.stderr
    missing = run_command()
    assert missing.returncode == 1
    assert "data_dir" in missing.stderr


READ_WITH_TFDS = """
import json, sys
import numpy as np
import tensorflow_datasets as tfds

summary = {}
for split in ("train[:50000]", "train[50000:]", "test"):
    data = tfds.load("mnist", split=split, data_dir=sys.argv[1], download=False)
    spec = data.element_spec
    images, labels = zip(*((x["image"], x["label"]) for x in tfds.as_numpy(data)))
    summary[split] = {
        "image": [list(spec["image"].shape), spec["image"].dtype.name],
        "label": [list(spec["label"].shape), spec["label"].dtype.name],
        "count": len(labels),
        "pixel_sum": int(np.stack(images).sum(dtype=np.int64)),
        "label_sum": int(np.sum(labels)),
    }
print("SUMMARY " + json.dumps(summary))
"""


@pytest.mark.harness
@pytest.mark.timeout(600)
def test_tensorflow_datasets_reads_every_example(tmp_path: Path) -> None:
    harness = require_harness()
    written = run_command(f"--data_dir={tmp_path}")
    assert written.returncode == 0, written.stderr
    read = harness.run("-c", READ_WITH_TFDS, os.fspath(tmp_path))
    assert read.returncode == 0, read.stderr
    (line,) = (line for line in read.stdout.splitlines() if line.startswith("SUMMARY "))
    summary = json.loads(line.removeprefix("SUMMARY "))

    splits = offline_digits()
    train, test = splits["train"], splits["test"]
    expected = {
        "train[:50000]": (train.images[:50_000], train.labels[:50_000]),
        "train[50000:]": (train.images[50_000:], train.labels[50_000:]),
        "test": (test.images, test.labels),
    }
    for name, (images, labels) in expected.items():
        assert summary[name] == {
            "image": [[28, 28, 1], "uint8"],
            "label": [[], "int64"],
            "count": len(labels),
            "pixel_sum": int(images.sum(dtype=np.int64)),
            "label_sum": int(labels.sum()),
        }
