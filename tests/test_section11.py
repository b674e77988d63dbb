"""The reference numbers of ALGORITHMS.md section 11, out of shampoo_core in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.compare import assert_close
from reference.section11 import CASES, W0, Case
from section11_configurations import configuration, schedule

from shampoo_core import DistributedShampoo


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_number(case: Case) -> None:
    weight = torch.nn.Parameter(torch.tensor(W0))
    # Cut at 3, so that the 2 x 3 parameter stays a matrix and is one block.
    optimizer = DistributedShampoo([weight], max_block_size=3, **configuration(case))
    for step, (gradient, _) in enumerate(case.inputs(), start=1):
        optimizer.param_groups[0].update(schedule(case, step))
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    assert_close(weight.detach().numpy().ravel(), np.array(case.expected), case.tolerance)
    if case.expected_x is not None:
        optimizer.eval()
        assert_close(weight.detach().numpy().ravel(), np.array(case.expected_x), case.tolerance)
