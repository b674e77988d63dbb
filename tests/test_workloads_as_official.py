"""Smoke workloads inside the official harness's environment, and metrics against its own."""

import json

import pytest
from official_harness import require_harness

pytestmark = [pytest.mark.harness, pytest.mark.timeout(600)]

SCRIPT = """
import json
import numpy as np
import torch
from algoperf import spec as official
from algoperf.workloads.fastmri.fastmri_pytorch.ssim import ssim
from algoperf.workloads.librispeech_conformer.metrics import edit_distance as official_distance
from algoperf.workloads.wmt.bleu import corpus_bleu as official_bleu
from workloads_smoke import spec
from workloads_smoke.data.translation import load_translation
from workloads_smoke.registry import WORKLOADS, load_workload
from workloads_smoke.workloads.metrics.bleu import corpus_bleu
from workloads_smoke.workloads.metrics.ssim import structural_similarity
from workloads_smoke.workloads.metrics.word_errors import edit_distance

torch.set_num_threads(1)
found = {"workloads": [], "bleu": [], "ssim": [], "distance": []}
for name in WORKLOADS:
    workload = load_workload(name)
    assert isinstance(workload, official.Workload)
    model, state = workload.init_model_fn(np.array([1, 2], dtype=np.int32))
    assert set(map(type, workload.model_params_types.values())) == {official.ParameterType}
    queue = workload._build_input_queue(np.array([3, 4]), "train", "", 4)
    batch = next(queue)
    logits, _ = workload.model_fn(
        model, batch, state, official.ForwardPassMode.TRAIN, None, update_batch_norm=True
    )
    loss = workload.loss_fn(batch["targets"], logits, batch.get("weights"))
    loss["summed"].backward()
    results = workload._eval_model_on_split("validation", 8, 4, model, None, [5, 6], "")
    assert workload.target_metric_name in results
    found["workloads"].append(name)

data = load_translation()
references = [data.decode(row.tolist()) for row in data.targets["validation"][:60]]
rng = np.random.default_rng(0)
for loss in (0.0, 0.1, 0.4, 0.9):
    words = [r.split() for r in references]
    predictions = [" ".join(w if rng.random() > loss else "x" for w in ws) for ws in words]
    found["bleu"].append(
        [corpus_bleu(predictions, references), official_bleu(predictions, [references]).score]
    )
images = torch.rand(4, 20, 24)
noisy = images + 0.1 * torch.randn(images.shape)
ranges = torch.tensor([1.0, 2.0, 0.7, 0.0])
ours = structural_similarity(noisy, images, ranges).tolist()
theirs = ssim(noisy, images, volume_max=ranges).tolist()
found["ssim"] = [ours, theirs]
for first, second in zip(references[:20], references[20:40]):
    found["distance"].append(
        [edit_distance(first.split(), second.split()), official_distance(first, second)]
    )
print(json.dumps(found))
"""


def test_workloads_run_and_metrics_agree() -> None:
    done = require_harness().run("-c", SCRIPT, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["workloads"]) == 10
    for ours, theirs in (*found["bleu"], *found["distance"]):
        assert ours == pytest.approx(theirs, rel=1e-6)
    ours, theirs = found["ssim"]
    assert ours == pytest.approx(theirs, abs=1e-4)
