import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.scripted import (
    EOS_ID,
    MASK_ID,
    ByteCodec,
    ScriptedBackend,
    StepGate,
    load,
)
from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.decoding.window import NO_TOKEN, Window
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, OutOfCapacity
from fakes import info, params

PROMPT = tuple(b"hi")
FIRST = Window(0, (*PROMPT, *[MASK_ID] * 4), 2, (2, 6))


def row(slot: Slot, window: Window = FIRST, **fields: object) -> StepRow:
    return replace(StepRow(slot=slot, window=window), **fields)  # type: ignore[arg-type]


def test_proposes_the_answer_at_masks_and_nothing_elsewhere() -> None:
    backend = ScriptedBackend("abc", tokens_per_step=2)
    (proposals,) = backend.step([row(backend.open_slot(10))])
    assert proposals.tokens == [NO_TOKEN, NO_TOKEN, *b"abc", EOS_ID]
    assert proposals.confidence == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert proposals.rank is None


def test_confidence_function_gets_answer_position_and_session_step() -> None:
    seen: list[tuple[int, int]] = []

    def confidence(position: int, step: int) -> float:
        seen.append((position, step))
        return 0.5

    backend = ScriptedBackend("abc", confidence=confidence)
    slot = backend.open_slot(10)
    backend.step([row(slot)])
    backend.step([row(slot, Window(2, (97, *[MASK_ID] * 3), 0, (6,)))])
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize(
    "answers",
    ["abc", {"hi": "abc", "ho": "xyz"}, lambda prompt: b"abc" if prompt == PROMPT else b""],
)
def test_answers_are_one_text_or_one_per_prompt_or_a_function(answers: object) -> None:
    backend = ScriptedBackend(answers)  # type: ignore[arg-type]
    (proposals,) = backend.step([row(backend.open_slot(10))])
    assert proposals.tokens[2:5] == list(b"abc")


def test_rank_is_given_where_it_is_asked_for() -> None:
    backend = ScriptedBackend("abc")
    (proposals,) = backend.step([row(backend.open_slot(10), rank="margin")])
    assert proposals.rank == proposals.confidence


def test_decoder_and_backend_make_the_answer() -> None:
    answer = "a longer answer, over several blocks"
    backend = ScriptedBackend(answer, tokens_per_step=3)
    slot = backend.open_slot(200)
    decoder = BlockDecoder(
        prompt_tokens=PROMPT, params=params(), mask_id=MASK_ID, eos_ids=(EOS_ID,)
    )
    while window := decoder.next_window():
        decoder.apply(backend.step([row(slot, window)])[0])
    assert ByteCodec().decode(decoder.answer_tokens[: decoder.num_useful_tokens]) == answer


@pytest.mark.parametrize(
    ("window", "fields", "message"),
    [
        (Window(3, (MASK_ID,), 0, (4,)), {}, "window starts at 3 but 0 are cached"),
        (Window(0, (1,) * 11, 0, (11,)), {}, "window ends at 11, slot holds 10"),
        (Window(0, (1, MASK_ID), 0, (2, 1)), {}, "block_stops"),
        (Window(0, (1, MASK_ID), 0, (1,)), {}, "block_stops"),
        (Window(0, (1, 1, MASK_ID), 1, (2, 3)), {}, "not on an edge"),
        (Window(0, (1, MASK_ID, MASK_ID), 2, (2, 3)), {}, "a mask is about to be cached"),
        (FIRST, {"temperature": 0.5}, "uniforms"),
        (FIRST, {"uniforms": [0.5] * 6}, "uniforms"),
        (FIRST, {"temperature": 0.5, "uniforms": [0.5]}, "1 uniforms for 6 entries"),
    ],
)
def test_row_that_breaks_a_rule_of_the_seam_is_refused(
    window: Window, fields: dict[str, object], message: str
) -> None:
    backend = ScriptedBackend("abc")
    with pytest.raises(ValueError, match=message):
        backend.step([row(backend.open_slot(10), window, **fields)])


def test_slots_are_counted_and_close_twice() -> None:
    backend = ScriptedBackend()
    first, second = backend.open_slot(5), backend.open_slot(7)
    assert list(backend.open_slots) == [first, second]
    backend.close_slot(first)
    backend.close_slot(first)
    assert (list(backend.open_slots), backend.num_opened, backend.num_closed) == ([second], 2, 1)


def test_capacity_is_shared_by_the_open_slots() -> None:
    backend = ScriptedBackend(capacity=10)
    slot = backend.open_slot(6)
    with pytest.raises(OutOfCapacity, match="5 tokens was asked for, but 4 of 10 are free"):
        backend.open_slot(5)
    backend.close_slot(slot)
    backend.open_slot(10)


def test_error_is_raised_at_its_step() -> None:
    backend = ScriptedBackend("abc", errors={1: RuntimeError("now")})
    slot = backend.open_slot(10)
    backend.step([row(slot)])
    with pytest.raises(RuntimeError, match="now"):
        backend.step([row(slot)])


def test_gate_holds_a_step_until_it_is_let_through() -> None:
    gate = StepGate()
    backend = ScriptedBackend("abc", gate=gate)
    slot = backend.open_slot(10)
    done: list[Sequence[int]] = []
    thread = threading.Thread(target=lambda: done.append(backend.step([row(slot)])[0].tokens))
    thread.start()
    gate.wait_entered()
    assert not done
    gate.let_through()
    thread.join()
    assert len(done) == 1
    with pytest.raises(TimeoutError, match="1 of 2 steps"):
        gate.wait_entered(2, timeout_s=0.001)


def test_byte_codec_round_trips_and_replaces_broken_utf8() -> None:
    codec = ByteCodec()
    assert codec.decode(codec.encode("naïve 🙂")) == "naïve 🙂"
    assert codec.decode([97, 0xC3]) == "a�"
    assert codec.decode([97, EOS_ID, MASK_ID]) == "a"


def test_loads_a_script_from_a_folder(tmp_path: Path) -> None:
    script: dict[str, object] = {"answers": "abc", "tokens_per_step": 1}
    (tmp_path / "script.json").write_text(json.dumps(script))
    backend = load(tmp_path, device="cpu", quantization="auto")
    assert (backend.answers, backend.tokens_per_step) == ("abc", 1)
    assert backend.info == info(name=tmp_path.name)
    (tmp_path / "script.json").write_text(json.dumps(script | {"prompt_attention": "causal"}))
    backend = load(tmp_path, device="cpu", quantization="auto")
    assert backend.info == info(name=tmp_path.name, prompt_attention="causal")


def test_folder_without_a_readable_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"script\.json"):
        ScriptedBackend.load(tmp_path)
    for script in ("[]", '{"answers": "abc", "prompt_attention": "most"}'):
        (tmp_path / "script.json").write_text(script)
        with pytest.raises(ModelDamaged, match=r"script\.json"):
            ScriptedBackend.load(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("hi", "hello"),
        ("user: hi\nassistant: ", "hello"),
        ("user: x\nassistant: y\nuser: hi\nassistant: ", "hello"),
        ("user: ho\nassistant: ", "The script has no answer to 'ho'."),
    ],
)
def test_conversation_gets_the_answer_to_its_last_question(prompt: str, answer: str) -> None:
    backend, tokens = ScriptedBackend({"hi": "hello"}), tuple(prompt.encode())
    length = len(tokens) + len(answer)
    window = Window(0, (*tokens, *[MASK_ID] * len(answer)), len(tokens), (len(tokens), length))
    (proposals,) = backend.step([row(backend.open_slot(length), window)])
    assert bytes(proposals.tokens[len(tokens) :]).decode() == answer
