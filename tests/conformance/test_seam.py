"""The rules of the seam that need no model to agree with: the scripted backend keeps them too."""

from collections.abc import Iterator

import pytest

from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.decoding.window import NO_TOKEN, Window
from d2f_stream.core.params import GenerationParams
from tiny_models import tiny_folder

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=["scripted", "torch", "onnx"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "scripted":
        yield ScriptedBackend("abcdefgh" * 8)
        return
    folder = tiny_folder("llada", "torch" if request.param == "torch" else "fp32")
    opened = open_backend(request.param, folder, device="cpu", quantization="auto")
    yield opened
    opened.close()


def window(backend: Backend, start: int, *, filled: int, masks: int, cached: int = 0) -> Window:
    mask = backend.info.mask_id
    tokens = tuple(10 + i for i in range(filled)) + (mask,) * masks
    stops = [start + filled] if filled else []
    return Window(start, tokens, cached, (*stops, *([start + len(tokens)] if masks else [])))


def test_default_parameters_are_accepted(backend: Backend) -> None:
    backend.check(GenerationParams())


def test_no_rows_no_answers(backend: Backend) -> None:
    assert backend.step([]) == []


def test_proposals_fill_masks_only_and_follow_the_rows(backend: Backend) -> None:
    slots = [backend.open_slot(64) for _ in range(3)]
    shapes = [(4, 3), (7, 1), (2, 8)]
    rows = [
        StepRow(slot, window(backend, 0, filled=filled, masks=masks))
        for slot, (filled, masks) in zip(slots, shapes, strict=True)
    ]
    for (filled, masks), found in zip(shapes, backend.step(rows), strict=True):
        assert len(found.tokens) == len(found.confidence) == filled + masks
        assert list(found.tokens[:filled]) == [NO_TOKEN] * filled
        assert all(0 <= t != backend.info.mask_id for t in found.tokens[filled:])
        assert all(0 <= c <= 1 for c in found.confidence)
        assert found.rank is None
    for slot in slots:
        backend.close_slot(slot)


def test_a_slot_goes_on_where_it_stopped(backend: Backend) -> None:
    slot = backend.open_slot(64)
    backend.step([StepRow(slot, window(backend, 0, filled=6, masks=4, cached=6))])
    (found,) = backend.step([StepRow(slot, window(backend, 6, filled=0, masks=4))])
    assert NO_TOKEN not in found.tokens
    backend.close_slot(slot)


def test_a_window_that_leaves_a_gap_is_refused(backend: Backend) -> None:
    slot = backend.open_slot(64)
    with pytest.raises(ValueError, match="window starts at 6 but"):
        backend.step([StepRow(slot, window(backend, 6, filled=0, masks=4))])
    backend.close_slot(slot)


def test_slots_are_closed_once_however_often(backend: Backend) -> None:
    slot = backend.open_slot(8)
    backend.close_slot(slot)
    backend.close_slot(slot)
    assert backend.open_slot(8) != slot
