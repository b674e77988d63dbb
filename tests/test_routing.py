"""Routing goes by shape, and every parameter is routed once."""

import pytest
import torch
from torch import nn

from submission.routing import TABLE_ROWS, Route, route, routed


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), Route.DIAGONAL),
        ((1,), Route.DIAGONAL),
        ((512,), Route.DIAGONAL),
        ((512, 1), Route.DIAGONAL),
        ((1, 1, 512), Route.DIAGONAL),
        ((2, 3), Route.MATRIX),
        ((512, 1, 3, 3), Route.MATRIX),
        ((3072, 1024), Route.MATRIX),
        ((TABLE_ROWS - 1, 128), Route.MATRIX),
        ((TABLE_ROWS, 128), Route.TABLE),
        ((128, 1_048_576), Route.TABLE),
    ],
)
def test_route_by_shape(shape: tuple[int, ...], expected: Route) -> None:
    assert route(shape) is expected


def test_every_trainable_parameter_is_routed_exactly_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    frozen = model[1].bias
    frozen.requires_grad_(False)
    groups = routed(model)
    placed = [id(parameter) for group in groups.values() for parameter in group]
    wanted = [id(p) for p in model.parameters() if p is not frozen]
    assert sorted(placed) == sorted(wanted)
    assert {id(p) for p in groups[Route.MATRIX]} == {id(model[0].weight), id(model[1].weight)}


def test_routes_without_parameters_are_left_out() -> None:
    assert list(routed(nn.LayerNorm(3))) == [Route.DIAGONAL]


def test_compiled_models_are_routed_alike() -> None:
    model = nn.Linear(4, 3)
    compiled = torch.compile(model)
    assert routed(compiled)[Route.MATRIX] == [model.weight]
