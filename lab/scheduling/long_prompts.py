"""What others notice of a long prompt: steps and blocks beside it, in pieces and whole, in turns.

Some clients have answers written, one after the other; amid these somebody asks with a long prompt
of made-up tokens.
"""

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from d2f_runtime.backends.scripted import ByteCodec
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.engine.opening import open_engine
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import GenerationParams
from lab.scheduling.fixed_windows import steer

__all__ = ["LongPrompts"]

SHORT: Final = 32
"""Tokens of the others' prompts."""


@dataclass(frozen=True, kw_only=True)
class LongPrompts:
    """What to run.

    Attributes:
        model, adapter, quantization: see `EngineLoads`.
        shape: of random weights, instead of a model; see `lab.bench.step_models.SHAPES`.
        sessions: that have answers written.
        prompt_tokens: of the long prompt.
        turns: of each way.
    """

    model: str | None
    adapter: str | None
    quantization: str
    shape: str | None
    sessions: int
    prompt_tokens: int
    turns: int

    async def run(self, note: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Return what each turn found, by way; `note` gets what there is after each turn."""
        limits = Limits(max_sessions=self.sessions + 1)
        began = time.perf_counter()
        async with self._engine(limits) as engine:
            found: dict[str, Any] = {
                "device": engine.info.device,
                "quantization": engine.info.quantization,
                "ready_s": round(time.perf_counter() - began, 2),
                "in pieces": [],
                "whole": [],
            }
            scheduler = steer(engine, limits)
            await _Turn(self, engine).run()  # whatever is captured or compiled late
            for turn in range(self.turns):
                for way in ("in pieces", "whole"):
                    scheduler.cuts_prompts = way == "in pieces"
                    figures = await _Turn(self, engine, seed=turn).run()
                    found[way].append(figures)
                    note(found)
                    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {way}: {figures}\n")
                    sys.stderr.flush()
            return found

    def _engine(self, limits: Limits) -> LocalEngine:
        if self.shape is None:
            return open_engine(
                self.model,
                adapter=self.adapter,
                quantization=self.quantization,
                limits=limits,
                warm_up=True,
            )
        from lab.bench.stream_shapes import shape_backend

        max_len = (self.sessions + 1) * 512 + 2 * self.prompt_tokens  # of all slots together
        backend = shape_backend(self.shape, self.quantization, max_len=max_len)
        return LocalEngine.over(backend, ByteCodec(), limits=limits, warm_up=True)


@dataclass
class _Turn:
    bench: LongPrompts
    engine: LocalEngine
    seed: int = -1
    during: bool = False  # whether the long prompt is under way
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    walls_ms: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    gaps_ms: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    async def run(self) -> dict[str, float]:
        """Return how long steps took and blocks were apart, before the prompt and beside it."""
        undo = self.engine.on_step(
            lambda wall_s, _: self.walls_ms[self.during].append(1e3 * wall_s)
        )
        begun = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.bench.sessions):
                tasks.create_task(self._client(number, begun))
            await begun.wait()
            first_ms = await self._ask()
            self.stopped.set()
        undo()
        figures = {
            "step_ms": statistics.median(self.walls_ms[False] or [0.0]),
            "step_ms_beside": statistics.median(self.walls_ms[True] or [0.0]),
            "slowest_step_ms": max(self.walls_ms[False], default=0.0),
            "slowest_step_ms_beside": max(self.walls_ms[True], default=0.0),
            "slowest_block_ms": max(self.gaps_ms[False], default=0.0),
            "slowest_block_ms_beside": max(self.gaps_ms[True], default=0.0),
            "steps_beside": len(self.walls_ms[True]),
            "first_block_ms_of_the_prompt": first_ms,
        }
        return {name: round(value, 3) for name, value in figures.items()}

    async def _client(self, number: int, begun: asyncio.Event) -> None:
        """Have answers written until the long prompt is answered."""
        draw = random.Random(f"{self.seed} {number}")
        num_blocks = 0
        while not self.stopped.is_set():
            session = self.engine.generate(self._tokens(draw, SHORT), self._params(256))
            before: float | None = None
            async for _ in session:
                now = time.perf_counter()
                if before is not None:
                    self.gaps_ms[self.during].append(1e3 * (now - before))
                before = now
                num_blocks += 1
                if num_blocks == 40:
                    begun.set()
                if self.stopped.is_set():
                    session.cancel()

    async def _ask(self) -> float:
        """Ask with the long prompt; return the milliseconds to its first block."""
        info = self.engine.info
        params = self._params(16)
        length = min(self.bench.prompt_tokens, info.max_len - params.max_new_tokens)
        prompt = self._tokens(random.Random(self.seed), length)
        self.during = True
        result = await self.engine.generate(prompt, params).result()
        self.during = False
        return result.timings.first_block_ms or 0.0

    def _params(self, num_tokens: int) -> GenerationParams:
        return self.engine.defaults.with_overrides({"max_new_tokens": num_tokens})

    def _tokens(self, draw: random.Random, number: int) -> list[int]:
        info = self.engine.info
        special = {info.mask_id, *info.eos_ids}
        found = (draw.randrange(info.num_tokens) for _ in range(2 * number))
        return [token for token in found if token not in special][:number]
