"""A process that runs documented programs one after another, as if each stood in a file of its own.

The model that they mean stays loaded between them, since opening it is most of what they cost.
"""

import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Self

PROBLEM = "Ben has 34 books. He buys 18 more. How many has he now?"


class Reader:
    """The process, for as long as the context is open. Its programs find python_path's modules."""

    def __init__(self, python_path: str) -> None:
        self._environment = {**os.environ, "PYTHONPATH": python_path}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0

    def run(self, code: str, folder: Path) -> str:
        """Return what the program printed in the folder; it must end without an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([code, str(folder)]) + "\n")
        self._process.stdin.flush()
        printed, error = json.loads(self._process.stdout.readline())
        assert error == ""
        return str(printed)


def main() -> None:
    """Answer each line, a program and its folder, by what it printed and why it failed."""
    from d2f_stream import generate

    async def load() -> None:
        await generate(PROBLEM, max_new_tokens=1).result()

    asyncio.run(load())  # the engine that this opens keeps the weights for later event loops
    for line in sys.stdin:
        code, folder = json.loads(line)
        os.chdir(folder)
        printed, error = io.StringIO(), ""
        with contextlib.redirect_stdout(printed):
            try:
                run(code)
            except BaseException:  # whatever a program raises is what its test is told
                error = traceback.format_exc()
        print(json.dumps([printed.getvalue(), error]), flush=True)


def run(code: str) -> None:
    """Run a program, or a part of one that takes for granted what `names_for` gives it."""
    import d2f_stream

    names = names_for(code)
    compiled = compile(code, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    async def with_engine() -> None:
        async with d2f_stream.load() as engine:
            await run_part(compiled, {**names, "engine": engine})

    if "asyncio.run(" in code:
        exec(compiled, names)
    elif re.search(r"engine\b", code) and "as engine" not in code:
        asyncio.run(with_engine())
    else:
        asyncio.run(run_part(compiled, names))


def names_for(code: str) -> dict[str, object]:
    import d2f_stream
    from d2f_runtime.models.installed import embedded_folder
    from d2f_stream.client.mqtt_line import connect_mqtt

    names: dict[str, object] = {
        "__name__": "__main__",
        "asyncio": asyncio,
        "d2f_stream": d2f_stream,
        "connect_mqtt": connect_mqtt,
        "folder": embedded_folder(),
        "password": "secret",
        "question": PROBLEM,
        "prompt": PROBLEM,
        "messages": [{"role": "user", "content": PROBLEM}],
    }
    if "openai." in code:
        import openai

        names["openai"] = openai
    return names


async def run_part(compiled: CodeType, names: Mapping[str, object]) -> None:
    running = eval(compiled, dict(names))
    if inspect.iscoroutine(running):
        await running


if __name__ == "__main__":
    main()
