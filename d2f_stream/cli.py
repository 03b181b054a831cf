"""The command line: what `d2f-stream` does, command by command.

Owns output and exit codes: 0 done, 1 failed, 2 bad input (what was typed: an option, a value, the
prompt, a model that there is not), 130 interrupted, 141 nobody reads the output. Arguments are
those of terminal/arguments.py; generation is left to the SDK, output to terminal/views.py and
canvas.py, serving to server/command.py, diagnosis to terminal/doctor.py.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

import msgspec

from d2f_runtime.models.hub import NotFetched
from d2f_stream.core.errors import (
    D2FError,
    InvalidPrompt,
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    NoChatTemplate,
)
from d2f_stream.core.events import Block, Event, StreamFailed, StreamFinished
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Engine
from d2f_stream.server import command
from d2f_stream.terminal import models_command
from d2f_stream.terminal.arguments import ELSEWHERE, build_parser, overrides_of
from d2f_stream.terminal.config import Config, config_path, data_folder
from d2f_stream.terminal.loader import Loader, default_load, fetch_first, for_another, opened_model
from d2f_stream.terminal.losses import tell_of_losses
from d2f_stream.terminal.pacing import paced
from d2f_stream.terminal.system_errors import sentence_of
from d2f_stream.terminal.table import width_here
from d2f_stream.terminal.views import JsonView, TextView, View, about_silence

__all__ = ["Loader", "build_parser", "main", "overrides_of"]

FAILED: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141


def main(argv: Sequence[str] | None = None, *, load: Loader | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes the process's own.
        load: opens the model; None is `d2f_stream.load`.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given and given[0] in ELSEWHERE:  # their arguments are their own
            module, _, function = ELSEWHERE[given[0]].partition(":")
            return getattr(importlib.import_module(module), function)(given[1:]) or 0
        status = _run(given, load)
        sys.stdout.flush()  # here, where a full disk can be told
        return status
    except D2FError as exc:
        _complain(str(exc))
        return _status(exc)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except OSError as exc:  # such as a full disk
        _complain(sentence_of(exc))
        _discard_output()
        return FAILED


def _run(given: Sequence[str], load: Loader | None) -> int:
    parser = build_parser()
    args = parser.parse_args(given)
    # what the SDK logs comes back as an error, which is one line here
    logging.getLogger("d2f_stream").addHandler(logging.NullHandler())
    tell_of_losses()
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    if args.command == "doctor":
        return _doctor(as_json=args.json)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "completion":
        return _completion(args.shell, parser)
    config = Config(config_path(os.environ))
    if args.command == "models":
        return _models(args, config)
    if args.command == "config":
        return _config(args, config)
    if args.command == "serve":
        args.model = args.model or config.get("model")
        return command.run(args)
    args.model = args.model or config.get("server") or config.get("model")
    if "://" in (args.model or ""):
        args.token = args.token or _token(args.model, config)
    GenerationParams().with_overrides(overrides_of(args))  # complain before the model comes
    prompt = _prompt(args.prompt) if args.command == "generate" else ""
    if load is None:
        fetch_first(args)
    if args.command == "chat":
        return asyncio.run(_chat(args, config, load or default_load()))
    return asyncio.run(_generate(args, prompt, load or default_load()))


def _status(error: D2FError) -> int:
    """Return the exit code of an error: what was typed is wrong, or something else is."""
    is_misnamed = isinstance(error, ModelNotFound) and not isinstance(error, NotFetched)
    return BAD_INPUT if is_misnamed or isinstance(error, InvalidRequest) else FAILED


def _token(server: str, config: Config) -> str | None:
    """Return the token that a server gets where none is on the command line."""
    kept = config.get("token") if server == config.get("server") else None
    return os.environ.get("D2F_TOKEN") or kept


async def _generate(args: argparse.Namespace, prompt: str, load: Loader) -> int:
    overrides = overrides_of(args)
    view = _view(args, prompt)
    if not isinstance(view, TextView | JsonView):
        overrides["drafts"] = True
    failure: StreamFailed | None = None
    has_text, silence = False, ""
    with view:
        async with opened_model(args, load) as engine:
            answer = _answer(engine, prompt, overrides, raw=args.raw, system=args.system)
            async with contextlib.aclosing(answer) as events:
                shown: AsyncIterator[Event] = events
                if args.pace and not isinstance(view, TextView | JsonView):
                    shown = paced(events, args.pace)
                async for event in shown:
                    view.apply(event)
                    if isinstance(event, StreamFailed):
                        failure = event
                    elif isinstance(event, Block):
                        has_text = has_text or bool(event.text.strip())
                    elif isinstance(event, StreamFinished) and not has_text:
                        silence = about_silence(event.reason, engine.info.description)
    if failure is not None:
        _complain(failure.message)
    elif silence:
        print(f"d2f-stream: {silence}", file=sys.stderr)
    return FAILED if failure else 0


async def _answer(
    engine: Engine, prompt: str, overrides: ParamOverrides, *, raw: bool, system: str
) -> AsyncGenerator[Event, None]:
    """Yield the events of an answer: through the chat template where the model has one."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    if not raw:
        try:
            async with engine.generate(messages, **overrides) as session:
                async for event in session.events():
                    yield event
            return
        except NoChatTemplate:
            if system:
                raise
    async with engine.generate(prompt, raw=True, **overrides) as session:
        async for event in session.events():
            yield event


async def _chat(args: argparse.Namespace, config: Config, load: Loader) -> int:
    try:
        from rich.console import Console

        from d2f_stream.terminal.chat import COMMANDS, Chat
        from d2f_stream.terminal.line_reader import line_reader
    except ModuleNotFoundError as error:
        raise MissingExtra("the chat", error.name or "prompt_toolkit", "chat") from error

    def arguments(model: str | None) -> argparse.Namespace:
        return args if model is None else for_another(args, model, _token(model, config))

    chat = Chat(
        lambda model: opened_model(arguments(model), load),
        line_reader(
            data_folder(os.environ) / "history",
            commands=[name.partition(" ")[0] for name in COMMANDS],
        ),
        fetch=lambda model: fetch_first(arguments(model)),
        console=Console(highlight=False),
        overrides=overrides_of(args),
        system=args.system,
        canvas=args.canvas,
    )
    await chat.run(None)
    return 0


def _models(args: argparse.Namespace, config: Config) -> int:
    if args.action == "list" and (server := args.server or config.get("server")):
        args.server, args.token = server, args.token or _token(server, config)
    print(models_command.run(args))
    return 0


def _config(args: argparse.Namespace, config: Config) -> int:
    if args.action == "show":
        print(config.describe(width=width_here()))
    else:
        config.set(args.key, args.value if args.action == "set" else None)
    return 0


def _completion(shell: str, parser: argparse.ArgumentParser) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise MissingExtra("shell completion", "shtab", "chat") from error
    print(shtab.complete(parser, shell=shell))
    return 0


def _doctor(*, as_json: bool) -> int:
    from d2f_stream.terminal import doctor

    report = doctor.examine()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print(doctor.describe(report))
    sys.stdout.flush()
    return 0 if report.works else FAILED


def _view(args: argparse.Namespace, prompt: str) -> View:
    if args.json:
        return JsonView()
    is_canvas = not args.no_canvas and sys.stdout.isatty()
    if is_canvas and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        from d2f_stream.terminal.canvas import FRAME_S, LiveCanvas

        console = Console(highlight=False)
        if not console.is_dumb_terminal:
            return LiveCanvas(prompt, console=console, frame_s=0.0 if args.pace else FRAME_S)
    return TextView()


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise InvalidPrompt("no prompt was given; pass one, or pipe a text in")
    try:
        prompt = given or ""
        if given in (None, "-"):
            prompt = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
        prompt.encode()  # bytes that are no text reach Python as lone surrogates
    except UnicodeError as exc:
        raise InvalidPrompt(f"the prompt is not valid text: {exc}") from exc
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty")
    return prompt


def _complain(message: str) -> None:
    print(f"d2f-stream: error: {' '.join(message.split())}", file=sys.stderr)


def _discard_output() -> None:
    # The interpreter flushes stdout once more at exit, which must not raise again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
