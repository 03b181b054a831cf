"""The attention of Hopper GPUs equals the plain function: ragged sessions, foreign and new K/V."""

from typing import Any

import pytest
import torch
from torch import Tensor

from triton_mode import DEVICE  # isort: skip  # before the kernels

from d2f_runtime.kernels.activation import Activation
from d2f_runtime.kernels.attention import attend, attend_reference, rows_per_tile
from d2f_runtime.kernels.rope import Rotation
from d2f_runtime.kernels.skinny import tiling_for
from d2f_runtime.kernels.streamed import streamed_rotation
from d2f_runtime.kernels.streamed_attention import can_stream
from kernel_checks import NEEDS_HOPPER, error, random

pytestmark = [
    pytest.mark.torch,
    pytest.mark.gpu,
    NEEDS_HOPPER,
]

NO_BORDER = 2**31 - 1
NOBODYS = ((0, 10), (130, 250), (253, 380), (384, 400), (908, 1000))
# first row, rows, pool place of position 0, border, place of position 0 beyond the border
SESSIONS = (
    (0, 20, 10, NO_BORDER, 0),  # rows at positions 100 on
    (20, 3, 250, NO_BORDER, 0),  # from position 0 on
    (23, 4, 10, 100, 280),  # a branch of the first, whose own K/V lie at 380..384
    (27, 90, 400, NO_BORDER, 0),  # rows at positions 418 on
)
NUM_ROWS = 119  # two of which are padding


def random_bf16(*shape: int) -> Tensor:
    return random(*shape).bfloat16()


def integers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


def tiles_of(sessions: Any, per_tile: int) -> Tensor:
    """Cut sessions into tiles, and one unused."""
    cut = [
        (first + at, min(per_tile, count - at), *rest)
        for first, count, *rest in sessions
        for at in range(0, count, per_tile)
    ]
    return integers([*cut, (0, 0, 0, 0, 0)])


@pytest.mark.parametrize(
    ("heads", "num_kv", "size"), [(4, 4, 128), (6, 2, 128), (7, 1, 128), (12, 2, 64)]
)
@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_ragged_sessions(
    heads: int, num_kv: int, size: int, num_splits: int, quantise: bool, early: bool
) -> None:
    seen = (
        (110, 12),
        (120, 8),
        (3, 3),
        (102, 2),
        (104, 2),
        (450, 32),
        (482, 32),
        (508, 26),
        (0, 2),
    )
    visible = integers(stop for stop, count in seen for _ in range(count))
    positions = integers([*range(100, 120), *range(3), *range(100, 104), *range(418, 508), 0, 0])
    query = random_bf16(NUM_ROWS, heads, size)
    keys, values = random_bf16(1000, num_kv, size), random_bf16(1000, num_kv, size)
    for start, stop in NOBODYS:
        keys[start:stop] = values[start:stop] = float("nan")
    tiles = tiles_of(SESSIONS, rows_per_tile(NUM_ROWS, heads // num_kv))
    assert can_stream(query)
    found = attend(
        query, keys, values, visible=visible, tiles=tiles, num_splits=num_splits,
        quantise=quantise, positions=positions if early else None,
    )  # fmt: skip
    wanted = attend_reference(
        query.float(), keys.float(), values.float(), visible=visible, tiles=tiles
    )
    assert error(found.dequantised(), wanted.values) < (0.04 if quantise else 6e-3)
    assert not found.dequantised()[117:].any()


def test_what_the_kernel_in_front_writes_is_waited_for() -> None:
    """A product writes the window's K/V, attention reads them at once: in a graph, as steps do."""
    num_rows, heads, size, start = 128, 4, 128, 200
    x, weight = random_bf16(num_rows, 1024), random_bf16(3 * heads * size, 1024) * 0.05
    table = torch.zeros(start + num_rows, size, device=DEVICE)
    table[:, : size // 2] = 1.0  # turns nothing
    keys, values = random_bf16(400, heads, size), random_bf16(400, heads, size)
    positions = integers(range(start, start + num_rows))
    visible = integers([start + num_rows] * num_rows)
    tiles = tiles_of([(0, num_rows, 7, NO_BORDER, 0)], rows_per_tile(num_rows, 1))
    tiling = tiling_for(num_rows, *weight.shape, fp8=False, may_split=False)
    assert tiling is not None
    rotation = Rotation(keys, values, positions=positions, places=positions + 7, table=table)

    def step() -> Tensor:
        query = streamed_rotation(
            Activation(x), weight, None, tiling=tiling, dtype=torch.bfloat16, rotation=rotation
        )
        attended = attend(
            query, keys, values,
            visible=visible, tiles=tiles, num_splits=4, positions=positions,
        )  # fmt: skip
        return torch.cat([query.flatten(1), attended.values], dim=1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both = step()
    for _ in range(30):
        x.copy_(random_bf16(num_rows, 1024))
        keys[start + 7 :].normal_()
        values[start + 7 :].normal_()
        graph.replay()
        query, found = torch.split(both, heads * size, dim=1)
        wanted = attend_reference(
            query.float().view(num_rows, heads, size), keys.float(), values.float(),
            visible=visible, tiles=tiles,
        )  # fmt: skip
        assert error(found, wanted.values) < 6e-3
