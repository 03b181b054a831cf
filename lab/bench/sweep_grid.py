"""What a sweep runs: the systems of the D2F paper's comparison, each over its own settings."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import ParamOverrides

__all__ = ["SYSTEMS", "Grid", "Setting", "settings_of"]

SYSTEMS: Final = ("d2f", "no-pipeline", "fixed-count", "vanilla", "ar")


@dataclass(frozen=True, slots=True)
class Grid:
    """The values to try.

    Attributes:
        block_size: of all systems but the autoregressive one.
        confidence: thresholds of D2F with and without its pipeline.
        add: thresholds of the pipeline.
        activate: thresholds of the pipeline.
        per_step: tokens of vanilla decoding and of its schedule on D2F's attention and cache.
        crossed: try all combinations of the thresholds; otherwise each threshold by itself, with
            the others at their defaults.
    """

    block_size: tuple[int, ...] = (16, 32)
    confidence: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95, 0.99)
    add: tuple[float, ...] = (0.05, 0.1, 0.3)
    activate: tuple[float, ...] = (0.7, 0.85, 0.95, 0.99)
    per_step: tuple[int, ...] = (1,)
    crossed: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """A system of the comparison and the fields that make it."""

    system: str
    overrides: ParamOverrides


def settings_of(grid: Grid, systems: Iterable[str]) -> list[Setting]:
    """Return what to run, in order of the systems; no setting twice.

    Raises:
        InvalidParams: there is no such system.
    """
    chosen: list[Setting] = []
    for system in systems:
        if system not in _PLANS:
            raise InvalidParams("system", system, "one of " + ", ".join(SYSTEMS))
        for overrides in _PLANS[system](grid):
            setting = Setting(system, cast(ParamOverrides, overrides))
            if setting not in chosen:
                chosen.append(setting)
    return chosen


def _d2f(grid: Grid) -> Iterable[dict[str, Any]]:
    for size in grid.block_size:
        base: dict[str, Any] = {"block_size": size, "max_active_blocks": 4}
        if grid.crossed:
            for values in itertools.product(grid.confidence, grid.add, grid.activate):
                yield {**base, **dict(zip(_THRESHOLDS, values, strict=True))}
            continue
        axes = zip(_THRESHOLDS, (grid.confidence, grid.add, grid.activate), strict=True)
        for name, tried in axes:
            yield from ({**base, **_DEFAULTS, name: value} for value in tried)


def _no_pipeline(grid: Grid) -> Iterable[dict[str, Any]]:
    for size, confidence in itertools.product(grid.block_size, grid.confidence):
        yield {
            "block_size": size,
            "max_active_blocks": 1,
            **_DEFAULTS,
            "confidence_threshold": confidence,
        }


def _fixed_count(grid: Grid) -> Iterable[dict[str, Any]]:
    for size, per_step in itertools.product(grid.block_size[:1], grid.per_step):
        base = {"block_size": size, "max_active_blocks": 1, **_DEFAULTS}
        yield {**base, "num_per_step": per_step}


def _vanilla(grid: Grid) -> Iterable[dict[str, Any]]:
    for overrides in _fixed_count(grid):
        yield {**overrides, "attention": "full"}


def _ar(grid: Grid) -> Iterable[dict[str, Any]]:
    yield {"block_size": 1, "max_active_blocks": 1, **_DEFAULTS}


_THRESHOLDS: Final = ("confidence_threshold", "add_threshold", "activate_threshold")
_DEFAULTS: Final[dict[str, Any]] = {
    "confidence_threshold": 0.9,
    "add_threshold": 0.1,
    "activate_threshold": 0.95,
}
_PLANS: Final[dict[str, Callable[[Grid], Iterable[dict[str, Any]]]]] = {
    "d2f": _d2f,
    "no-pipeline": _no_pipeline,
    "fixed-count": _fixed_count,
    "vanilla": _vanilla,
    "ar": _ar,
}
