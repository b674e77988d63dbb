"""Writes an offline data set for the official harness's `mnist` workload.

`python -m workloads_smoke.harness_data --data_dir DIR` fills `DIR/mnist/3.0.1` with what
`tfds.load("mnist", data_dir=DIR)` reads without a download: 60000 training and 10000 test images,
28 x 28 x 1, uint8, with labels 0 to 9. TensorFlow is not needed to write it.

The digits are not MNIST's. They are those that scikit-learn ships, enlarged and distorted
(`workloads_smoke.data.digits`). Training, validation (the harness takes the last 10000 training
examples) and test images come from different handwritten originals.

Source of the layout: tensorflow-datasets 4.9.9, "Format of the generated dataset" and its builder
of `mnist`, version 3.0.1.
"""

import json
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from absl import app, flags, logging
from numpy.typing import NDArray

from workloads_smoke.data.digits import NUM_CLASSES, SIDE, distort, real_digits
from workloads_smoke.errors import UserError
from workloads_smoke.folders import check_folder
from workloads_smoke.tfrecord import encode_example, write_records

VERSION = "3.0.1"  # of tensorflow-datasets' builder of mnist, which reads only its own version

# The harness's workload counts on 60000 training examples and validates on the last 10000.
NUM_EXAMPLES = {"train": 50_000, "validation": 10_000, "test": 10_000}

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_GREY = 0


class Split(NamedTuple):
    """Images, uint8 of shape `(n, 28, 28)`, and their labels, integers of shape `(n,)`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def offline_digits(
    seed: int = 0, num_examples: Mapping[str, int] = NUM_EXAMPLES
) -> dict[str, Split]:
    """Distort scikit-learn's digits into as many images as the official workload has.

    Args:
        seed: Of the distortions and the order; the same seed gives the same pixels.
        num_examples: Images to make of the real ones of `train`, `validation` and `test`.

    Returns:
        The splits `train`, which ends with the validation images, and `test`.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: _draw(name, count, generator) for name, count in num_examples.items()}
    train, validation = drawn["train"], drawn["validation"]
    images = np.concatenate([train.images, validation.images])
    labels = np.concatenate([train.labels, validation.labels])
    return {"train": Split(images, labels), "test": drawn["test"]}


def write_mnist(
    data_dir: Path,
    *,
    seed: int = 0,
    num_examples: Mapping[str, int] = NUM_EXAMPLES,
    overwrite: bool = False,
) -> Path:
    """Write the digits as tensorflow-datasets' `mnist`.

    The files appear together, when all are complete: they are written to a folder beside the
    target, which then takes its place.

    Args:
        data_dir: Root of a tensorflow-datasets folder; other data sets in it stay as they are.
        seed: As of `offline_digits`.
        num_examples: As of `offline_digits`.
        overwrite: Replace a data set that is already there.

    Returns:
        The folder written, `data_dir/mnist/3.0.1`.

    Raises:
        FileExistsError: The target holds files and `overwrite` is off.
    """
    target = data_dir / "mnist" / VERSION
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{target} is not empty, and may be a real MNIST: choose another --data_dir, "
            "or replace it with --overwrite"
        )
    splits = offline_digits(seed, num_examples)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        split_infos = [_write_split(new, name, split) for name, split in splits.items()]
        _write_json(new / "features.json", _features())
        (new / "label.labels.txt").write_text("".join(f"{k}\n" for k in range(NUM_CLASSES)))
        _write_json(new / "dataset_info.json", _dataset_info(split_infos))
        if target.exists():
            target.rename(old)
        new.rename(target)
    return target


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode a grey image as PNG: 8 bits a pixel, no filter.

    Args:
        image: Pixels, uint8 of shape `(height, width)`.

    Returns:
        The file's bytes.
    """
    height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_GREY, 0, 0, 0)
    rows = np.pad(image, ((0, 0), (1, 0)))  # every row starts with its filter's number, 0
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return _PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _draw(name: str, count: int, generator: torch.Generator) -> Split:
    """Distort the real images of one split in turn, and put the result in random order."""
    real, labels = real_digits(name)
    chosen = torch.randperm(count, generator=generator) % len(labels)
    grey = distort(real[chosen], generator).clamp(0, 1).mul(255).round()
    return Split(grey.squeeze(1).to(torch.uint8).numpy(), labels[chosen].numpy())


def _examples(split: Split) -> Iterator[bytes]:
    for image, label in zip(*split, strict=True):
        yield encode_example({"image": encode_png(image), "label": int(label)})


def _write_split(folder: Path, name: str, split: Split) -> dict[str, Any]:
    """Write one split as a single shard and return its entry of `dataset_info.json`."""
    path = folder / f"mnist-{name}.tfrecord-00000-of-00001"
    sizes = write_records(path, _examples(split))
    return {
        "name": name,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        # 64-bit integers are strings in the JSON form of protocol buffers.
        "numBytes": str(sum(sizes)),
        "shardLengths": [str(len(sizes))],
    }


def _dataset_info(split_infos: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": "mnist",
        "version": VERSION,
        "description": (
            "A stand-in for MNIST: the handwritten digits of scikit-learn, enlarged to 28 x 28 "
            "and augmented. Written by algoperf-shampoo's workloads_smoke.harness_data."
        ),
        "fileFormat": "tfrecord",
        "moduleName": "tensorflow_datasets.image_classification.mnist",
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
        "splits": split_infos,
    }


def _features() -> dict[str, Any]:
    package = "tensorflow_datasets.core.features"
    image = {
        "pythonClassName": f"{package}.image_feature.Image",
        "image": {
            "shape": {"dimensions": [str(SIDE), str(SIDE), "1"]},
            "dtype": "uint8",
            "encodingFormat": "png",
        },
    }
    label = {
        "pythonClassName": f"{package}.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(NUM_CLASSES)},
    }
    return {
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label}},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _define_flags() -> None:
    flags.DEFINE_string(
        "data_dir", None, "Folder to write into, the harness's --data_dir.", required=True
    )
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of distortions and order.",
        lower_bound=-(2**63),
        upper_bound=2**63 - 1,  # what torch's generators take
    )
    flags.DEFINE_boolean("overwrite", False, "Replace a data set that is already there.")


def main(argv: list[str]) -> int:
    """Write the data set that the flags ask for; returns the exit status."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    data_dir = Path(flags.FLAGS.data_dir).expanduser()
    try:
        check_folder(data_dir / "mnist" / VERSION, "--data_dir")
        target = write_mnist(data_dir, seed=flags.FLAGS.seed, overwrite=flags.FLAGS.overwrite)
    except (UserError, FileExistsError) as error:
        logging.error("%s", error)
        return 1
    logging.info("Wrote %s; pass --data_dir=%s to submission_runner.py.", target, data_dir)
    return 0


if __name__ == "__main__":
    _define_flags()
    app.run(main)
