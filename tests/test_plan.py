"""Plans against the optimizer itself: bytes, operations and peaks as predicted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo_core import (
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
    ShampooConfig,
    SpectralConfig,
)
from shampoo_core.blocking import merge_dimensions, tiles_of
from shampoo_core.counting import OperationCounter
from shampoo_core.groups import LARGEST_WAVE_NUMEL
from shampoo_core.live_memory import LiveMemory
from shampoo_core.model_shapes import (
    TRANSFORMERS,
    NamedShape,
    named_model,
    num_elements,
    official_workloads,
    shapes_from_file,
)
from shampoo_core.plan import Placement, Plan, Request, make_plan
from shampoo_core.plan.__main__ import AVERAGING, main
from shampoo_core.plan.advice import Change, alternatives
from shampoo_core.plan.layout import blocks_by_method
from shampoo_core.plan.planning import GIB
from shampoo_core.plan.travel import FLOAT32, pieces_of, travel, waves
from shampoo_core.storage.triangles import tables_apart

SMALL = [NamedShape("w", (24, 40)), NamedShape("b", (24,)), NamedShape("k", (6, 5, 3, 3))]
CONFIGS = [
    ShampooConfig(),
    ShampooConfig(storage="packed", precondition_vectors=True),
    EigenvalueCorrectedConfig(),
    KLSOAPConfig(),
    PerFactorCorrectedConfig(),
    SpectralConfig(),
]


def measured(request: Request, steps: int = 3, device: str = "cpu") -> tuple[int, list[int]]:
    """Bytes of state, and peaks of the first steps, of the real optimizer."""
    parameters = []
    for shape in request.parameters:
        parameter = torch.nn.Parameter(torch.zeros(shape.shape, device=device))
        parameter.grad = torch.randn(shape.shape, device=device)
        parameters.append(parameter)
    optimizer = DistributedShampoo(
        parameters,
        preconditioner=request.config,
        averaging=request.averaging,
        max_block_size=request.max_block_size,
        max_wave_numel=request.max_wave_numel,
        refresh=FixedRefresh(3, 1),
    )
    peaks = []
    for _ in range(steps):
        with LiveMemory() as memory, OperationCounter():  # answers what a refresh asks
            optimizer.step()
        peaks.append(memory.peak)
    state = sum(
        tensor.numel() * tensor.element_size()
        for entries in optimizer.state.values()
        for tensor in entries.values()
    )
    return state, peaks


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_state_of_one_process_is_that_of_the_optimizer(config: Any, averaging: str) -> None:
    rule = AVERAGING[averaging]
    chosen = None if rule is None else rule()
    request = Request(SMALL, config=config, averaging=chosen, max_block_size=16)
    assert make_plan(request).state_bytes_per_rank == [measured(request, 0)[0]]


@pytest.mark.parametrize(
    ("workload", "max_wave_numel"),
    [
        *itertools.product(["imagenet_vit", "ogbg"], ["auto", 3_000_000]),
        ("imagenet_resnet", "auto"),
        pytest.param("imagenet_resnet", 3_000_000, marks=pytest.mark.slow),
        ("finewebedu_lm", "auto"),
    ],
)
def test_peaks_of_one_process_are_those_of_the_optimizer(
    workload: str, max_wave_numel: Any
) -> None:
    """Up to the vectors with a number per block, which a plan makes for blocks one by one.

    Step 3 refreshes for the second time, before which steps can take more than behind it.
    """
    request = Request(named_model(workload), max_wave_numel=max_wave_numel, refresh_interval=4)
    plan = make_plan(request)
    state, (_, early, refresh, plain) = measured(request, 4, "meta")
    assert plan.state_bytes_per_rank == [state]
    assert plan.at_once_memory.plain == pytest.approx(max(early, plain), rel=0.01)
    assert plan.at_once_memory.refresh == pytest.approx(max(early, refresh), rel=0.01)


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=0, max_size=4), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["ddp", "fsdp2", "hsdp"]),
    st.sampled_from([4, 7, 16]),
)
def test_every_number_has_one_owner_and_one_holder(
    shapes: list[list[int]], ranks: int, sharding: Any, block: int
) -> None:
    parameters = [NamedShape(str(i), tuple(shape)) for i, shape in enumerate(shapes)]
    placement = Placement(2 * ranks, sharding, group_size=ranks)
    methods = blocks_by_method(
        parameters, ShampooConfig(), placement, max_block_size=block, refresh_interval=10
    )
    assert all(0 <= owner < placement.num_owners for m in methods for owner in m.owners)
    numbers = sum(math.prod(tile.sizes) for m in methods for tile in m.tiles)
    assert numbers == num_elements(parameters)
    assert len(waves(methods)) <= 1
    of_waves = (pieces_of(wave, parameters, placement).numbers for wave in waves(methods))
    pieces = sum(of_waves, Counter())
    assert sum(pieces.values()) == numbers
    for holder in range(placement.num_shards):
        held = sum(n for (whose, _), n in pieces.items() if whose == holder)
        assert held == sum(_rows(p.shape, holder, placement.num_shards) for p in parameters)


def _rows(shape: tuple[int, ...], holder: int, num_shards: int) -> int:
    """Numbers in a slice of the rows, as `torch.chunk` deals them out."""
    chunks = torch.zeros(shape or (1,), device="meta").chunk(num_shards)
    return chunks[holder].numel() if holder < len(chunks) else 0


def test_pieces_of_a_matrix_by_hand() -> None:
    """A 4 x 6 matrix in rows of two for each of two holders, cut into six 2 x 2 blocks."""
    parameters = [NamedShape("w", (4, 6))]
    placement = Placement(2, "fsdp2")
    methods = blocks_by_method(
        parameters, ShampooConfig(), placement, max_block_size=2, refresh_interval=10
    )
    owner_of = dict(zip((t.grid_starts for t in methods[0].tiles), methods[0].owners, strict=True))
    assert [owner_of[place] for place in sorted(owner_of)] == [0, 1, 0, 1, 0, 1]
    (wave,) = waves(methods)
    pieces = pieces_of(wave, parameters, placement)
    assert pieces.numbers == {(0, 0): 8, (0, 1): 4, (1, 1): 8, (1, 0): 4}
    assert pieces.blocks == {(0, 0): 2, (0, 1): 1, (1, 1): 2, (1, 0): 1}
    # Gradients and weights of 4 numbers out and updates of 4 numbers back, on either rank. 12 numbers of
    # each go out and come in, twice as many at a time. The weights stay; most is alive while updates beside
    # them are multiplied and put in order, three times 12 numbers.
    travelling = travel(parameters, methods, placement, reads_weights=True, holders_decay=False)
    assert travelling == ([48, 48], [0, 0], [4 * (12 + 36)] * 2, [4 * 12] * 2)
    travelling = travel(parameters, methods, placement, holders_decay=False)
    assert travelling == ([32, 32], [0, 0], [4 * 36] * 2, [0, 0])
    # Decay takes a number for the one block that is held elsewhere.
    assert travel(parameters, methods, placement).sent == [36, 36]


def test_replicas_of_shards_are_given_as_much_of_every_shard() -> None:
    """What a rank passes on to seven others is as long as the longest: hardly more than an eighth."""
    parameters = named_model("transformer_1b")
    placement = Placement(64, "hsdp", 8)
    methods = blocks_by_method(
        parameters, ShampooConfig(), placement, max_block_size=1024, refresh_interval=100
    )
    passed_on = travel(parameters, methods, placement).passed_on
    held = num_elements(parameters) / placement.num_shards
    assert all(7 / 8 * held <= sent / FLOAT32 <= 1.25 * 7 / 8 * held for sent in passed_on)


def test_replicas_send_the_longest_segment_to_everyone() -> None:
    parameters = [NamedShape("w", (4, 6))]
    placement = Placement(4)
    methods = blocks_by_method(
        parameters, ShampooConfig(), placement, max_block_size=2, refresh_interval=10
    )
    # Six blocks of four numbers on four ranks: two on some.
    travelling = travel(parameters, methods, placement)
    assert travelling.sent == [3 * 8 * 4] * 4
    # A message and four that arrive, updates as they are computed and as they are sent.
    assert sorted(travelling.alive) == [4 * (40 + 8)] * 2 + [4 * (40 + 16)] * 2
    assert travelling.weights == [0] * 4


@pytest.mark.parametrize("model", [*official_workloads(), *TRANSFORMERS])
def test_sizes_of_models(model: str) -> None:
    """Those of tests/data/algoperf_param_shapes.json, summed; of language models from their widths."""
    published = {
        "criteo1tb": 539_267_457,
        "fastmri": 7_756_097,
        "finewebedu_lm": 252_815_372,
        "imagenet_resnet": 25_557_032,
        "imagenet_vit": 22_122_472,
        "librispeech_conformer": 32_321_792,
        "librispeech_deepspeech": 18_393_600,
        "ogbg": 3_554_176,
        "wmt": 133_521_408,
        "mnist": 101_770,
        "cifar": 11_173_962,
        "transformer_1b": 1_104_218_112,
        "transformer_70b": 68_976_648_192,
    }
    assert num_elements(named_model(model)) == published[model]
    for parameter in named_model(model):
        merged = merge_dimensions(parameter.shape, 1024)
        assert sum(
            tile.num_blocks * math.prod(tile.sizes) for tile in tiles_of(0, merged, 1024)
        ) == math.prod(parameter.shape)


def test_more_ranks_never_need_more_state_and_never_send_everything() -> None:
    plans = [make_plan(Request(named_model("ogbg"), Placement(n))) for n in (1, 2, 4, 8)]
    states = [plan.state_bytes for plan in plans]
    assert states == sorted(states, reverse=True)
    assert sum(plans[3].state_bytes_per_rank) == plans[0].state_bytes
    assert max(plans[0].sent_bytes_per_rank) == 0
    assert plans[3].balance < 1.2


@pytest.mark.parametrize("ranks", [1, 4])
def test_waves_bound_temporary_memory_and_buffers(ranks: int) -> None:
    request = Request(named_model("ogbg"), Placement(ranks), refresh_interval=4)
    whole = make_plan(request)
    limit = whole.largest_stack // (2 * ranks)
    waves = make_plan(dataclasses.replace(request, max_wave_numel=limit))
    most = whole.staggered_memory.plain
    assert waves.staggered_memory.plain <= 2 * 4 * whole.largest_stack / ranks < most
    assert waves.state_bytes_per_rank == whole.state_bytes_per_rank
    assert waves.plain_operations > whole.plain_operations
    # Fewer matrices at a time save less by their symmetry: of 16 parts 13 are left, or all.
    assert whole.plain_flops <= waves.plain_flops <= 16 / 13 * whole.plain_flops
    if ranks > 1:
        assert (
            waves.staggered_memory.travel <= (ranks + 3) * limit * 4 < whole.staggered_memory.travel
        )
        assert waves.sent_bytes_per_rank[0] >= whole.sent_bytes_per_rank[0]


def test_waves_are_the_default_where_the_whole_is_large() -> None:
    bounded = make_plan(Request(named_model("finewebedu_lm"), refresh_interval=4))
    assert max(bounded.staggered_memory.staggered, bounded.at_once_memory.refresh) <= (
        3.5 * 4 * LARGEST_WAVE_NUMEL
    )
    whole = make_plan(
        Request(named_model("finewebedu_lm"), refresh_interval=4, max_wave_numel=None)
    )
    assert whole.at_once_memory.refresh > 2 * bounded.at_once_memory.refresh
    assert whole.plain_ms < bounded.plain_ms < 1.005 * whole.plain_ms


@pytest.mark.slow
def test_what_does_not_fit_is_said_and_helped(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--workload", "ogbg", "--world_size", "1", "--memory_gib", "0.15"])
    text = capsys.readouterr().out
    assert "Does not fit" in text
    assert 'storage="4bit"' in text
    assert "2 ranks" in text
    assert "max_wave_numel=1048576" in text
    main(["--workload", "ogbg", "--world_size", "1", "--memory_gib", "16"])
    assert "Fits" in capsys.readouterr().out


@pytest.mark.slow
def test_advice_is_what_saves_memory_and_is_put_together_where_nothing_does_alone() -> None:
    matrices = [NamedShape(str(index), (128, 128)) for index in range(4)]
    request = Request(matrices, Placement(2), max_block_size=128, refresh_interval=4)
    peak = make_plan(request).peak_gib

    def advised(share: float, **options: Any) -> dict[str, Change]:
        short = dataclasses.replace(request, memory_gib=share * peak, **options)
        return {change.what: change for change in alternatives(short, make_plan(short))}

    alone = advised(0.95)
    views = alone["gradient_as_bucket_view=True"]
    assert views.fits
    assert views.mean_ms == make_plan(request).mean_ms
    assert all(change.peak_gib <= 0.99 * peak for change in alone.values())
    (together,) = (
        change for what, change in advised(0.2).items() if "gradient" in what and "," in what
    )
    assert together.what.startswith("gradient_as_bucket_view=True, max_wave_numel=")
    assert together.what.endswith('storage="4bit"')
    assert together.peak_gib < min(change.peak_gib for change in alone.values())
    assert any(what.startswith("max_wave_numel=") for what in advised(0.2, max_wave_numel=2**15))


def test_what_fits_in_turns_alone_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--workload", "ogbg", "--world_size", "1", "--memory_gib", "0.22"])
    text = capsys.readouterr().out
    assert "Fits with refresh=StaggeredRefresh(), not with the default: needs 0.188 GiB" in text
    main(["--workload", "ogbg", "--world_size", "1", "--memory_gib", "1"])
    assert "\nFits: needs" in capsys.readouterr().out


def test_lookup_tables_are_named_or_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "shapes.json"
    file.write_text("[[70000, 4], [32, 32]]")
    flags = ["--shapes", str(file), "--world_size", "1", "--memory_gib", "1"]
    main(flags)
    assert "65,536 or more, in a group of their own stepped by Adam: 1\n" in capsys.readouterr().out
    main([*flags, "--table_rows", "0"])
    assert "Adam" not in capsys.readouterr().out
    whole = Request(shapes_from_file(file), table_rows=None)
    assert make_plan(whole).state_bytes_per_rank == [measured(whole, 0)[0]]


@pytest.mark.parametrize(("storage", "with_diagonal"), [("packed", True), ("4bit", False)])
def test_indices_that_a_storage_keeps_are_counted(storage: Any, with_diagonal: bool) -> None:
    request = Request(SMALL, config=ShampooConfig(storage=storage), max_block_size=16)
    with tables_apart() as tables:
        measured(request, 2)
    assert {kept for _, _, kept in tables} == {with_diagonal}
    memory = make_plan(request).at_once_memory
    assert memory.tables == sum(t.nbytes for pair in tables.values() for t in pair) > 0
    assert make_plan(Request(SMALL, max_block_size=16)).at_once_memory.tables == 0
    assert make_plan(request).refresh_peak_gib * GIB == pytest.approx(
        8 * num_elements(SMALL) + memory.state + memory.tables + max(memory.plain, memory.refresh)
    )


def test_shapes_from_a_file_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "shapes.json"
    file.write_text('{"w": [24, 40], "b": [24]}')
    main(["--shapes", str(file), "--world_size", "2", "--memory_gib", "1", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == 24 * 41
    assert set(plan) >= {field.name for field in dataclasses.fields(Plan)}
    file.write_text("[[3, 4], []]")
    assert shapes_from_file(file) == [("parameter_0", (3, 4)), ("parameter_1", ())]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[3, -1]]", "parameter_0"),
        ("{", "not JSON"),
        ('{"\xfc": [3]}', "shapes.json is not JSON: 'utf-8'"),
        ("[]", "at least one"),
        ("[" * 100_000 + "]" * 100_000, "shapes.json holds lists within lists"),
        ('{"w": 3}', "'w'"),
        ('{"w": [99999999999, 99999999]}', r"has 1e\+19 numbers; a parameter has 1.1e\+12 at most"),
        ('{"w": [3], "w": [4]}', "'w' is there twice"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "shapes.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        shapes_from_file(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Placement(0), "world_size"),
        (lambda: Placement(6, "hsdp", 4), "group_size must divide"),
        (lambda: Placement(8, "hsdp", 4, 2), "ranks_per_group must be a multiple of the 4 ranks"),
        (lambda: Placement(8, "fsdp2", ranks_per_group=4), "multiple of the 8 ranks"),
        (lambda: Placement(2, "zero"), "sharding"),  # type: ignore[arg-type]
        (lambda: Request(SMALL, memory_gib=0.0), "memory_gib"),
        (lambda: Request(SMALL, refresh_interval=10**9), "refresh_interval must lie in"),
        (lambda: Request([NamedShape("w", (0, 3))]), "at least one element"),
        (lambda: named_model("unknown"), "workload must be one of"),
    ],
)
def test_bad_requests_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
