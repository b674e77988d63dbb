"""Stepping blocks in waves: the same results and checkpoints, in a bounded amount of memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed_cases import (
    CASES,
    FULL_RANK,
    METHODS,
    assert_close,
    tolerance_of,
    trajectory,
)
from hypothesis import given
from hypothesis import strategies as st
from quadratic import assert_same, optimizer_for, parameters, run

from benchmarks.models import workload_parameters
from shampoo_core import (
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    SGDConfig,
    ShampooConfig,
    StaggeredRefresh,
    WeightEMA,
)
from shampoo_core.blocking import cut_tile, tiles_of
from shampoo_core.counting import OperationCounter
from shampoo_core.exchange.division import Division, divide
from shampoo_core.groups import portion_limit, wave_limit
from shampoo_core.live_memory import LiveMemory
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.refresh import RefreshPolicy
from shampoo_core.stacks import StackSet

BOTH = pytest.mark.parametrize("config", [ShampooConfig(), EigenvalueCorrectedConfig()])
WITHOUT_REFRESH = ("spectral", "adam", "row-wise adagrad", "decay after")
WAVE = 300
"""Numbers: blocks of 16 x 16 one by one, smaller ones some at a time."""


@pytest.mark.parametrize("name", CASES)
def test_waves_change_nothing(name: str) -> None:
    case = CASES[name]
    whole, waves = (
        trajectory(replace(case, options={**case.options, "max_wave_numel": limit}))
        for limit in (None, WAVE)
    )
    assert_close(name, waves, whole, tolerance_of(case))


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple), st.integers(1, 5), st.data()
)
def test_a_tile_cut_by_labels_has_all_blocks_in_order(
    shape: tuple[int, ...], limit: int, data: st.DataObject
) -> None:
    for tile in tiles_of(0, shape, limit):
        labels = data.draw(
            st.lists(st.integers(0, 2), min_size=tile.num_blocks, max_size=tile.num_blocks)
        )
        parts = list(cut_tile(tile, labels))
        where = [(label, index) for label, part in parts for index in part.grid_indices()]
        assert where == list(zip(labels, tile.grid_indices(), strict=True))
        for _, part in parts:
            steps = zip(part.grid_starts, tile.grid_starts, tile.sizes, strict=True)
            moved = [start + (own - first) * size for start, (own, first, size) in zip(
                tile.starts, steps, strict=True
            )]  # fmt: skip
            assert part.starts == tuple(moved)


def test_rows_of_one_label_stay_one_tile() -> None:
    (tile,) = tiles_of(0, (40, 20), 10)
    parts = [(label, part.counts) for label, part in cut_tile(tile, [0, 0, 0, 0, 0, 1, 1, 1])]
    assert parts == [(0, (2, 2)), (0, (1, 1)), (1, (1, 1)), (1, (1, 2))]


@given(
    st.lists(
        st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
    ),
    st.integers(1, 4),
    st.integers(1, 200),
)
def test_waves_hold_what_their_owner_has_and_no_more_than_allowed(
    shapes: list[tuple[int, ...]], num_ranks: int, limit: int
) -> None:
    tiles = [tile for index, shape in enumerate(shapes) for tile in tiles_of(index, shape, 5)]
    whole = StackSet(tiles, dtype=torch.float32, device=torch.device("meta"))
    division = divide(whole, math.prod, [0.0] * num_ranks, 0)
    waves = division.waves(limit)
    for rank, own in enumerate(division.by_rank):
        parts = [wave.by_rank[rank] for wave in waves]
        assert all(part.numel <= limit or part.num_blocks == 1 for part in parts)
        assert all(a.numel + _first_block(b) > limit for a, b in itertools.pairwise(parts) if b)
        found = [block for part in parts for block in blocks_of(part)]
        assert sorted(found) == sorted(blocks_of(own))
        for part in parts:
            assert all(places == sorted(places) for places in part.positions())
            assert part.whole is whole
    for wave in waves:
        everyone = [block for part in wave.by_rank for block in blocks_of(part)]
        assert sorted(everyone) == sorted(blocks_of(wave.whole))


def _first_block(stack_set: StackSet) -> int:
    return math.prod(stack_set.layouts[0].block_shape)


def blocks_of(stack_set: StackSet) -> list[tuple[int, tuple[int, ...]]]:
    return [block for layout in stack_set.layouts for block in layout.blocks()]


@BOTH
@pytest.mark.parametrize(("before", "after"), [(None, WAVE), (WAVE, None), (WAVE, 1000)])
def test_checkpoints_fit_any_size_of_waves(
    config: PreconditionerConfig, before: int | None, after: int | None
) -> None:
    options: dict[str, Any] = {
        "preconditioner": config,
        "refresh": StaggeredRefresh(3, FULL_RANK),
        "averaging": WeightEMA(),
    }
    whole, first = parameters(), parameters()
    run(optimizer_for(whole, **options), whole, range(1, 11))
    saving = optimizer_for(first, max_wave_numel=before, **options)
    run(saving, first, range(1, 8))
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    loading = optimizer_for(second, max_wave_numel=after, **options)
    loading.load_state_dict(saving.state_dict())
    assert loading.param_groups[0]["max_wave_numel"] == after
    run(loading, second, range(8, 11))
    assert_same(second, whole, 1e-12)


def test_states_from_before_there_were_waves_load() -> None:
    params = parameters()
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 3))
    state = optimizer.state_dict()
    del state["param_groups"][0]["max_wave_numel"]
    optimizer_for(params, max_wave_numel=WAVE).load_state_dict(state)


TALL: tuple[tuple[int, ...], ...] = ((48, 4), (7,), (32, 6), (4, 32), (16, 16), (5, 4, 3, 3))
"""Blocks whose factors are several times as large as they are: up to 256 numbers for 64."""
PORTIONED = {
    **{name: METHODS[name] for name in METHODS if name not in WITHOUT_REFRESH},
    "eigenvalue-corrected, adaptive": {
        "refresh": AdaptiveRefresh(2, FULL_RANK, threshold=0.2),
        "preconditioner": EigenvalueCorrectedConfig(),
    },
    "eigenvalue-corrected, permuting": {
        "refresh": FixedRefresh(2, FULL_RANK),
        "preconditioner": EigenvalueCorrectedConfig(
            solver=OrthogonalIterationSolver(), second_moments="permute"
        ),
    },
    "per-factor corrected, adaptive": {
        "refresh": AdaptiveRefresh(2, FULL_RANK, threshold=0.2),
        "preconditioner": PerFactorCorrectedConfig(),
    },
    "in few bits": {
        "refresh": FixedRefresh(2, FULL_RANK),
        "preconditioner": EigenvalueCorrectedConfig(storage="8bit"),
    },
}


@pytest.mark.parametrize("name", PORTIONED)
def test_portions_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is one wave; its factors, the two of a block as well, are solved apart."""
    options = {"max_block_size": 16, "lr": 0.01, **PORTIONED[name]}
    whole, expected = parameters(TALL), parameters(TALL)
    run(DistributedShampoo(expected, **options), expected, range(1, 13))
    monkeypatch.setattr(Division, "waves", lambda division, limit: [division])
    run(DistributedShampoo(whole, **options, max_wave_numel=300), whole, range(1, 13))
    assert_same(whole, expected, 1e-10)


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_refresh_waits_once_for_every_portion() -> None:
    params = parameters([(16, 16), (16, 16), (3, 5)], torch.float32)
    for limit, waits in ((None, 1), (1000, 2), (256, 5)):
        optimizer = optimizer_for(params, refresh=FixedRefresh(2), max_wave_numel=limit)
        counts = []
        for step in (1, 2):
            with OperationCounter() as counter:
                run(optimizer, params, range(step, step + 1))
            counts.append(counter.num_synchronisations)
        assert counts == [0, waits], limit


def test_groups_choose_for_themselves() -> None:
    params = parameters()
    optimizer = optimizer_for(
        [{"params": params[:3], "max_wave_numel": WAVE}, {"params": params[3:]}]
    )
    assert [len(engines) for engines in optimizer._engines] == [3, 1]


@pytest.mark.parametrize(
    ("rows", "device", "groups", "expected"),
    [
        (2**17, "meta", 1, [1]),
        (2**17 + 1024, "meta", 1, [2]),
        (2**18 + 1024, "meta", 1, [3]),
        (2**17, "meta", 2, [1, 1]),
        (2**11, "cpu", 1, [1]),
        (2**12, "cpu", 1, [2]),
    ],
)
def test_how_much_is_stepped_at_once_by_default(
    rows: int, device: str, groups: int, expected: list[int]
) -> None:
    """Of a matrix with 1024 columns: two million numbers on a CPU, 2^27 elsewhere, of every group."""
    matrices = [torch.nn.Parameter(torch.empty(rows, 1024, device=device)) for _ in range(groups)]
    optimizer = DistributedShampoo(
        [{"params": [matrix]} for matrix in matrices], preconditioner=SGDConfig()
    )
    assert [len(engines) for engines in optimizer._engines] == expected
    alone = [engine.alone for engines in optimizer._engines for engine in engines]
    assert all(alone) == (device == "cpu" or len(alone) > groups)


@pytest.mark.parametrize(
    ("num_messages", "numel", "expected"),
    [
        (0, 2**27 + 1, 2**27),
        (1, 2**27 + 1, 2**27),
        (1, 2**27, None),
        (2, 2**27 + 1, 2**27),
        (8, 2**25 + 1, 2**25),
        (8, 2**25, None),
        (1024, 2**19, 2**18),
    ],
)
def test_messages_of_all_ranks_are_bounded_together(
    num_messages: int, numel: int, expected: int | None
) -> None:
    for device in (torch.device("meta"), torch.device("cpu")):
        if num_messages or device.type != "cpu":
            found = wave_limit("auto", device, num_messages=num_messages, numel=numel)
            assert found == expected


@pytest.mark.parametrize(
    ("asked", "device", "limit", "expected"),
    [
        ("auto", "cpu", 2**21, 2**20),
        ("auto", "meta", None, 2**27),
        ("auto", "meta", 2**18, 2**18),
        (None, "cpu", None, None),
        (2**21, "cpu", 2**21, 2**21),
    ],
)
def test_how_many_numbers_of_factors_are_refreshed_at_once(
    asked: Any, device: str, limit: int | None, expected: int | None
) -> None:
    assert portion_limit(asked, torch.device(device), limit) == expected


def test_a_parameter_in_many_waves_is_copied_once() -> None:
    """To keep its training weights, and to make its gradient dense."""
    table = torch.nn.Embedding(60, 8, sparse=True)
    plain = torch.nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    optimizers = [
        optimizer_for(own.parameters(), max_wave_numel=64, averaging=WeightEMA(0.9))
        for own in (table, plain)
    ]
    indices = torch.tensor([3, 5, 3, 40])
    for own, optimizer in zip((table, plain), optimizers, strict=True):
        own(indices).square().sum().backward()
        with OperationCounter() as step:
            optimizer.step()
        assert len(optimizer._engines[0]) > 1
        with OperationCounter() as evaluation:
            optimizer.eval()
        assert [o.name for o in step.operations].count("aten::_to_dense") == (own is table)
        assert [o.name for o in evaluation.operations].count("aten::clone") == 1
    assert_same([table.weight], [plain.weight])


def test_a_wave_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_wave_numel must be at least 1, got 0"):
        optimizer_for(parameters(), max_wave_numel=0)


# --- memory ---------------------------------------------------------------------------------------


def largest_stack(optimizer: DistributedShampoo) -> int:
    """Numbers in the largest stack that there would be without waves."""
    whole = optimizer._engines[0][0].stack_set.whole
    return max(math.prod(layout.shape) for layout in whole.layouts)


def peaks(
    workload: str,
    config: PreconditionerConfig,
    refresh: RefreshPolicy,
    divisor: int | None,
    steps: range,
    **options: Any,
) -> list[float]:
    """Temporary bytes of some steps in units of the largest stack."""
    largest = largest_stack(DistributedShampoo(workload_parameters(workload)))
    optimizer = DistributedShampoo(
        workload_parameters(workload),
        preconditioner=config,
        refresh=refresh,
        max_wave_numel=None if divisor is None else largest // divisor,
        **options,
    )
    found = []
    for step in steps:
        optimizer.param_groups[0]["step"] = step - 1
        with LiveMemory() as memory, OperationCounter():  # which answers what a test of bases asks
            optimizer.step()
        assert memory.live < largest // 1000, "something temporary outlives its step"
        found.append(memory.peak / (4 * largest))
    return found


@BOTH
@pytest.mark.parametrize("workload", ["imagenet_resnet", "imagenet_vit"])
@pytest.mark.parametrize("averaging", [None, WeightEMA()])
def test_a_plain_step_takes_twice_the_largest_stack(
    workload: str, config: PreconditionerConfig, averaging: Any
) -> None:
    """Issue 7's bound: state + parameters + gradients + 2 x the largest stack."""
    never = FixedRefresh(10**9)
    (peak,) = peaks(workload, config, never, 2, range(5, 6), averaging=averaging)
    (together,) = peaks(workload, config, never, None, range(5, 6))
    assert peak <= 2.0
    assert together > 6.0, "without waves there is nothing to bound"


WORKLOADS = ("imagenet_resnet", "imagenet_vit", "librispeech_conformer", "ogbg", "wmt")


@BOTH
@pytest.mark.parametrize("workload", WORKLOADS)
def test_nor_does_a_refresh_of_everything_take_more(
    workload: str, config: PreconditionerConfig
) -> None:
    (peak,) = peaks(workload, config, FixedRefresh(4, 1), 2, range(8, 9))
    assert peak <= 1.8


@BOTH
@pytest.mark.parametrize("workload", ["imagenet_vit", "ogbg"])
def test_nor_does_a_refresh_in_turns(workload: str, config: PreconditionerConfig) -> None:
    found = peaks(workload, config, StaggeredRefresh(100), 2, range(95, 111))
    assert max(found) <= 1.8


def test_a_refresh_does_not_hold_the_gradients_of_a_filter_that_looks_ahead() -> None:
    looking: dict[str, Any] = {"betas": (0.9, 0.99), "beta3": 0.81}
    plain, refresh = peaks("ogbg", ShampooConfig(), FixedRefresh(4, 1), 2, range(7, 9), **looking)
    assert refresh <= plain


def test_nor_does_a_test_of_bases_take_more() -> None:
    adaptive = AdaptiveRefresh(4, 1)
    (peak,) = peaks("ogbg", EigenvalueCorrectedConfig(), adaptive, 2, range(8, 9))
    assert peak <= 1.8


def test_waves_test_bases_by_themselves() -> None:
    """A refresh that asks whether bases moved waits once for every wave with something due."""
    whole, params = parameters(), parameters()
    options: dict[str, Any] = {"refresh": AdaptiveRefresh(2, 1, threshold=0.5)}
    run(optimizer_for(whole, **options), whole, range(1, 8))
    run(optimizer_for(params, max_wave_numel=1, **options), params, range(1, 8))
    assert_same(params, whole, 1e-12)


@pytest.mark.parametrize("config", [KLShampooConfig(), KLSOAPConfig()])
def test_a_refresh_of_kl_shampoo_comes_in_portions(config: Any) -> None:
    """All of its factors at once would take three times as much."""
    (peak,) = peaks("ogbg", config, FixedRefresh(4, 1), 2, range(8, 9))
    assert peak <= 6.0
