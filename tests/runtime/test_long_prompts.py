"""Windows whose mask is made in pieces: the same answers, in memory that does not grow with it."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2f_runtime.backends import plain_runner
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import Window
from d2f_runtime.models.masks import MaskRows, block_causal_mask
from tiny_models import CONFIGS, MASK, recompute, tiny_model

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("max_elements", [1, 200, 1000])
def test_answers_do_not_depend_on_the_pieces(
    family: str, max_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_runner, "MAX_MASK_ELEMENTS", max_elements)
    model = tiny_model(CONFIGS[family])
    backend = TorchBackend(model, name="tiny")
    slots = [backend.open_slot(40) for _ in range(2)]
    filled = [tuple(4 + (7 * i + n) % 140 for i in range(n)) for n in (24, 8)]
    first = [
        Window(0, (*tokens, *[MASK] * 8), 8, (8, len(tokens), len(tokens) + 8))
        if len(tokens) > 8
        else Window(0, (*tokens, *[MASK] * 8), 8, (8, 16))
        for tokens in filled
    ]
    found = backend.step([StepRow(s, w) for s, w in zip(slots, first, strict=True)])
    for window, proposals in zip(first, found, strict=True):
        assert list(proposals.tokens) == list(recompute(model, window, (), ()).tokens)
    later = [Window(8, (*tokens[8:], *[MASK] * 8), 0, (len(tokens) + 8,)) for tokens in filled]
    found = backend.step([StepRow(s, w) for s, w in zip(slots, later, strict=True)])
    for tokens, window, proposals in zip(filled, later, found, strict=True):
        wanted = recompute(model, window, tokens[:8], (8,))
        assert list(proposals.tokens) == list(wanted.tokens)
        assert list(proposals.confidence) == pytest.approx(list(wanted.confidence), abs=1e-5)


def test_pieces_are_the_mask() -> None:
    start, visible = torch.tensor([3, 0]), torch.tensor([[4, 4, 8, 8, 8], [1, 2, 5, 5, 5]])
    whole = block_causal_mask(start, visible, 3)
    pieces = list(MaskRows(start, visible, 3, 2).pieces())
    assert [piece.shape[2] for _, piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat([piece for _, piece in pieces], dim=2), whole)


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6), spare=st.integers(1, 80))
def test_rows_run_together_as_cheaply_as_can_be(lengths: list[int], spare: int) -> None:
    def cost(groups: Sequence[Sequence[int]]) -> int:
        return sum(max(lengths[n] for n in group) * len(group) + spare for group in groups)

    def partitions(rest: Sequence[int]) -> Iterator[list[list[int]]]:
        if not rest:
            yield []
            return
        for others in range(1 << len(rest) - 1):
            group = [rest[0], *(n for bit, n in enumerate(rest[1:]) if others >> bit & 1)]
            for more in partitions([n for n in rest if n not in group]):
                yield [group, *more]

    found = plain_runner.groups(lengths, spare_rows=spare)
    assert sorted(n for group in found for n in group) == [*range(len(lengths))]
    assert cost(found) == min(map(cost, partitions(range(len(lengths)))))
