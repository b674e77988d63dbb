"""What is due when on which rank, what travels at which steps, and what a mean step makes of both."""

from __future__ import annotations

import pytest
import torch

from shampoo_core import (
    HeavyBall,
    LatestWeightAverage,
    ScheduleFree,
    ShampooConfig,
    StaggeredRefresh,
    WeightEMA,
)
from shampoo_core.blocking import merge_dimensions, tiles_of
from shampoo_core.counting import Operation
from shampoo_core.exchange.division import divide
from shampoo_core.model_shapes import NamedShape, named_model
from shampoo_core.plan import DEVICES, Placement, Request, make_plan
from shampoo_core.plan.devices import LAUNCH_SECONDS, SHARES, SMALL_AT_ONCE
from shampoo_core.plan.layout import blocks_by_method
from shampoo_core.plan.schedule import Schedule
from shampoo_core.plan.simulation import UpdateRule, factor_sides, simulate
from shampoo_core.plan.travel import travel
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import DueFactors

MATRICES = [NamedShape(str(index), (256, 256)) for index in range(34)]


@pytest.mark.parametrize(
    ("averaging", "decay", "reads", "left"),
    [
        (None, 0.0, False, False),
        (None, 0.1, False, True),
        (HeavyBall(), 0.0, False, False),
        (HeavyBall(), 0.1, True, False),
        (ScheduleFree(), 0.0, True, False),
        (WeightEMA(), 0.1, True, True),
        (WeightEMA(interval=1000), 0.1, True, True),
    ],
)
def test_weights_travel_as_the_rule_needs_them(
    averaging: object, decay: float, reads: bool, left: bool
) -> None:
    rule = UpdateRule(averaging, decay)  # type: ignore[arg-type]
    assert rule.holders_decay == left
    every = getattr(averaging, "interval", 1)
    assert rule.reading_share == pytest.approx(reads / every)


def test_shards_travel_in_a_replica_and_updates_among_all() -> None:
    placement, device = Placement(16, "hsdp", 4), DEVICES["v100"]
    request = Request(MATRICES, placement, device)
    methods = blocks_by_method(
        MATRICES, ShampooConfig(), placement, max_block_size=1024, refresh_interval=100
    )
    moving = travel(MATRICES, methods, placement)
    inside = device.send_seconds(max(moving.sent), 4, to_all=False)
    between = device.send_seconds(max(moving.passed_on), 16, to_all=False)
    assert min(inside, between) > 0
    # A fourth of all numbers is held, and of these some 3 of 34 matrices are the rank's own.
    added = device.traffic_seconds(12 * (34 / 4 - 3) * 256**2)
    assert make_plan(request).send_ms == pytest.approx(1e3 * (inside + between + added))


def test_shards_are_as_long_as_the_longest() -> None:
    parameters = [NamedShape("w", (24, 40)), NamedShape("b", (24,)), NamedShape("s", ())]
    plan = make_plan(Request(parameters, Placement(5, "fsdp2")))
    assert plan.parameter_bytes == 4 * (5 * 40 + 5 + 1)


def test_weights_that_have_come_stay_while_a_step_computes() -> None:
    placement = Placement(2, "fsdp2")
    request = Request(MATRICES[:4], placement, averaging=HeavyBall(), weight_decay=0.1)
    memory = make_plan(request).at_once_memory
    methods = blocks_by_method(
        MATRICES[:4], ShampooConfig(), placement, max_block_size=1024, refresh_interval=100
    )
    of_rank = simulate(methods, memory.rank, [[]], request.rule)
    weights = 4 * 2 * 256 * 256
    assert memory.plain == of_rank.plain.peak_bytes + weights
    assert memory.refresh == of_rank.refresh.peak_bytes + weights


def test_a_schedule_is_that_of_the_optimizer_on_every_rank() -> None:
    """The slices of a rank are what its `DueFactors` says, and all wait for who has most."""
    parameters, interval = named_model("ogbg"), 20
    methods = blocks_by_method(
        parameters, ShampooConfig(), Placement(4), max_block_size=256, refresh_interval=interval
    )
    tiles = [
        t
        for i, p in enumerate(parameters)
        for t in tiles_of(i, merge_dimensions(p.shape, 256), 256)
    ]
    whole = StackSet(tiles, dtype=torch.float32, device=torch.device("meta"))
    config = ShampooConfig()
    division = divide(whole, lambda shape: config.block_flops(shape, interval), [0.0] * 4, 0)
    policy = StaggeredRefresh(interval, ranks=4)
    work = {}
    for rank, own in enumerate(division.by_rank):
        axes = config.axes(own)
        due = DueFactors(own, axes, config.axes(whole))
        for step in range(interval + 1, 2 * interval + 1):
            slices = due.at(policy, step)
            cubes = [(s.stop - s.start) * axes[s.stack].dimension ** 3 for s in slices]
            work[rank, step] = sum(cubes), slices
    schedule = Schedule(methods, factor_sides(methods), interval, 4)
    for ranks in ([0], [3], [1, 2], [0, 1, 2, 3]):
        rank, (slices,) = schedule.busiest(ranks)
        most = max(found for (r, _), (found, _) in work.items() if r in ranks)
        assert any(w == (most, slices) for (r, _), w in work.items() if r == rank)
    steps = range(interval + 1, 2 * interval + 1)
    waited = sum(max(work[rank, step][0] for rank in range(4)) for step in steps)
    busiest = max(sum(work[rank, step][0] for step in steps) for rank in range(4))
    assert schedule.waiting == pytest.approx(waited / busiest)
    assert 1.0 < schedule.waiting < 2.0


def test_a_mean_step_counts_statistics_as_often_as_they_come() -> None:
    plans = {
        every: make_plan(Request(MATRICES, config=ShampooConfig(statistics_interval=every)))
        for every in (1, 2, 4)
    }
    saved = plans[1].plain_ms - plans[2].plain_ms
    assert 0.05 * plans[1].plain_ms < saved
    assert plans[1].plain_ms - plans[4].plain_ms == pytest.approx(1.5 * saved, rel=0.05)
    assert len({plan.plain_flops for plan in plans.values()}) == 1  # of a step that has them
    assert plans[4].refresh_ms == pytest.approx(plans[1].refresh_ms, rel=0.01)


def test_weights_that_are_read_now_and_then_are_sent_now_and_then() -> None:
    """They take memory at the steps that read them."""
    placement = Placement(4, "fsdp2")
    never, always, sometimes = (
        make_plan(Request(MATRICES, placement, averaging=averaging))
        for averaging in (None, LatestWeightAverage(interval=1), LatestWeightAverage(interval=200))
    )
    assert sometimes.sent_bytes_per_rank == never.sent_bytes_per_rank
    assert sometimes.sent_bytes_per_rank < always.sent_bytes_per_rank
    assert sometimes.send_ms == pytest.approx((199 * never.send_ms + always.send_ms) / 200)
    assert sometimes.staggered_memory.travel == always.staggered_memory.travel


def test_weights_that_others_move_are_added_to_on_every_rank() -> None:
    alone, two = (make_plan(Request(MATRICES, Placement(ranks))) for ranks in (1, 2))
    assert alone.send_ms == 0.0
    device = Request(MATRICES).device
    sent = device.send_seconds(max(two.sent_bytes_per_rank), 2, to_all=True)
    assert two.send_ms == pytest.approx(1e3 * (sent + device.traffic_seconds(12 * 17 * 256**2)))


def test_estimates_by_hand() -> None:
    device = DEVICES["v100"]
    product = Operation("aten::bmm", 15.7e12 * 0.7, 0)
    traffic = Operation("aten::mul", 0.0, int(900e9 * 0.75))
    nothing = Operation("aten::add", 0.0, 4)
    assert device.step_seconds([product, traffic, nothing]) == pytest.approx(2 + LAUNCH_SECONDS)
    large = Operation("aten::_linalg_eigh", 1.0, 0, side=2048, num_matrices=3)
    small = Operation("aten::_linalg_eigh", 1.0, 0, side=512, num_matrices=3)
    assert device.step_seconds([large]) == pytest.approx(3 * 50e-3 * 2)
    assert device.step_seconds([small]) == pytest.approx(3 * 50e-3 / 2)
    assert device.step_seconds([large._replace(flops=15.7e12 * 0.7)]) == pytest.approx(1.0)
    tiny = small._replace(side=32, num_matrices=SMALL_AT_ONCE + 1)
    assert device.step_seconds([tiny]) == pytest.approx(2 * 50e-3 / 32)
    for name in ("geqrf", "linalg_householder_product", "linalg_cholesky_ex"):
        factorised = large._replace(name=f"aten::{name}")
        assert device.step_seconds([factorised]) == pytest.approx(SHARES[name] * 3 * 50e-3 * 2)
    for to_all in (True, False):
        assert device.send_seconds(130e9, 8, to_all=to_all) == pytest.approx(1.0)
    # Between nodes a ring uses all links of a node, what differs for every device its own.
    assert device.send_seconds(8 * 6.25e9, 16, to_all=True) == pytest.approx(1.0)
    assert device.send_seconds(6.25e9, 16, to_all=False) == pytest.approx(1.0)
