"""Text that a model makes up: what is kept of it, and that it is the model's own."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.generation import Generation, Job, Outcome
from d2f_export.distill.from_ar.loops import loop_lengths
from d2f_export.distill.from_ar.self_written import ChatFrame, Overlap, SelfWritten
from d2f_export.distill.from_ar.settings import WritingSettings
from d2f_export.distill.from_ar.streams import named_weights, streams_of
from d2f_export.distill.from_ar.writing import write_data
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import InvalidRequest
from tiny_checkpoints import write_model

pytestmark = pytest.mark.torch

END = 2


def tiny() -> Transformer:
    model = Transformer(
        TransformerConfig(
            family="llama", vocab_size=40, num_tokens=40, hidden_size=24, num_layers=2,
            num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40, mask_id=40, eos_ids=(END,),
            shift_logits=True, prompt_attention="causal", tie_embeddings=True,
        )
    )  # fmt: skip
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.requires_grad_(False)


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Return what the model says, one whole forward a token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and tokens[-1] != END:
        ids = torch.tensor([tokens])
        hidden, _ = model(ids, torch.arange(len(tokens))[None], None, causal=True)
        tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    return tokens[len(prompt) :]


def test_more_jobs_than_slots_are_each_answered_as_one_by_one() -> None:
    model = tiny()
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 40, n % 6 + 1).tolist() for n in range(11)]
    jobs = iter([Job(prompt, 0.0, 5 + n, n) for n, prompt in enumerate(prompts)])
    found: dict[int, Outcome] = {}
    generation = Generation(
        streams_of(model.config, named_weights(model), compiled=False),
        slots=3, length=40, end_ids=(END,), seed=0,
    )  # fmt: skip
    generation.run(lambda: next(jobs, None), lambda done: found.update({done.job.tag: done}))
    for n, prompt in enumerate(prompts):
        expected = greedy(model, prompt, 5 + n)
        assert found[n].tokens == expected
        assert found[n].reason == ("end" if expected[-1] == END else "length")


def test_time_that_is_over_cuts_what_is_being_written() -> None:
    model = tiny()
    found: list[Outcome] = []
    jobs = iter([Job([5, 6], 0.0, 30)])
    generation = Generation(
        streams_of(model.config, named_weights(model), compiled=False),
        slots=2, length=64, end_ids=(), seed=0,
    )  # fmt: skip
    generation.run(lambda: next(jobs, None), found.append, seconds=0.0)
    assert [done.reason for done in found] == ["length"]


@pytest.mark.parametrize("period", [1, 5, 24, 64])
def test_loops_are_found_with_their_length(period: int) -> None:
    random = np.random.default_rng(period)
    text = random.integers(0, 1000, 300)
    looped = np.concatenate([text, np.resize(random.integers(0, 1000, period), 4 * period + 90)])
    rows = np.zeros((3, 800), np.int64)
    rows[0, : len(looped)], rows[1, : len(text)] = looped, text
    lengths = np.array([len(looped), len(text), 9])
    found = loop_lengths(rows, lengths)
    assert found[0] >= max(48, 2 * period)
    assert found[1:].tolist() == [0, 0]


FRAME = ChatFrame([3, 4], [4], [5], [6, 4], END)


def source(**changes: object) -> SelfWritten:
    values: dict[str, object] = {
        "questions": [], "overlap": Overlap([]), "answer_limit": 60, "length": 200, "seed": 0,
    }  # fmt: skip

    def encode(text: str) -> list[int]:
        return [10 + ord(letter) for letter in text]

    def decode(ids: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in ids)

    return SelfWritten(FRAME, encode, decode, **(values | changes))  # type: ignore[arg-type]


def prompt_of(written: SelfWritten, words: list[int], reason: str = "end") -> Job | None:
    """Let a prompt be written, and return the job of its answer."""
    job = written.next_job()
    assert job is not None
    assert job.temperature > 0
    written.take(Outcome(job, [*words, END] if reason == "end" else words, reason))
    following = written.next_job()
    return following if following is not None and following.temperature == 0 else None


def test_a_prompt_becomes_a_question_and_its_answer_an_example() -> None:
    written = source()
    job = prompt_of(written, [20, 21, 22, 23])
    assert job is not None
    assert job.prompt[-5:] == [20, 21, 22, 23, 5]
    written.take(Outcome(job, [30, 31, END], "end"))
    assert written.examples == [(job.prompt, [30, 31, END])]


@pytest.mark.parametrize("reason", ["length", "loop"])
def test_unfinished_prompts_are_dropped_and_long_answers_cut(reason: str) -> None:
    written = source()
    assert prompt_of(written, [20, 21, 22], reason) is None
    job = prompt_of(written, [20, 21, 22, 23])
    assert job is not None
    written.take(Outcome(job, [30] * 47, reason))
    assert written.examples == []
    written.take(Outcome(job, list(range(30, 78)), reason))
    assert written.examples == [(job.prompt, list(range(30, 78)))]


def test_the_same_prompt_is_answered_once() -> None:
    written = source(seed=5)
    jobs = [prompt_of(written, [20, 21, 22, 23]) for _ in range(60)]
    kept = [tuple(job.prompt) for job in jobs if job is not None]
    assert len(kept) == len(set(kept))
    assert len(kept) < 60
    assert written.counts["prompt: seen before"] > 0


def test_answers_that_are_in_an_evaluation_set_are_refused() -> None:
    known = " ".join(f"W{n}" for n in range(30, 43))
    written = source(overlap=Overlap([f"and {known} so on"]))
    job = prompt_of(written, [20, 21, 22, 23])
    assert job is not None
    written.take(Outcome(job, [*range(30, 43), END], "end"))
    assert written.examples == []
    written.take(Outcome(job, [*range(30, 42), END], "end"))
    assert len(written.examples) == 1


def test_questions_come_first_and_too_long_ones_not_at_all() -> None:
    written = source(questions=["ab", "x" * 400])
    job = written.next_job()
    assert job is not None
    assert (job.prompt, job.temperature) == ([3, 4, 107, 108, 5], 0.0)
    assert written.counts["prompt: too long"] == 1


def test_requests_begin_with_the_starters_that_were_given() -> None:
    written = source(starters=["ab"])
    jobs = [written.next_job() for _ in range(40)]
    begun = [job for job in jobs if job is not None and job.prompt[-2:] == [107, 108]]
    assert 8 < len(begun) < 32
    assert all(job is not None and job.prompt[-1] in (4, 108) for job in jobs)


def test_a_starter_without_room_is_refused_by_its_words() -> None:
    source(starters=["x" * 182])
    with pytest.raises(InvalidRequest, match=r"'x+' has 183 tokens.*200, leaves room for 182"):
        source(starters=["ab", "x" * 183])


def test_a_second_turn_without_room_for_a_starter_begins_without() -> None:
    written = source(starters=["x" * 100], length=400)
    for _ in range(60):
        job = prompt_of(written, [20, 21, 22, 23, *range(24 + len(written.examples))])
        if job is not None:
            written.take(Outcome(job, [*range(30, 90), END], "end"))
        following = written.next_job()
        assert following is not None
        assert len(following.prompt) + 16 <= 400


def test_frame_is_found_in_a_template() -> None:
    def render(messages: list[dict[str, str]]) -> str:
        turns = "".join(f"<{m['role'][0]}>{m['content']}<e>" for m in messages)
        return f"<s>help<e>{turns}<a>"

    ids = {"<s>": 1, "<e>": 2, "<u>": 3, "<a>": 4, "help": 9}

    def encode(text: str) -> list[int]:
        found = []
        while text:
            name = next(name for name in ids if text.startswith(name))
            found.append(ids[name])
            text = text[len(name) :]
        return found

    frame = ChatFrame.of(render, encode, (1, 2, 3, 4), 2)
    assert frame == ChatFrame([1, 9, 2, 3], [3], [2, 4], [3], 2)


def test_data_is_written_for_a_training(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "qwen2")
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "How many apples?"}) + "\n")
    settings = WritingSettings(
        model=str(tmp_path / "base"), questions=(str(tmp_path / "q.jsonl"),), answers=1, slots=1,
        length=160, answer_length=64,
    )  # fmt: skip
    answers = write_data(settings, tmp_path / "data.npz", cpu=True)
    assert len(answers) >= 1
    stored = Answers.read(tmp_path / "data.npz")
    assert stored.tokens.tolist() == answers.tokens.tolist()
    with pytest.raises(InvalidRequest, match="exists; choose another name"):
        write_data(settings, tmp_path / "data.npz", cpu=True)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "qwen2")
    (tmp_path / "q.jsonl").write_text('{"text": 3}\n')
    settings = WritingSettings(
        model=str(tmp_path / "base"), questions=(str(tmp_path / "q.jsonl"),), length=200
    )
    with pytest.raises(InvalidRequest, match=r"q\.jsonl:1 has no text"):
        write_data(settings, tmp_path / "data.npz", cpu=True)
    with pytest.raises(InvalidRequest, match=r"must end with \.npz"):
        write_data(settings, tmp_path / "data.json", cpu=True)


def test_files_may_begin_with_a_mark_but_not_be_blank(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "qwen2")
    path = tmp_path / "s.jsonl"
    path.write_text('\ufeff{"prompt": " "}\n', encoding="utf-8")
    settings = WritingSettings(model=str(tmp_path / "base"), starters=(str(path),), length=200)
    with pytest.raises(InvalidRequest, match=r"s\.jsonl holds no starters"):
        write_data(settings, tmp_path / "data.npz", cpu=True)
