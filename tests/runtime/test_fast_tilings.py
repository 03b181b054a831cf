"""How products are cut: whatever the model, a cut covers the weight and fits into the device."""

import pytest

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from d2f_runtime.kernels.skinny import MAX_ROWS, tiling_for
from lab.bench.step_models import SHAPES

pytestmark = pytest.mark.torch

SHARED_MEMORY = 227 * 1024  # of a program on Hopper
EPILOGUE = 2 * 1024  # what the compiler takes beside the ring


def products(name: str) -> list[tuple[int, int, bool]]:
    """Outputs, features, and whether the sum may be split."""
    config = SHAPES[name]
    hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    return [
        (heads * config.head_dim, hidden, False),
        (hidden, config.num_heads * config.head_dim, True),
        (2 * config.ffn_size, hidden, False),
        (hidden, config.ffn_size, True),
        (config.vocab_size, hidden, False),
    ]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 32, 33, 64, 65, 128])
@pytest.mark.parametrize("name", ["llada-8b", "dream-7b", "llama-3-8b"])
def test_tilings_fit(name: str, num_rows: int, fp8: bool) -> None:
    for outputs, features, may_split in products(name):
        tiling = tiling_for(num_rows, outputs, features, fp8=fp8, may_split=may_split)
        assert tiling is not None
        assert tiling.rows >= num_rows
        assert outputs % tiling.outputs == 0
        assert features % (tiling.features * tiling.splits) == 0
        assert may_split or tiling.splits == 1
        assert not (tiling.persistent and tiling.splits > 1)
        size = (tiling.rows + tiling.outputs) * tiling.features * (1 if fp8 else 2)
        assert size * tiling.stages + EPILOGUE <= SHARED_MEMORY


def test_other_sizes_are_left_to_the_library() -> None:
    assert tiling_for(MAX_ROWS + 1, 4096, 4096, fp8=False) is None
    assert tiling_for(16, 4096 + 64, 4096, fp8=False) is None
    assert tiling_for(16, 4096, 4096 + 128, fp8=False) is None
    assert tiling_for(16, 4096, 256, fp8=True) is None
