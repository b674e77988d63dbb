"""Which workloads there are, by their official names, and how to build one.

Modules load lazily: listing the names costs nothing, and a run of one workload does not import
the code or data of the others.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from workloads_smoke.workloads.base import SmokeWorkload


@dataclass(frozen=True)
class WorkloadEntry:
    """Where a workload's class is and one line about it."""

    module: str
    class_name: str
    summary: str

    def load(self) -> type[SmokeWorkload]:
        """Import the module and return the class."""
        module = importlib.import_module(f"workloads_smoke.workloads.{self.module}")
        return cast("type[SmokeWorkload]", getattr(module, self.class_name))


WORKLOADS: dict[str, WorkloadEntry] = {
    "mnist": WorkloadEntry(
        "mnist", "MnistWorkload", "two-layer perceptron on scikit-learn's handwritten digits"
    ),
    "wmt": WorkloadEntry(
        "wmt", "WmtWorkload", "encoder-decoder transformer that restores vowels in Python's prose"
    ),
    "finewebedu_lm": WorkloadEntry(
        "finewebedu_lm", "LmWorkload", "decoder-only transformer on Python's documentation"
    ),
    "fastmri": WorkloadEntry("fastmri", "FastMRIWorkload", "U-Net that restores MRI phantoms"),
    "imagenet_resnet": WorkloadEntry(
        "imagenet_resnet", "ImagenetResNetWorkload", "batch-norm residual net on digits over photos"
    ),
    "imagenet_vit": WorkloadEntry(
        "imagenet_vit", "ImagenetVitWorkload", "vision transformer on digits over photos, mixed up"
    ),
    "criteo1tb": WorkloadEntry(
        "criteo1tb", "Criteo1TbWorkload", "deep recommendation model on generated clicks"
    ),
    "librispeech_conformer": WorkloadEntry(
        "librispeech_conformer", "LibriSpeechConformerWorkload", "conformer on generated speech"
    ),
    "librispeech_deepspeech": WorkloadEntry(
        "librispeech_deepspeech",
        "LibriSpeechDeepSpeechWorkload",
        "recurrent network with batch norm on generated speech",
    ),
    "ogbg": WorkloadEntry(
        "ogbg", "OgbgWorkload", "graph network on generated molecules, labels missing"
    ),
}


def load_workload(name: str) -> SmokeWorkload:
    """Build a workload by its official name.

    Args:
        name: A key of `WORKLOADS`.

    Raises:
        ValueError: If there is no such workload; the message lists the known ones.
    """
    if name not in WORKLOADS:
        known = ", ".join(sorted(WORKLOADS))
        raise ValueError(f"unknown workload {name!r}; known ones: {known}")
    return WORKLOADS[name].load()()
