from dataclasses import replace

import numpy as np
import pytest

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.kv_pool import MAX_SLOTS, Span
from d2f_runtime.backends.scripted import SCRIPTED_INFO
from d2f_runtime.backends.step_plan import NO_BORDER, Layout, StepPlan, plan_step
from d2f_runtime.decoding.window import Window
from d2f_runtime.models.facts import ModelInfo

pytestmark = pytest.mark.torch

MASK = SCRIPTED_INFO.mask_id
SHIFTED = replace(SCRIPTED_INFO, shift_logits=True)
LAYOUT = Layout(rows=16, tiles=6, sessions=3)


def window(start: int, filled: int, masks: int, cached: int = 0) -> Window:
    tokens = (*range(10, 10 + filled), *[MASK] * masks)
    middle = [start + filled] if filled and masks else []
    return Window(start, tokens, cached, (*middle, start + len(tokens)))


def plan(*rows: tuple[int, Window, Span], info: ModelInfo = SCRIPTED_INFO) -> StepPlan:
    steps = [StepRow(Slot(slot), window) for slot, window, _ in rows]
    return plan_step(steps, [span for *_, span in rows], info)


def filled(plan: StepPlan, per_tile: int = 4) -> dict[str, list[int]]:
    flat = np.full(LAYOUT.size, 77, dtype=np.int32)  # poison: every place must be written
    plan.fill(flat.data, LAYOUT, per_tile)
    names = [
        "tokens",
        "positions",
        "places",
        "visible",
        "head",
        "drafts",
        "tiles",
        "last_from",
        "last_to",
    ]
    edges = np.cumsum((0, *LAYOUT.sizes)).tolist()
    return {n: flat[edges[i] : edges[i + 1]].tolist() for i, n in enumerate(names)}


def test_a_window_is_written_where_it_would_be_cached() -> None:
    found = filled(plan((0, window(20, 4, 3, cached=4), Span(5, 300, 64, 20))))
    assert found["tokens"] == [10, 11, 12, 13, MASK, MASK, MASK] + [0] * 9
    assert found["positions"][:7] == list(range(20, 27))
    assert found["places"] == [*range(320, 327)] + [-1] * 9
    assert found["visible"] == [24] * 4 + [27] * 3 + [0] * 9
    assert found["head"] == [4, 5, 6] + [0] * 13
    assert found["drafts"] == [0] * 4 + [1] * 3 + [0] * 9
    assert found["tiles"] == [0, 4, 300, NO_BORDER, 0, 4, 3, 300, NO_BORDER, 0] + [0] * 20
    assert (found["last_from"][0], found["last_to"]) == (3, [5, MAX_SLOTS, MAX_SLOTS])


def test_sessions_stand_one_after_the_other_in_tiles_of_their_own() -> None:
    rows = [(0, window(0, 5, 0, 5), Span(0, 0, 64)), (1, window(8, 0, 2), Span(1, 64, 64, 8))]
    found = filled(plan(*rows))
    assert found["places"][:7] == [0, 1, 2, 3, 4, 72, 73]
    tiles = np.array(found["tiles"]).reshape(-1, 5)[:, :3].tolist()
    assert tiles == [[0, 4, 0], [4, 1, 0], [5, 2, 64], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert found["head"][:2] == [5, 6]


def test_shifted_models_predict_a_first_mask_from_the_slots_last_state() -> None:
    rows = [(0, window(6, 0, 3), Span(9, 0, 64, 6)), (1, window(4, 2, 2), Span(3, 64, 64, 4))]
    found = filled(plan(*rows, info=SHIFTED))
    assert found["head"][:5] == [-10, 0, 1, 4, 5]


def test_a_placeholder_is_predicted_without_a_row() -> None:
    lone = Window(6, (MASK,), 0, (7,))
    step = plan((0, lone, Span(4, 0, 64, 6)), info=SHIFTED)
    assert (step.num_rows, step.num_masks) == (0, 1)
    found = filled(step)
    assert found["head"][0] == -5
    assert not any(found["tiles"])
    assert set(found["places"]) == {-1}


def test_long_canvases_count_on() -> None:
    found = filled(plan((0, window(5000, 0, 3), Span(0, 10, 6000, 5000))))
    assert found["positions"][:3] == [5000, 5001, 5002]
    assert found["places"][:3] == [5010, 5011, 5012]


def test_an_empty_step_is_all_padding() -> None:
    found = filled(plan_step([], [], SCRIPTED_INFO))
    assert set(found["places"]) == {-1}
    assert not any(found["visible"] + found["tiles"] + found["tokens"])
    assert set(found["last_to"]) == {MAX_SLOTS}
