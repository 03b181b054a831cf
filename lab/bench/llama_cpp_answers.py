"""LlamaCppAnswers: greedy answers by llama.cpp to prompts of token ids, in a process of its own.

llama-cpp-python has an environment of its own, whose interpreter runs this file: it imports nothing
of this project.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["LlamaCppAnswers"]

CONTEXT: Final = 1024  # tokens of prompt and answer


class LlamaCppAnswers:
    """A process that has a GGUF file open.

    Args:
        python: the interpreter of an environment with llama-cpp-python.
        model: the file.
        threads: that compute.
    """

    def __init__(self, python: Path, model: Path, threads: int) -> None:
        command = [str(python), __file__, str(model), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(
        self, prompts: Sequence[Sequence[int]], max_new: int, eos_ids: Sequence[int]
    ) -> tuple[int, float, float]:
        """Return the number of new tokens, seconds, and seconds of CPU time; prompts included."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"prompts": prompts, "max_new": max_new, "eos_ids": eos_ids}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        number, seconds, cpu_seconds = json.loads(self._process.stdout.readline())
        return number, seconds, cpu_seconds

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _answer(model: Any, request: dict[str, Any]) -> int:
    number = 0
    for prompt in request["prompts"]:
        model.reset()  # else it would keep what it has of a prompt that begins alike
        for count, token in enumerate(model.generate(prompt, top_k=1, temp=0.0), 1):
            number += 1
            if token in request["eos_ids"] or count == request["max_new"]:
                break
    return number


def _serve(path: str, threads: int) -> None:
    from llama_cpp import Llama  # type: ignore[import-not-found, unused-ignore]

    model = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=CONTEXT, verbose=False)
    for line in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        number = _answer(model, json.loads(line))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        sys.stdout.write(json.dumps([number, seconds, cpu]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
