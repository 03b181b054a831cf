"""What every backend must do, whatever it is made of: its slots, and what it refuses."""

import pytest

from backend_rigs import Rig, assert_same, cache_up_to, canvas, expected
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import OutOfCapacity
from tiny_models import CONFIGS, MASK, MIXTURES, NUM_TOKENS, tiny_folder

pytestmark = pytest.mark.torch


def test_a_slot_starts_over_after_preemption(rig: Rig) -> None:
    case = canvas(8)
    slot = rig.backend.open_slot(64)
    cache_up_to(rig.backend, slot, canvas(9), (11, 15))
    cache_up_to(rig.backend, slot, case, (11,))
    (found,) = rig.backend.step([StepRow(slot, case.window(11))])
    assert_same(found, expected(rig, case, case.window(11)))
    rig.backend.close_slot(slot)


def test_slots_run_out_and_come_back(rig: Rig) -> None:
    size = (1 << 30) // rig.backend.info.kv_bytes_per_token // 2  # of 1 GiB, the default
    slots = [rig.backend.open_slot(size) for _ in range(2)]
    with pytest.raises(OutOfCapacity, match=f"no room for the K/V of {size} tokens: 0 of "):
        rig.backend.open_slot(size)
    rig.backend.close_slot(slots[0])
    rig.backend.close_slot(slots[0])  # idempotent: its room is not counted twice
    slots[0] = rig.backend.open_slot(size)
    with pytest.raises(OutOfCapacity):
        rig.backend.open_slot(size)
    for slot in slots:
        rig.backend.close_slot(slot)


def test_a_window_that_the_slot_does_not_hold_is_refused(rig: Rig) -> None:
    case = canvas(12)
    slot = rig.backend.open_slot(22)
    with pytest.raises(ValueError, match="window ends at 23 but the slot has room for 22 tokens"):
        rig.backend.step([StepRow(slot, case.window(0, 11))])
    rig.backend.close_slot(slot)


def test_a_window_that_leaves_a_gap_is_refused(rig: Rig) -> None:
    slot = rig.backend.open_slot(64)
    with pytest.raises(ValueError, match="window starts at 11 but the slot holds 0 tokens"):
        rig.backend.step([StepRow(slot, canvas(13).window(11))])
    rig.backend.close_slot(slot)


def test_two_rows_of_a_slot_are_refused(rig: Rig) -> None:
    slot = rig.backend.open_slot(64)
    row = StepRow(slot, canvas(13).window(0))
    with pytest.raises(ValueError, match="two rows of a step have the same slot"):
        rig.backend.step([row, row])
    rig.backend.close_slot(slot)


def test_sampling_without_uniform_numbers_is_refused(rig: Rig) -> None:
    slot = rig.backend.open_slot(64)
    with pytest.raises(ValueError, match="one uniform number per entry"):
        rig.backend.step([StepRow(slot, canvas(14).window(0), temperature=0.5)])
    rig.backend.close_slot(slot)


def test_info_names_the_model(rig: Rig, family: str) -> None:
    config, info = (CONFIGS | MIXTURES)[family], rig.backend.info
    assert (info.family, info.mask_id, info.eos_ids) == (config.family, MASK, (1, 2))
    assert info.num_tokens == NUM_TOKENS
    assert info.prompt_attention == config.prompt_attention
    per_layer = 2 * config.num_kv_heads * config.head_dim * 4
    assert info.kv_bytes_per_token == config.num_layers * per_layer
    assert info.device in ("cpu", "cuda")
    assert info.quantization == "fp32"


def test_closing_twice_is_fine(family: str) -> None:
    for name, kind in (("torch", "torch"), ("onnx", "fp32")):
        folder = tiny_folder(family, "torch" if kind == "torch" else "fp32")
        backend = open_backend(name, folder, device="cpu", quantization="auto")
        slot = backend.open_slot(8)
        backend.close()
        backend.close()
        backend.close_slot(slot)


def test_the_torch_pool_is_bounded_by_tokens(family: str) -> None:
    backend = TorchBackend(
        load_checkpoint(tiny_folder(family, "torch")), name="small", max_tokens=100
    )
    first, second = backend.open_slot(60), backend.open_slot(40)
    with pytest.raises(OutOfCapacity, match="0 of 100 are free and 2 of 1024 slots open"):
        backend.open_slot(1)
    backend.close_slot(first)
    backend.close_slot(second)
    backend.open_slot(100)
