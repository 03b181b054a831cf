"""The command line over a ScriptedBackend, in process or as a script of its own.

Run as `python tests/scripted_cli.py ARGUMENTS...`, it is `d2f-stream` with a model that never ends
its answer in a test's time, and that reports its open slots on stderr when the command is over.
"""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.scripted import SCRIPTED_INFO, ByteCodec, ScriptedBackend
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.local import LocalEngine
from d2f_stream import cli

ANSWER = "Six and two make eight. The answer is 8."
NUM_ENDLESS_TOKENS = 1_000_000
STEP_S = 0.005


class ScriptedLoad:
    """A loader whose model is scripted; remembers what it was asked for."""

    def __init__(self, backend: ScriptedBackend | None = None) -> None:
        self.backend = backend or ScriptedBackend(ANSWER, tokens_per_step=4)
        self.asked: list[tuple[str | int | None, ...]] = []
        self.tokens: list[str | None] = []

    def __call__(
        self,
        model: str | None = None,
        *,
        adapter: str | None = None,
        backend: str,
        quantization: str,
        device: str,
        kv_tokens: int | None = None,
        family: str | None = None,
        token: str | None = None,
    ) -> LocalEngine:
        self.tokens.append(token)
        self.asked.append((model, adapter, backend, quantization, device, kv_tokens))
        return LocalEngine.over(self.backend, ByteCodec())


def generate(*arguments: str, load: cli.Loader | None = None) -> int:
    """Run `d2f-stream generate` in this process; return its exit code."""
    return cli.main(["generate", *arguments], load=load or ScriptedLoad())


def chat(*lines: str, options: Sequence[str] = (), load: cli.Loader | None = None) -> int:
    """Run `d2f-stream chat` in this process, with these lines typed; return its exit code."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("".join(f"{line}\r" for line in (*lines, "/quit")))
        return cli.main(["chat", *options], load=load or ScriptedLoad())


@dataclass(slots=True)
class PacedBackend(ScriptedBackend):
    """A scripted model with steps as long as a small model's; so its answer lasts for long."""

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        time.sleep(STEP_S)
        return ScriptedBackend.step(self, rows)


def _main() -> int:
    # A test run in the background of a shell has SIGINT ignored, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    info = replace(SCRIPTED_INFO, max_len=2 * NUM_ENDLESS_TOKENS)
    backend = PacedBackend("on and " * NUM_ENDLESS_TOKENS, info=info)
    arguments = [*sys.argv[1:], "--max-new-tokens", str(NUM_ENDLESS_TOKENS)]
    code = cli.main(arguments, load=ScriptedLoad(backend))
    sys.stderr.write(f"open slots: {len(backend.open_slots)}\n")
    return code


if __name__ == "__main__":
    sys.exit(_main())
