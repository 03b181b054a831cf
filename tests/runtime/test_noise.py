from d2f_runtime.decoding.noise import PAGE, SamplingNoise
from d2f_runtime.decoding.window import Window


def window(start: int, stop: int, num_to_cache: int = 0) -> Window:
    return Window(start, (0,) * (stop - start), num_to_cache, (stop,))


def test_numbers_belong_to_positions_wherever_the_window_starts() -> None:
    noise = SamplingNoise(5)
    whole = noise.uniforms(window(0, 3 * PAGE), 7)
    for start, stop in [(0, 1), (PAGE - 1, PAGE + 1), (PAGE, 2 * PAGE), (10, 150)]:
        assert noise.uniforms(window(start, stop), 7) == whole[start:stop]


def test_positions_about_to_be_cached_draw_nothing() -> None:
    noise = SamplingNoise(5)
    assert noise.uniforms(window(3, 200, num_to_cache=190), 0) == [
        *[0.0] * 190,
        *noise.uniforms(window(193, 200), 0),
    ]


def test_steps_and_seeds_differ() -> None:
    draws = [
        SamplingNoise(seed).uniforms(window(0, 8), step)
        for seed in (1, 2, -1, -(2**63))
        for step in (0, 1)
    ]
    assert len({tuple(draw) for draw in draws}) == 8


def test_numbers_are_uniform_in_the_half_open_interval() -> None:
    numbers = SamplingNoise(0).uniforms(window(0, 20_000), 0)
    assert all(0.0 <= number < 1.0 for number in numbers)
    # Mean and share below 0.1 within five standard errors.
    assert abs(sum(numbers) / len(numbers) - 0.5) < 5 * 0.2887 / 20_000**0.5
    assert abs(sum(number < 0.1 for number in numbers) / len(numbers) - 0.1) < 5 * 0.3 / 20_000**0.5


def test_numbers_never_change() -> None:
    assert SamplingNoise(42).uniforms(window(0, 2), 0) == PINNED


PINNED = [0.8196266121832182, 0.4502179013162063]
