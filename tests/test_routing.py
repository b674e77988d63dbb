"""Routing goes by shape and type, and every parameter is routed once."""

import enum

import pytest
import torch
from torch import nn

from shampoo_core.blocking import tiles_of
from submission.routing import (
    MANY_ROWS,
    TABLE_ASPECT,
    TABLE_ROWS,
    Kind,
    Route,
    bare_name,
    route,
    routed,
)


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
        ((TABLE_ROWS, 1024), Route(Kind.TABLE)),
        ((128, 1_048_576), Route(Kind.TABLE)),
        ((11_264, 8), Route(Kind.TABLE)),
        ((11_264, 64), Route(Kind.MATRIX, 1024)),
        ((MANY_ROWS, MANY_ROWS // TABLE_ASPECT), Route(Kind.TABLE)),
        ((MANY_ROWS, MANY_ROWS // TABLE_ASPECT + 1), Route(Kind.MATRIX, 1024)),
        ((MANY_ROWS - 1, 2), Route(Kind.MATRIX, 1024)),
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


@pytest.mark.parametrize(
    ("shape", "kind", "longest", "block_size"),
    [
        ((1536, 512), "ATTENTION_QKV", 1024, 512),
        ((3072, 1024), "ATTENTION_QKV", 1024, 1024),
        ((3072, 1024), "ATTENTION_QKV", 600, 512),
        ((2304, 768), "ATTENTION_QKV", 512, 384),
        ((2048, 1024), "ATTENTION_KV", 1024, 1024),
        ((192, 64), "ATTENTION_QKV", 128, 64),
        ((1536, 512), "WEIGHT", 1024, 1024),
        ((1536, 512), "ATTENTION_KV", 1024, 1024),
        ((512, 512), "ATTENTION_QKV", 1024, 1024),
    ],
)
def test_no_block_reaches_over_query_key_and_value(
    shape: tuple[int, int], kind: str, longest: int, block_size: int
) -> None:
    assert route(shape, kind, longest) == Route(Kind.MATRIX, block_size)


def test_fused_weights_are_cut_where_they_were_joined() -> None:
    """By the library, at that block size: no block has rows of two of the three."""
    for width, longest in ((64, 128), (768, 512), (512, 1024), (384, 100)):
        block_size = route((3 * width, width), "ATTENTION_QKV", longest).max_block_size
        tiles = tiles_of(0, (3 * width, width), block_size)
        rows = [
            (tile.starts[0] + i * tile.sizes[0], tile.starts[0] + (i + 1) * tile.sizes[0] - 1)
            for tile in tiles
            for i in range(tile.counts[0])
        ]
        assert all(first // width == last // width for first, last in rows), (width, longest)


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


def test_embeddings_can_be_apart_from_others_of_their_kind() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3, bias=False))
    types = {"0.weight": Types.EMBEDDING}
    assert list(routed(model, types, 64)) == [Route(Kind.MATRIX, 64)]
    assert routed(model, types, 64, embeddings_apart=True) == {
        Route(Kind.MATRIX, 64, is_embedding=True): [model[0].weight],
        Route(Kind.MATRIX, 64): [model[1].weight],
    }


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
