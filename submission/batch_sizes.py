"""Global batch sizes, the one thing that the rules let depend on a workload's name."""

from __future__ import annotations

#: The official workloads, their variants that need less memory, and the harness's two examples.
BATCH_SIZES = {
    "cifar": 128,
    "criteo1tb": 262_144,
    "fastmri": 32,
    "finewebedu_lm": 64,
    "imagenet_resnet": 1024,
    "imagenet_resnet_gelu": 512,
    "imagenet_resnet_silu": 512,
    "imagenet_vit": 1024,
    "librispeech_conformer": 200,
    "librispeech_deepspeech": 224,
    "mnist": 64,
    "ogbg": 512,
    "wmt": 128,
}


def batch_size(workload_name: str) -> int:
    """Return the global batch size for `workload_name`.

    Raises:
        ValueError: The workload is unknown. The harness counts on this kind of error: it asks
            again with the name of the base workload of a variant.
    """
    if workload_name not in BATCH_SIZES:
        raise ValueError(
            f"no batch size for workload {workload_name!r}; known: {', '.join(BATCH_SIZES)}"
        )
    return BATCH_SIZES[workload_name]
