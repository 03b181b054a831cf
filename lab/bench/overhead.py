"""What a step costs the host: policy, plan, hand-over, events and text, on a scripted device.

Sessions of LocalEngine ask side by side, decoded in blocks of a D2F pipeline, as verified drafts
with branches, and a token a step; every other part is what users run. CPU times are the threads'
own; `gap` is the wall time from the end of one launch to the begin of the next, in which a device
would stand idle. On a machine with other work all of them are those of cold caches. `alone` is what
stands in that gap of one session at the least: its steps in a bare loop, on one thread.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from d2f_runtime.decoding.width import OWN
from d2f_runtime.engine.denoiser import Denoiser
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelKey, ModelParts
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.presets import PRESETS
from lab.bench.scripted_device import Launch, scripted_device
from lab.records import spread

__all__ = ["overhead"]

NUM_ANSWERS: Final = 4
SESSIONS: Final = (1, 4, 16)
LENGTH: Final = 128
PROMPT: Final = [10 + at * 7 % 90 for at in range(64)]
CODEC: Final = Path("runtime/d2f_runtime/models/embedded/tokenizer.json")

_GRID = TransformerConfig(
    family="llada",
    vocab_size=160,
    num_tokens=150,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=32,
    mask_id=3,
    eos_ids=(151,),
    rope_theta=5_000.0,
    norm_eps=1e-5,
    max_len=1024,
)
_CAUSAL = replace(
    _GRID,
    family="a2d",
    shift_logits=True,
    prompt_attention="causal",
    commit_attention="causal",
    native_block_size=8,
)
_BLOCKS = GenerationParams(block_size=32, max_active_blocks=4)
CASES: Final[Mapping[str, tuple[TransformerConfig, GenerationParams]]] = {
    "blocks of 32, four active": (_GRID, _BLOCKS),
    "verified drafts of 8": (_CAUSAL, PRESETS["verified"]),
    "a token a step": (_CAUSAL, PRESETS["autoregressive"]),
}


def overhead(
    num_answers: int = NUM_ANSWERS, *, sessions: Sequence[int] = SESSIONS, length: int = LENGTH
) -> dict[str, Any]:
    """Return microseconds per step, by decoding and number of sessions.

    Args:
        num_answers: of each session.
        sessions: numbers of them.
        length: of an answer, tokens.
    """
    cases = {
        name: (config, params.with_overrides({"max_new_tokens": length}))
        for name, (config, params) in CASES.items()
    }
    found: dict[str, Any] = {
        f"{name}, alone": _alone(config, params, num_answers)
        for name, (config, params) in cases.items()
    }
    return found | {
        f"{name}, {number} at once": asyncio.run(
            _measure(config, params, sessions=number, num_answers=num_answers)
        )
        for name, (config, params) in cases.items()
        for number in sessions
    }


def _alone(
    config: TransformerConfig, params: GenerationParams, num_answers: int
) -> dict[str, float]:
    """Time one stream's steps in a loop: row, backend and acceptance, without the script."""
    launches: list[Launch] = []
    backend = scripted_device(config, launches, device_s=0.0)
    times: list[float] = []
    for answer in range(num_answers + 1):
        denoiser = Denoiser(prompt_tokens=PROMPT, params=params, info=backend.info)
        slot = backend.open_slot(len(PROMPT) + params.max_new_tokens + params.block_size)
        while denoiser.finish_reason is None:
            began = time.perf_counter()
            (proposals,) = backend.step([denoiser.row(slot, OWN)])
            denoiser.apply(proposals)
            script = launches[-1].ended - launches[-1].began
            if answer:  # the first one makes the shapes
                times.append(1e6 * (time.perf_counter() - began - script))
        backend.close_slot(slot)
    return spread(times, 1)


async def _measure(
    config: TransformerConfig, params: GenerationParams, *, sessions: int, num_answers: int
) -> dict[str, Any]:
    launches: list[Launch] = []
    backend = scripted_device(config, launches)
    key = ModelKey(Path("overhead"), "scripted", "cpu", "none")
    codec = Tokenizer(CODEC)
    lease = MODELS.lease(key, "overhead", lambda: ModelParts(backend, codec, params))
    async with LocalEngine(lease) as engine:
        for _ in range(2):  # makes the shapes, and what is cached
            await engine.generate(PROMPT).result()
        gaps: list[float] = []
        ours: list[float] = []
        whole: list[float] = []
        loop: list[float] = []
        num_tokens = num_steps = 0
        for _ in range(num_answers):
            launches.clear()
            began_loop, began = time.thread_time(), time.process_time()
            asked = [engine.generate(PROMPT).result() for _ in range(sessions)]
            results = await asyncio.gather(*asked)  # who is not read has to wait
            ended_loop, ended = time.thread_time(), time.process_time()
            steps = len(launches)
            script = sum(each.cpu_ended - each.cpu_began for each in launches)
            whole.append(1e6 * (ended - began - script) / steps)
            loop.append(1e6 * (ended_loop - began_loop) / steps)
            gaps += [1e6 * (after.began - one.ended) for one, after in pairwise(launches)]
            ours += [1e6 * (after.cpu_began - one.cpu_ended) for one, after in pairwise(launches)]
            num_tokens += sum(result.usage.completion_tokens for result in results)
            num_steps += steps
    return {
        "cpu_us": spread(whole, 1),
        "device_thread_cpu_us": spread(ours, 1),
        "loop_thread_cpu_us": spread(loop, 1),
        "gap_us": spread(gaps, 1),
        "tokens_per_step": round(num_tokens / num_steps, 2),
    }
