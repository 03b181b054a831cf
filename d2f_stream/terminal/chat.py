"""Chat: a conversation with a model in a terminal, and the commands that a person gives it.

Owns the loop of questions and answers. Lines are read by prompt_toolkit, answers drawn by rich;
needs both, so that the command line imports this module on demand.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from d2f_stream.core.errors import D2FError, InvalidRequest, PromptTooLong
from d2f_stream.core.nearest import did_you_mean, one_of
from d2f_stream.core.params import ParamOverrides
from d2f_stream.core.session import Engine
from d2f_stream.terminal.answer import Answer
from d2f_stream.terminal.interrupts import interruptible, on_interrupt, raising_interrupts
from d2f_stream.terminal.line_reader import ReadLine
from d2f_stream.terminal.system_errors import sentence_of
from d2f_stream.terminal.transcript import Transcript
from d2f_stream.terminal.unechoed import unechoed

__all__ = ["COMMANDS", "Chat"]

Open = Callable[[str | None], AbstractAsyncContextManager[Engine]]
Fetch = Callable[[str], None]

COMMANDS: Final = {
    "/new": "begin a new chat; the system prompt stays",
    "/system [TEXT]": "show or set the system prompt, and begin anew",
    "/model [NAME]": "show or change the model; the chat goes on",
    "/set [NAME VALUE]": "show or set a decoding parameter, such as temperature 0.7",
    "/canvas [on|off]": "show each answer's blocks as they are filled in, or leave it",
    "/retry": "ask the last question again",
    "/save FILE": "write the chat as JSON",
    "/help": "show this",
    "/quit": "leave; so does Ctrl-D",
}


class Chat:
    """One person, one terminal, one model at a time.

    Args:
        open_model: opens a model by its name; None is that of the start.
        fetch: gets what is not here of another model, before it is opened; blocks.
        read_line: gives the next line; raises EOFError at the end, KeyboardInterrupt to discard.
        console: what is drawn on.
        overrides: decoding parameters given at the start.
        system: the system prompt.
        canvas: show the blocks of answers as they are filled in.
    """

    def __init__(
        self,
        open_model: Open,
        read_line: ReadLine,
        *,
        fetch: Fetch,
        console: Console,
        overrides: ParamOverrides | None = None,
        system: str = "",
        canvas: bool = False,
    ) -> None:
        self._open = open_model
        self._fetch = fetch
        self._read_line = read_line
        self._console = console
        self._overrides: ParamOverrides = overrides or {}
        self._transcript = Transcript(system)
        self._canvas = canvas
        self._engine: Engine | None = None
        self._stack = AsyncExitStack()

    async def run(self, model: str | None) -> None:
        """Open the model and talk until the person leaves.

        Raises:
            D2FError: the first model cannot be opened. Later errors are shown in the chat.
        """
        async with self._stack:
            await self._change_model(model)
            self._say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat.")
            while True:
                try:
                    line = (await self._read_line()).strip()
                except KeyboardInterrupt:
                    continue
                except EOFError:
                    return
                if line == "/quit":
                    return
                if line:
                    await self._take(line)

    async def _take(self, line: str) -> None:
        try:
            if line.startswith("/"):
                await self._command(line)
            else:
                await self._ask(line)
        except D2FError as error:
            self._complain(str(error))
        except OSError as error:
            self._complain(sentence_of(error))

    async def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/new":
                self._transcript.clear()
                self._say("a new chat")
            case "/system":
                self._set_system(rest)
            case "/model":
                await (self._switch(rest) if rest else self._show_model())
            case "/set":
                self._set(rest)
            case "/canvas":
                self._set_canvas(rest)
            case "/retry":
                question = self._transcript.retry()
                chosen = self._current.defaults.with_overrides(self._overrides)
                if chosen.temperature == 0:
                    self._say("at temperature 0 the same answer comes again; /set temperature 0.7")
                await self._ask(question)
            case "/save":
                self._save(rest)
            case "/help":
                self._console.print(_table(COMMANDS))
            case _:
                known = [command.partition(" ")[0] for command in COMMANDS]
                near = did_you_mean(name, known) or "/help lists what there is"
                raise InvalidRequest(f"there is no command {name}; {near}")

    def _set_system(self, text: str) -> None:
        if text:
            self._transcript.system = text
            self._transcript.clear()
        told = self._transcript.system
        self._say(f"system prompt: {told}" if told else "no system prompt is set")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        current = msgspec.structs.asdict(self._current.defaults.with_overrides(self._overrides))
        if not name:
            self._console.print(_table({field: _told(current[field]) for field in current}))
            return
        if name not in current:
            near = did_you_mean(name, current) or f"there are {', '.join(current)}"
            raise InvalidRequest(f"there is no parameter {name!r}; {near}")
        if not value:
            self._say(f"{name} = {_told(current[name])}")
            return
        read = _value(value)
        given: ParamOverrides = {**self._overrides, name: read}  # type: ignore[misc]
        self._current.defaults.with_overrides(given)  # refuses what does not fit
        self._overrides = given
        self._say(f"{name} = {_told(read)}")

    def _set_canvas(self, text: str) -> None:
        if text not in ("", "on", "off"):
            raise InvalidRequest(f"/canvas is {text!r} but must be {one_of(text, ('on', 'off'))}")
        self._canvas = text == "on" if text else self._canvas
        self._say(f"the canvas is {'on' if self._canvas else 'off'}")

    def _save(self, name: str) -> None:
        if not name:
            raise InvalidRequest("/save needs a file name")
        path = Path(name).expanduser()
        path.write_text(self._transcript.to_json(), encoding="utf-8")
        self._say(f"wrote {path}")

    @property
    def _current(self) -> Engine:
        assert self._engine is not None
        return self._engine

    async def _switch(self, name: str) -> None:
        try:
            with raising_interrupts():  # blocks, which is all that goes on in a chat
                self._fetch(name)
            with interruptible():
                await self._change_model(name)
        except KeyboardInterrupt:
            self._say(f"stopped; {self._current.info.name} stays")

    async def _change_model(self, name: str | None) -> None:
        stack = AsyncExitStack()
        with self._console.status("loading the model ..."), unechoed():
            engine = await stack.enter_async_context(self._open(name))
        await self._stack.aclose()  # only now: a model that cannot be opened leaves the old one
        self._stack.push_async_exit(stack)
        self._engine = engine
        await self._show_model()

    async def _show_model(self) -> None:
        info = self._current.info
        about = f" - {info.description}" if info.description else ""
        self._say(f"{info.name}, {info.max_len:,} tokens of context{about}")

    async def _ask(self, question: str) -> None:
        transcript = self._transcript
        transcript.ask(question)
        is_whole = "max_new_tokens" not in self._overrides  # older turns make room for the answer
        while True:
            try:
                text = await self._stream(is_whole=is_whole)
            except PromptTooLong:
                if not transcript.forget():
                    if is_whole:
                        is_whole = False  # and what the question itself leaves has to do
                        continue
                    transcript.withdraw()
                    raise
                self._say(
                    f"the context of {self._current.info.max_len:,} tokens is full: the oldest "
                    f"{transcript.num_forgotten} messages are left out from now on"
                )
                continue
            except D2FError:
                transcript.withdraw()
                raise
            break
        if text:
            transcript.answer(text)
        else:
            transcript.withdraw()

    async def _stream(self, *, is_whole: bool) -> str:
        """Show one answer, and return it; Ctrl-C ends it early, and keeps what was final.

        Args:
            is_whole: ask for room for the model's longest answer, instead of what is left.
        """
        overrides: ParamOverrides = {**self._overrides}
        if is_whole:
            overrides["max_new_tokens"] = self._current.defaults.max_new_tokens
        if self._canvas:
            overrides["drafts"] = True
        session = self._current.generate(self._transcript.messages, **overrides)
        async with session:
            about = self._current.info.description
            drawing = Answer(self._console, about, canvas=self._canvas)
            with on_interrupt(session.cancel), drawing, unechoed():
                async for event in session.events():
                    drawing.apply(event)
            if drawing.failure is not None:
                await session.result()  # raises it
            return session.text

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def _complain(self, text: str) -> None:
        self._console.print(Text(f"error: {text}", style="red"))


def _value(text: str) -> object:
    """Return a parameter's value as JSON means it, a string where it is none."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _told(value: object) -> str:
    """Return a parameter's value as `_value` takes it."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _table(rows: Mapping[str, str]) -> Table:
    """Return names and what is said of them in columns, each wrapped in its own."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(style="dim")
    for name, told in rows.items():
        table.add_row(Text(name), Text(told))
    return table
