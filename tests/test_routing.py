"""Routing goes by shape and type, and every parameter is routed once."""

import enum

import pytest
import torch
from torch import nn

from submission.routing import TABLE_ROWS, Kind, Route, bare_name, route, routed


class Types(enum.Enum):
    EMBEDDING = 7


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), Route(Kind.DIAGONAL)),
        ((1,), Route(Kind.DIAGONAL)),
        ((512,), Route(Kind.DIAGONAL)),
        ((512, 1), Route(Kind.DIAGONAL)),
        ((1, 1, 512), Route(Kind.DIAGONAL)),
        ((2, 3), Route(Kind.MATRIX, 1024)),
        ((512, 1, 3, 3), Route(Kind.MATRIX, 1024)),
        ((TABLE_ROWS - 1, 1024), Route(Kind.MATRIX, 1024)),
        ((TABLE_ROWS, 128), Route(Kind.TABLE)),
        ((128, 1_048_576), Route(Kind.TABLE)),
        ((11_264, 8), Route(Kind.TABLE)),
        ((11_264, 64), Route(Kind.MATRIX, 1024)),
        ((2, 1024), Route(Kind.MATRIX, 1024)),
    ],
)
def test_route_by_shape(shape: tuple[int, ...], expected: Route) -> None:
    assert route(shape, "WEIGHT", 1024) == route(shape, None, 1024) == expected


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((32_000, 1024), 1024), ((2304, 64), 128), ((5000, 300), 300), ((256, 9), 128)],
)
def test_blocks_of_an_embedding_are_about_as_long_as_its_vectors(
    shape: tuple[int, int], block_size: int
) -> None:
    assert route(shape, "EMBEDDING", 1024) == Route(Kind.MATRIX, block_size)
    assert route(shape, "EMBEDDING", 100) == Route(Kind.MATRIX, 100)


def test_every_trainable_parameter_is_routed_exactly_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    frozen = model[1].bias
    frozen.requires_grad_(False)
    groups = routed(model, {"0.weight": Types.EMBEDDING}, 1024)
    placed = [id(parameter) for group in groups.values() for parameter in group]
    wanted = [id(p) for p in model.parameters() if p is not frozen]
    assert sorted(placed) == sorted(wanted)
    assert {id(p) for p in groups[Route(Kind.MATRIX, 128)]} == {id(model[0].weight)}
    assert {id(p) for p in groups[Route(Kind.MATRIX, 1024)]} == {id(model[1].weight)}


def test_routes_without_parameters_are_left_out() -> None:
    assert list(routed(nn.LayerNorm(3), {}, 1024)) == [Route(Kind.DIAGONAL)]


@pytest.mark.parametrize(
    "name", ["a.weight", "module.a.weight", "_orig_mod.a.weight", "_orig_mod.module.a.weight"]
)
def test_bare_name_strips_wrappers(name: str) -> None:
    assert bare_name(name) == "a.weight"


def test_bare_name_keeps_inner_modules() -> None:
    assert bare_name("module.encoder.module.weight") == "encoder.module.weight"


def test_compiled_models_are_routed_alike() -> None:
    model = nn.Linear(4, 3)
    compiled = torch.compile(model)
    assert routed(compiled, {"weight": Types.EMBEDDING}, 1024)[Route(Kind.MATRIX, 128)] == [
        model.weight
    ]
