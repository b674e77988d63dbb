"""Plans for several ranks: the rank that needs most, intervals that hold when planned, refusals."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from test_plan import measured

from shampoo_core import ShampooConfig, WeightEMA
from shampoo_core.model_shapes import NamedShape, named_model, num_elements
from shampoo_core.plan import DEVICES, Placement, Request, make_plan
from shampoo_core.plan.__main__ import AVERAGING, main
from shampoo_core.plan.advice import Change, quickest_sharing
from shampoo_core.plan.intervals import LONGEST_INTERVAL, shortest_interval
from shampoo_core.plan.layout import blocks_by_method
from shampoo_core.plan.planning import GIB
from shampoo_core.plan.schedule import Schedule
from shampoo_core.plan.simulation import factor_sides, first_alike, simulate, state_bytes
from shampoo_core.plan.times import Times
from shampoo_core.plan.travel import travel

SMALL = [NamedShape("w", (24, 40)), NamedShape("b", (24,))]


@pytest.mark.parametrize(
    ("workload", "ranks", "percent"),
    [
        ("ogbg", 1, 5.0),
        ("ogbg", 4, 0.5),
        pytest.param("imagenet_resnet", 8, 2.0, marks=pytest.mark.slow),
        pytest.param("librispeech_deepspeech", 8, 2.0, marks=pytest.mark.slow),
    ],
)
def test_intervals_keep_the_overhead_when_they_are_planned(
    workload: str, ranks: int, percent: float
) -> None:
    request = Request(
        named_model(workload),
        Placement(ranks),
        DEVICES["v100"],
        step_ms={"ogbg": 231.0, "imagenet_resnet": 338.0}.get(workload, 1156.0),
        overhead_percent=percent,
    )
    interval = make_plan(request).shortest_interval
    assert interval is not None
    assert interval > 1
    at_interval = make_plan(dataclasses.replace(request, refresh_interval=interval))
    assert at_interval.overhead_percent is not None
    assert at_interval.overhead_percent <= percent
    below = make_plan(dataclasses.replace(request, refresh_interval=interval - 1, step_ms=None))
    assert request.step_ms is not None
    assert 100.0 * below.mean_ms / request.step_ms > percent


@pytest.mark.parametrize("start", [1, 100, LONGEST_INTERVAL])
@pytest.mark.parametrize("allowed", [1.01, 1.3, 2.0, 7.7, 200.0])
def test_an_interval_is_found_whatever_the_times_do(start: int, allowed: float) -> None:
    """Times jump from interval to interval, as do those of blocks that are divided anew."""

    def times_at(interval: int) -> Times:
        planned.append(interval)
        jump = interval * 7919 % 13 / 13
        return Times(plain=0.5 + 0.1 / interval, refresh=60.0 + 40.0 * jump, send=0.4)

    planned: list[int] = []
    interval, times = shortest_interval(allowed, start, times_at)
    assert interval is not None
    assert times == times_at(interval)
    assert times.mean(interval) <= allowed
    assert interval == 1 or times_at(interval - 1).mean(interval - 1) > allowed
    assert len(planned) < 30


def test_nothing_is_found_where_the_longest_interval_is_too_short() -> None:
    too_long = Times(plain=1.0, refresh=5.0 * LONGEST_INTERVAL, send=0.0)
    assert shortest_interval(5.9, 100, lambda _: too_long) == (None, too_long)


@pytest.mark.parametrize(
    ("percent", "why"),
    [
        ("1", "a plain step alone takes"),
        ("4", "together"),
        ("5.22", "with one of 10,000 steps, the longest considered"),
    ],
)
def test_why_no_interval_does_is_said(
    percent: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--workload wmt --world_size 8 --memory_gib 16 --device v100 --overhead_percent"
    main([*arguments.split(), percent])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "no refresh" in line)
    assert line.startswith(f"  no refresh interval keeps it at {percent} %: ")
    assert why in line


def test_what_is_said_of_an_interval_is_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """It is not called the shortest: mean steps jump, and shorter ones may keep the overhead as well."""
    main(["--workload", "mnist", "--world_size", "1", "--memory_gib", "16", "--step_ms", "20"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "refresh interval" in line)
    pattern = r"  a refresh interval of \d+ keeps it at 5 %, one step less does not"
    assert re.fullmatch(pattern, line)


@pytest.mark.parametrize("workload", ["fastmri", "librispeech_deepspeech"])
def test_memory_is_of_the_rank_that_needs_most(workload: str) -> None:
    placement = Placement(4)
    parameters = named_model(workload)
    plan = make_plan(Request(parameters, placement))
    methods = blocks_by_method(
        parameters, ShampooConfig(), placement, max_block_size=1024, refresh_interval=100
    )
    states = state_bytes(methods, 4)
    schedule = Schedule(methods, factor_sides(methods), 100, 4)
    alike = first_alike(methods, 4)
    members = {first: [r for r in range(4) if alike[r] == first] for first in alike}
    steps = [simulate(methods, *schedule.busiest(members[first])) for first in alike]
    alive = travel(parameters, methods, placement).alive
    staggered = [
        state + max(moving, of_rank.plain.peak_bytes, of_rank.staggered.peak_bytes)
        for state, moving, of_rank in zip(states, alive, steps, strict=True)
    ]
    at_once = [
        state + max(moving, of_rank.plain.peak_bytes, of_rank.refresh.peak_bytes)
        for state, moving, of_rank in zip(states, alive, steps, strict=True)
    ]
    # Gradients, and DDP's buckets of them, are as large as the parameters.
    beside = 3 * plan.parameter_bytes
    assert plan.peak_gib == pytest.approx((max(staggered) + beside) / GIB)
    assert plan.refresh_peak_gib == pytest.approx((max(at_once) + beside) / GIB)
    for memory in (plan.staggered_memory, plan.at_once_memory):
        of_rank = steps[memory.rank]
        peaks = (of_rank.plain, of_rank.staggered, of_rank.refresh)
        assert memory.state == states[memory.rank]
        assert (memory.plain, memory.staggered, memory.refresh) == tuple(
            step.peak_bytes for step in peaks
        )


def test_ranks_with_as_many_blocks_are_alike_and_some_have_none() -> None:
    placement = Placement(8)
    methods = blocks_by_method(
        SMALL, ShampooConfig(), placement, max_block_size=16, refresh_interval=10
    )
    alike = first_alike(methods, 8)
    for rank, first in enumerate(alike):
        assert first <= rank
        own, others = (
            [[tile.sizes for tile in method.of_rank(which)] for method in methods]
            for which in (rank, first)
        )
        assert own == others
    idle = Request([NamedShape("w", (4, 4))], Placement(3))
    assert make_plan(idle).state_bytes_per_rank[1:] == [0, 0]


def test_buckets_of_gradients_are_counted_unless_gradients_are_views_of_them() -> None:
    request = Request(SMALL, Placement(2))
    assert make_plan(request).bucket_bytes == 4 * num_elements(SMALL)
    views = make_plan(dataclasses.replace(request, gradient_as_bucket_view=True))
    assert views.bucket_bytes == 0
    assert make_plan(request).peak_gib - views.peak_gib == pytest.approx(4 * 984 / GIB)
    for without in (Placement(1), Placement(2, "fsdp2")):
        assert make_plan(Request(SMALL, without)).bucket_bytes == 0


@pytest.mark.parametrize(
    ("placement", "alone"),
    [
        (Placement(16, ranks_per_group=4), Placement(4)),
        (Placement(16, "hsdp", 2, ranks_per_group=4), Placement(4, "hsdp", 2)),
        (Placement(16, "hsdp", 2, ranks_per_group=2), Placement(2, "fsdp2")),
    ],
)
def test_a_group_of_ranks_plans_as_a_world_of_its_size(
    placement: Placement, alone: Placement
) -> None:
    assert make_plan(Request(SMALL, placement)) == make_plan(Request(SMALL, alone))


MATRICES = [NamedShape(str(index), (256, 256)) for index in range(34)]


def test_the_number_of_sharing_ranks_with_the_shortest_step_is_advised() -> None:
    placement = Placement(16, "hsdp", 2)
    request = Request(MATRICES, placement, refresh_interval=400)
    plans = {}
    for sharing in (2, 4, 8, 16):
        other = dataclasses.replace(placement, ranks_per_group=sharing)
        plans[sharing] = make_plan(dataclasses.replace(request, placement=other))
    everyone, best = plans[16], plans[8]
    assert best.mean_ms == min(plan.mean_ms for plan in plans.values())
    assert best.mean_ms < 0.9 * everyone.mean_ms
    expected = Change("ranks_per_group=8", best.peak_gib, best.mean_ms, fits=True)
    assert quickest_sharing(request, everyone) == expected
    # Not where all of them have room and eight do not.
    between = (best.peak_gib + everyone.peak_gib) / 2
    short = dataclasses.replace(request, memory_gib=between)
    assert quickest_sharing(short, make_plan(short)) is None


def test_advice_on_sharing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--workload mnist --world_size 4 --memory_gib 1 --max_block_size 128"
    main([*flags.split(), "--ranks_per_group", "1"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "quicker with" in line)
    assert line.startswith("  quicker with Distribution(ranks_per_group=4): ")
    main([*flags.split(), "--json"])
    assert json.loads(capsys.readouterr().out)["quickest_sharing"] is None


@pytest.mark.parametrize("name", AVERAGING)
def test_averaging_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--workload ogbg --world_size 2 --memory_gib 16 --json --averaging"
    main([*arguments.split(), name])
    state = json.loads(capsys.readouterr().out)["state_bytes_per_rank"]
    without = sum(make_plan(Request(named_model("ogbg"), Placement(2))).state_bytes_per_rank)
    copies = {"none": 0, "latest": 20}.get(name, 1)
    assert sum(state) - without == pytest.approx(
        4 * copies * num_elements(named_model("ogbg")), rel=0.01
    )


def test_peaks_with_averaged_weights_are_those_of_the_optimizer() -> None:
    request = Request(named_model("ogbg"), averaging=WeightEMA())
    plan = make_plan(request)
    state, (_, early, _, plain_peak) = measured(request, 4, "meta")
    assert plan.state_bytes_per_rank == [state]
    assert plan.staggered_memory.plain == pytest.approx(max(early, plain_peak), rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--memory_gib 2 --reserved_gib 3", "reserved_gib must be less than memory_gib=2"),
        ("--memory_gib 2 --reserved_gib 2", "reserved_gib must be less than memory_gib=2"),
        ("--memory_gib 2 --step_ms 0", "step_ms must lie in"),
        ("--memory_gib 2 --ranks_per_group 2", "ranks_per_group must divide world_size=1, got 2"),
        ("--memory_gib 2 --group_size 4", "--group_size is for --sharding hsdp, not for ddp"),
        (
            "--memory_gib 2 --max_wave_numel few",
            "must be a whole number, 'auto' or 'all', got 'few'",
        ),
        (
            "--memory_gib 2 --sharding fsdp2 --gradient_as_bucket_view",
            "--gradient_as_bucket_view is for --sharding ddp, not for fsdp2",
        ),
    ],
)
def test_impossible_flags_are_refused(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--workload", "ogbg", "--world_size", "1", *flags.split()])
    assert message in capsys.readouterr().err


def test_a_share_of_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--workload",
        "mnist",
        "--world_size",
        "1",
        "--memory_gib",
        "1",
        "--overhead_percent",
        "2",
    ]
    with pytest.raises(SystemExit):
        main(flags)
    assert "--overhead_percent is of a training step: give its --step_ms" in capsys.readouterr().err
    main([*flags, "--step_ms", "40"])
    assert "keeps it at 2 %" in capsys.readouterr().out
