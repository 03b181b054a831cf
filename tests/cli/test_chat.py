"""The terminal chat: what a person types, what is asked of the model, what is shown."""

import asyncio
import io
import signal
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from d2f_runtime.backends.scripted import SCRIPTED_INFO, ByteCodec, ScriptedBackend
from d2f_runtime.engine import LocalEngine
from d2f_stream import Engine, ModelNotFound
from d2f_stream.terminal.chat import Chat, Fetch
from d2f_stream.terminal.markdown_stream import MarkdownStream
from d2f_stream.terminal.transcript import Transcript


class Typed:
    """Lines as if typed one after the other; an exception among them is raised instead."""

    def __init__(self, lines: Iterable[str | type[BaseException]]) -> None:
        self._lines = iter(lines)

    async def __call__(self) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


class Recorded(ByteCodec):
    """A codec with a template that tells what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        self.asked.append([dict(message) for message in messages])
        return super().render(messages)


def nothing_to_fetch(model: str) -> None:
    """Every model is here."""


async def talk(
    *lines: str | type[BaseException],
    backend: ScriptedBackend | None = None,
    system: str = "",
    fetch: Fetch = nothing_to_fetch,
) -> tuple[str, Recorded]:
    codec = Recorded()
    running = backend or ScriptedBackend("It is **eight**.\n")

    @asynccontextmanager
    async def opened(model: str | None) -> AsyncIterator[Engine]:
        if model == "missing":
            raise ModelNotFound("there is no model named missing")
        if model == "slow":
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()
        async with LocalEngine.over(running, codec) as engine:
            yield engine

    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    chat = Chat(opened, Typed(lines), fetch=fetch, console=console, system=system)
    await chat.run(None)
    assert isinstance(console.file, io.StringIO)
    assert not running.open_slots
    return console.file.getvalue(), codec


async def test_turns_add_up_and_markdown_is_rendered() -> None:
    shown, codec = await talk("Six and two?", "Why?", system="Be brief.")
    assert shown.count("It is eight.") == 2
    assert codec.asked[-1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Six and two?"},
        {"role": "assistant", "content": "It is **eight**.\n"},
        {"role": "user", "content": "Why?"},
    ]


async def test_new_forgets_and_retry_asks_again() -> None:
    _, codec = await talk("One?", "/retry", "/new", "Two?")
    assert [[m["content"] for m in asked] for asked in codec.asked] == [
        ["One?"],
        ["One?"],
        ["Two?"],
    ]


async def test_canvas_asks_for_drafts_and_changes_no_turn() -> None:
    plain, codec = await talk("Six and two?", "Why?")
    drawn, same = await talk("/canvas on", "Six and two?", "Why?", "/canvas off")
    assert codec.asked == same.asked
    assert drawn.count("It is eight.") == plain.count("It is eight.") == 2
    assert "the canvas is on" in drawn
    assert "the canvas is off" in drawn


async def test_retry_says_that_a_greedy_answer_comes_again() -> None:
    greedy, _ = await talk("One?", "/retry")
    sampled, _ = await talk("One?", "/set temperature 1", "/retry")
    assert "the same answer comes again" in greedy
    assert "the same answer comes again" not in sampled


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/retry", "nothing was asked yet"),
        ("/noise", "there is no command /noise"),
        ("/sistem", "did you mean /system?"),
        ("/set heat 3", "there is no parameter 'heat'"),
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature", "temperature = 0.0"),
        ("/set seed", "seed = null"),
        ("/set seed null", "seed = null"),
        ('/set stop ["a", "b"]', 'stop = ["a","b"]'),
        ("/set stop", "stop = []"),
        ("/set rank margin", "rank = margin"),
        ("/set temperature hot", "temperature"),
        ("/model missing", "there is no model named missing"),
        ("/canvas", "the canvas is off"),
        ("/canvas no", "/canvas is 'no' but must be one of on, off"),
        ("/save", "/save needs a file name"),
        ("/save /nowhere/chat.json", "/nowhere/chat.json"),
    ],
)
async def test_mistake_is_told_and_the_chat_goes_on(line: str, said: str) -> None:
    shown, codec = await talk(line, KeyboardInterrupt, "Still there?")
    assert f"error: {said}" in shown or said in shown
    assert len(codec.asked) == 1


async def test_interrupt_while_a_model_loads_keeps_the_one_before() -> None:
    shown, codec = await talk("/model slow", "Still there?")
    assert f"stopped; {SCRIPTED_INFO.name} stays" in shown
    assert shown.count("It is eight.") == len(codec.asked) == 1


async def test_interrupt_while_a_model_is_fetched_keeps_the_one_before() -> None:
    def fetch(model: str) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError(f"{model} was fetched")

    shown, codec = await talk("/model other", "Still there?", fetch=fetch)
    assert f"stopped; {SCRIPTED_INFO.name} stays" in shown
    assert shown.count("It is eight.") == len(codec.asked) == 1


async def test_interrupt_at_an_answer_means_what_it_did_before_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    await talk("Six and two?", "/model other", "/model slow")
    assert signal.getsignal(signal.SIGINT) is before


async def test_full_context_leaves_the_oldest_turns_out_and_says_so() -> None:
    info = replace(SCRIPTED_INFO, max_len=128)
    backend = ScriptedBackend("A" * 20 + "\n", info=info)
    shown, codec = await talk("/set max_new_tokens 24", *["B" * 20] * 5, backend=backend)
    assert "messages are left out from now on" in shown
    assert codec.asked[-1][-1]["content"] == "B" * 20
    assert len(codec.asked[-1]) < 9


async def test_older_turns_make_room_for_a_whole_answer_and_the_question_does_not() -> None:
    backend = ScriptedBackend("A" * 300, info=replace(SCRIPTED_INFO, max_len=400))
    shown, codec = await talk("B" * 20, "C" * 20, "D" * 200, backend=backend)
    assert [len(asked) for asked in codec.asked] == [1, 3, 1, 3, 1, 1]
    assert "error" not in shown
    assert "256 tokens" in shown  # the default length
    assert f"{400 - len('user: assistant: ') - 201} tokens" in shown  # what the last one leaves


async def test_empty_answer_is_told() -> None:
    shown, _ = await talk("Anything?", backend=ScriptedBackend(""))
    assert "the model ended its answer at once" in shown


async def test_question_that_got_no_answer_is_the_one_that_is_asked_again() -> None:
    script = {
        "user: One?\nassistant: ": "A.",
        "user: One?\nassistant: A.\nuser: Two?\nassistant: ": "",
    }
    _, codec = await talk("One?", "Two?", "/retry", backend=ScriptedBackend(script))
    assert [asked[-1]["content"] for asked in codec.asked] == ["One?", "Two?", "Two?"]
    assert codec.asked[1] == codec.asked[2]


async def test_chat_is_saved_as_json(tmp_path: Path) -> None:
    await talk("Six and two?", f"/save {tmp_path / 'chat.json'}")
    assert '"content": "Six and two?"' in (tmp_path / "chat.json").read_text()


@given(
    st.lists(
        st.sampled_from(["# a\n", "b\n", "\n", "```\n", "| a |\n", "|---|\n", "- c\n", "1. d"])
    ),
    st.integers(min_value=1, max_value=7),
)
def test_settled_markdown_adds_up_and_ends_at_a_block(pieces: list[str], size: int) -> None:
    text, stream, settled = "".join(pieces), MarkdownStream(), ""
    for start in range(0, len(text), size):
        settled += stream.append(text[start : start + size])
    assert settled + stream.finish() == text


def test_open_fence_is_not_settled() -> None:
    stream = MarkdownStream()
    assert stream.append("Look:\n\n```python\nprint(1)\n\n") == "Look:\n\n"
    assert stream.append("print(2)\n```\n") == ""
    assert stream.append("\nDone.") == "```python\nprint(1)\n\nprint(2)\n```\n\n"


@given(st.lists(st.sampled_from(["ask", "answer", "forget", "retry", "withdraw", "clear"])))
def test_transcript_always_ends_where_a_person_is(steps: list[str]) -> None:
    chat = Transcript("s")
    for step in steps:
        is_asked = bool(chat.turns) and chat.turns[-1]["role"] == "user"
        if step == "ask" and not is_asked:
            chat.ask("q")
        elif step == "answer" and is_asked:
            chat.answer("a")
        elif step == "retry" and chat.turns:
            chat.retry()
        elif step in {"forget", "withdraw", "clear"}:
            getattr(chat, step)()
        roles = [turn["role"] for turn in chat.turns]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
        assert 0 <= chat.num_forgotten <= max(0, len(roles))
        assert not chat.turns or len(chat.messages) >= 2 or roles[-1] == "assistant"
