"""The engine itself under load: windows that pay against fixed ones and single tokens, in turns.

A closed loop, as in the simulations. Settings take turns, and so do loads, so that a drift of the
machine's speed falls on all alike; the medians of the turns count. Where others share the machine,
tokens for a second of this process's own time say more than those for a second of the clock.
"""

import asyncio
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from d2f_runtime.decoding.width import OWN, Width, widths_of
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.engine.opening import open_engine
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Prompt
from lab.bench.first_questions import QUESTIONS
from lab.scheduling.fixed_windows import steer

__all__ = ["PIPELINE", "EngineLoads", "Setting", "verified_settings"]

PROMPTS: Final = Path("bench/prompts.jsonl")


@dataclass(frozen=True)
class Setting:
    """How requests are answered.

    Attributes:
        changes: to the model's own parameters.
        width: of all windows; None leaves them to what pays.
    """

    changes: ParamOverrides = field(default_factory=lambda: ParamOverrides())
    width: Width | None = None


PIPELINE: Final[Mapping[str, Setting]] = {
    "pays": Setting({"may_narrow": True}),
    "4 blocks": Setting(),
    "2 blocks": Setting({"max_active_blocks": 2}),
    "1 block": Setting({"max_active_blocks": 1}),
}
"""Settings of the embedded model, over four blocks of 16."""


def verified_settings(params: GenerationParams) -> Mapping[str, Setting]:
    """Return settings of a model whose answers are verified: what pays, and every fixed width."""
    widths = widths_of(params, params.block_size)
    fixed = {f"{width.max_drafts} drafts": width for width in widths if width != OWN}
    return {
        "pays": Setting(),
        "one token": Setting({"block_size": 1, "commit": "filled"}),
        **{name: Setting(width=width) for name, width in {**fixed, "own": OWN}.items()},
    }


@dataclass(frozen=True, kw_only=True)
class EngineLoads:
    """What to run.

    Attributes:
        model: None is the embedded one.
        adapter: a draft adapter beside the model.
        quantization: of the weights.
        loads: numbers of clients.
        settings: names, of PIPELINE or `verified_settings`; () are all of them.
        turns: of each setting at each load.
        requests: of a turn, at least.
        max_new_tokens: of an answer.
        max_rows: sessions that share a step; None leaves it as it is.
        seconds: after which no turn begins; None takes as long as it takes.
    """

    model: str | None
    adapter: str | None
    quantization: str
    loads: Sequence[int]
    settings: Sequence[str]
    turns: int
    requests: int
    max_new_tokens: int
    seconds: float | None
    max_rows: int | None = None

    async def run(self, note: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Return tokens per second, first blocks and steps of each setting at each load.

        Args:
            note: gets what there is after each round of turns.
        """
        began = time.perf_counter()
        captured = _Captured()
        limits = Limits(max_sessions=max(self.loads))
        if self.max_rows is not None:
            limits = msgspec.structs.replace(limits, max_rows=self.max_rows)
        engine = open_engine(
            self.model,
            adapter=self.adapter,
            quantization=self.quantization,
            limits=limits,
            warm_up=True,
        )
        async with engine:
            ready_s = time.perf_counter() - began
            captured.before_ready = False
            found = _Found(engine, limits, ready_s, captured)
            _say(f"ready after {ready_s:.1f} s: {engine.info.device}, {engine.info.quantization}")
            scheduler = steer(engine, limits)
            settings = self._settings(engine.defaults)
            # Whoever asks first computes a prompt for all who ask later.
            for prompt in _prompts(self.model):
                await engine.generate(prompt, max_new_tokens=1).result()
            for turn in range(self.turns):
                for load in self.loads:
                    for name, setting in settings.items():
                        if self.seconds is not None and time.perf_counter() - began > self.seconds:
                            _say("no time is left")
                            return found.to_dict()
                        scheduler.width = setting.width
                        figures = await self._turn(engine, setting, load)
                        found.add(load, name, figures)
                        _say(f"turn {turn}, {load} clients, {name}: {figures}")
                    note(found.to_dict())
            return found.to_dict()

    def _settings(self, defaults: GenerationParams) -> Mapping[str, Setting]:
        settings = PIPELINE if self.model is None else verified_settings(defaults)
        return {name: settings[name] for name in self.settings or settings}

    @property
    def _common(self) -> ParamOverrides:
        common: ParamOverrides = {"max_new_tokens": self.max_new_tokens}
        if self.model is None:
            common |= {"block_size": 16, "max_active_blocks": 4, "add_threshold": 0.1}
        return common

    async def _turn(
        self, engine: LocalEngine, setting: Setting, num_clients: int
    ) -> dict[str, float]:
        """Answer prompts by so many clients at once."""
        asked: ParamOverrides = {**self._common, **setting.changes}
        prompts = _prompts(self.model)
        num_requests = max(self.requests, num_clients)
        waiting = [prompts[number % len(prompts)] for number in range(num_requests)]
        tokens: list[int] = []
        first_ms: list[float] = []
        steps: list[int] = []
        walls_ms: list[float] = []
        undo = engine.on_step(lambda wall_s, _: walls_ms.append(1e3 * wall_s))

        async def client() -> None:
            while waiting:
                prompt = waiting.pop()
                result = await engine.generate(prompt, **asked).result()
                tokens.append(result.usage.completion_tokens)
                steps.append(result.usage.steps)
                first_ms.append(result.timings.first_block_ms or 0.0)

        began, own_began = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        wall_s, own_s = time.perf_counter() - began, time.process_time() - own_began
        undo()
        figures = {
            "tokens_per_s": sum(tokens) / wall_s,
            "tokens_per_own_s": sum(tokens) / own_s,
            "first_block_ms": sum(first_ms) / len(first_ms),
            "tokens_per_step": sum(tokens) / sum(steps),
            "step_ms": statistics.median(walls_ms),
            "slowest_step_ms": max(walls_ms),
            "answers": len(tokens),
        }
        return {name: round(value, 3) for name, value in figures.items()}


def _prompts(model: str | None) -> Sequence[Prompt]:
    if model is not None:
        return [[{"role": "user", "content": question}] for question in QUESTIONS]
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


class _Captured(logging.Handler):
    """Notes which shapes a GPU's steps were captured for when somebody waited already."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.before_ready = True
        self.late: list[str] = []
        logger = logging.getLogger("d2f_stream")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line of the log, and keep it where it tells of a capture."""
        message = record.getMessage()
        _say(message)
        if not self.before_ready and "captured" in message:
            self.late.append(message)


class _Found:
    """What was found so far."""

    def __init__(
        self, engine: LocalEngine, limits: Limits, ready_s: float, captured: _Captured
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._ready_s = ready_s
        self._captured = captured
        self._turns: dict[int, dict[str, list[dict[str, float]]]] = {}

    def add(self, load: int, name: str, figures: dict[str, float]) -> None:
        """Take a turn's figures."""
        self._turns.setdefault(load, {}).setdefault(name, []).append(figures)

    def to_dict(self) -> dict[str, Any]:
        """Return the medians, and how windows that pay compare with the others."""
        loads = {
            str(load): {name: _medians(turns) for name, turns in of_load.items()}
            for load, of_load in self._turns.items()
        }
        return {
            "device": self._engine.info.device,
            "quantization": self._engine.info.quantization,
            "ready_s": round(self._ready_s, 2),
            "max_rows": self._limits.max_rows or self._engine.info.step_sessions,
            "captured_after_ready": self._captured.late,
            "loads": loads,
            "ratios": {load: _ratios(of_load) for load, of_load in loads.items()},
        }


def _medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    found = {key: round(statistics.median(turn[key] for turn in turns), 3) for key in turns[0]}
    return {**found, "turns": len(turns)}


def _ratios(of_load: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what pays by each other setting, by the clock and by this process's own time."""
    pays = of_load.get("pays")
    return {
        f"{key}, to {name}": round(pays[key] / other[key], 3)
        for key in ("tokens_per_s", "tokens_per_own_s")
        for name, other in of_load.items()
        if pays is not None and name != "pays"
    }


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()
