import pytest

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from lab.bench.overhead import CASES, overhead

pytestmark = pytest.mark.torch


def test_every_decoding_is_timed_alone_and_side_by_side() -> None:
    found = overhead(1, sessions=(2,), length=32)
    assert list(found) == [f"{name}, alone" for name in CASES] + [
        f"{name}, 2 at once" for name in CASES
    ]
    for name in CASES:
        assert 0 < found[f"{name}, alone"]["p10"] <= found[f"{name}, alone"]["median"]
        assert found[f"{name}, 2 at once"]["loop_thread_cpu_us"]["median"] > 0
    per_step = {name: found[f"{name}, 2 at once"]["tokens_per_step"] for name in CASES}
    assert per_step["a token a step"] <= 2 < per_step["verified drafts of 8"]
