"""A fast step whose device is a script: all that its host does is real, and nothing is computed.

A tiny model's TorchBackend, whose runner plans, fills its buffers and reads its answers as on a
GPU. In place of the launch of a captured step the script writes what a device would have found, and
waits as one does, without the interpreter's lock. What the script itself takes is taken off.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from d2f_runtime.backends.buckets import Bucket
from d2f_runtime.backends.fast_runner import FastRunner
from d2f_runtime.backends.torch_backend import GPU_SPARE_ROWS, TorchBackend
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer

__all__ = ["DEVICE_S", "Launch", "scripted_device"]

DEVICE_S = 0.0008  # of a step: what one of SmolLM2-135M takes of an H200
MAX_TOKENS = 16384
SURE, UNSURE = 0.96, 0.3
SHARE_RIGHT = 72  # of a hundred drafts
SHARE_FILLED = 12  # of a hundred masks of a block, in each step


class Launch(NamedTuple):
    """What one step's launch was: wall times, and the device thread's own CPU times, seconds."""

    began: float
    ended: float
    cpu_began: float
    cpu_ended: float


def scripted_device(
    config: TransformerConfig, launches: list[Launch], *, device_s: float = DEVICE_S
) -> TorchBackend:
    """Return a backend that notes its launches, each of which waits so long."""
    backend = TorchBackend(
        Transformer(config), name="scripted", runner="fast", max_tokens=MAX_TOKENS
    )
    backend.info = replace(backend.info, spare_rows=GPU_SPARE_ROWS)
    old = cast("FastRunner", backend._runner)
    backend._runner = _ScriptedRunner(old, backend, launches, device_s)
    return backend


class _ScriptedRunner(FastRunner):
    """Writes answers instead of running a step."""

    def __init__(
        self, old: FastRunner, backend: TorchBackend, launches: list[Launch], device_s: float
    ) -> None:
        super().__init__(old._model, backend._pool, backend.info, use_graphs=False)
        self._launches = launches
        self._device_s = device_s
        self._asked: Any = None  # the piece that is launched next

    def _run(self, piece: Any) -> Any:
        self._asked = piece
        return super()._run(piece)

    def _shape(self, bucket: Bucket) -> Any:
        is_new = bucket not in self._shapes
        shape = super()._shape(bucket)
        if is_new:
            shape.greedy_graph = cast("torch.cuda.CUDAGraph", _Script(self, shape.found.numpy()))
        return shape

    def script(self, found: Any) -> None:
        """Write tokens and confidences of all that is asked, wait, and note the launch."""
        began, cpu_began = time.perf_counter(), time.thread_time()
        mask_id, column = self._info.mask_id, 0
        for row, *_ in self._asked.plan.placements:
            window = row.window
            behind = [position + 1 for position in window.branch_positions()]
            positions = [*range(window.start, window.stop), *behind]
            edge = window.start + window.num_to_cache
            for at in window.asked(mask_id):
                position = positions[at]
                chance = (position * 40503 + window.start * 9973 + 7 * len(self._launches)) % 100
                token, sure = 10 + position * 7 % 90, SURE
                if self._info.shift_logits and position > edge and chance >= SHARE_RIGHT:
                    token = 5  # a draft that is wrong
                if not self._info.shift_logits and chance >= SHARE_FILLED:
                    sure = UNSURE
                found[0, column], found[1, column] = token, sure
                column += 1
        if self._device_s:
            time.sleep(self._device_s)
        self._launches.append(Launch(began, time.perf_counter(), cpu_began, time.thread_time()))


class _Script:
    """Stands where a captured step does."""

    def __init__(self, runner: _ScriptedRunner, found: Any) -> None:
        self._runner = runner
        self._found = found

    def replay(self) -> None:
        """Run the script."""
        self._runner.script(self._found)
