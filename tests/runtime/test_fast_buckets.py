from hypothesis import given
from hypothesis import strategies as st

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from d2f_runtime.backends.buckets import (
    BUCKETS,
    CROWD,
    CROWD_TOKENS,
    MAX_ROWS,
    Bucket,
    bucket_for,
    sessions_beside,
)
from d2f_runtime.kernels.attention import rows_per_tile, tile_size


@given(rows=st.integers(0, MAX_ROWS), sessions=st.integers(1, CROWD))
def test_the_smallest_bucket_that_holds_a_step_is_taken(rows: int, sessions: int) -> None:
    found = bucket_for(rows, sessions)
    holding = [b for b in BUCKETS if b.rows >= rows and b.sessions >= sessions]
    assert found == min(holding)


def test_longer_steps_and_larger_crowds_have_none() -> None:
    assert bucket_for(MAX_ROWS + 1, 1) is None
    assert bucket_for(1, CROWD + 1) is None


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=CROWD), group=st.integers(1, 9))
def test_a_bucket_has_tiles_for_any_lengths(lengths: list[int], group: int) -> None:
    bucket = bucket_for(sum(lengths), len(lengths))
    if bucket is None:
        return
    per_tile = rows_per_tile(bucket.rows, group)
    needed = sum(-(-length // per_tile) for length in lengths)
    assert needed <= bucket.num_tiles(per_tile)


@given(rows=st.integers(1, MAX_ROWS), group=st.integers(1, 64))
def test_a_tile_holds_whole_rows_and_suits_the_matrix_units(rows: int, group: int) -> None:
    assert tile_size(rows, group) in (16, 32, 64)
    assert 1 <= rows_per_tile(rows, group) * group <= tile_size(rows, group)


def test_one_session_needs_no_tile_to_spare() -> None:
    assert Bucket(1, 128).num_tiles(64) == 2
    assert Bucket(4, 128).num_tiles(64) == 4 + (128 - 4) // 64
    assert Bucket(16, 1).num_tiles(16) == 1


@given(tokens=st.integers(1, 2 * CROWD_TOKENS))
def test_as_many_sessions_share_a_step_as_a_shape_of_it_holds(tokens: int) -> None:
    sessions = sessions_beside(tokens)
    assert sessions in {bucket.sessions for bucket in BUCKETS}
    assert sessions == (64 if tokens >= 32_768 else 16)


@given(rows=st.integers(1, MAX_ROWS), runs=st.integers(1, CROWD))
def test_a_step_of_branches_has_a_shape(rows: int, runs: int) -> None:
    """Sixteen sessions with seven branches each are 128 runs."""
    assert bucket_for(max(rows, runs), runs) is not None
