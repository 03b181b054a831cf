import random

import pytest

from d2f_runtime.backends.spans import Spans


def test_takes_from_the_front_and_refuses_what_does_not_fit() -> None:
    spans = Spans(10)
    assert (spans.reserve(4), spans.reserve(6), spans.reserve(1)) == (0, 4, None)
    assert spans.num_free == 0


def test_a_gap_is_used_again() -> None:
    spans = Spans(10)
    first, second, _ = spans.reserve(3), spans.reserve(3), spans.reserve(3)
    assert (first, second) == (0, 3)
    spans.free(3, 3)
    assert spans.reserve(4) is None  # four are free, but not side by side
    assert spans.num_free == 4
    assert spans.reserve(2) == 3
    assert spans.reserve(1) == 5


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_rejoin_in_any_order(order: tuple[int, ...]) -> None:
    spans = Spans(9)
    starts = [spans.reserve(3) for _ in range(3)]
    for index in order:
        start = starts[index]
        assert start is not None
        spans.free(start, 3)
    assert spans.reserve(9) == 0


def test_nothing_is_handed_out_twice() -> None:
    rng = random.Random(0)
    spans = Spans(64)
    held: dict[int, tuple[int, int]] = {}
    owner: list[int | None] = [None] * 64
    for number in range(3000):
        if held and rng.random() < 0.5:
            key = rng.choice(list(held))
            start, length = held.pop(key)
            owner[start : start + length] = [None] * length
            spans.free(start, length)
        else:
            length = rng.randrange(0, 12)
            place = spans.reserve(length)
            if place is not None:
                assert owner[place : place + length] == [None] * length
                owner[place : place + length] = [number] * length
                held[number] = (place, length)
        assert spans.num_free == owner.count(None)
