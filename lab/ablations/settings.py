"""What the ablation studies compare: settings that differ from the published one in one thing.

A run is one student: a setting and a seed. Runs of one seed share their teacher, the order of the
problems and the draws of noise, so that settings are compared in pairs.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from d2f_export.distill.corruption import BlockNoise
from d2f_export.distill.distiller import LossWeights, Objective
from lab.embedded_model.recipe import DISTILLATION
from lab.records import whole_lines

__all__ = [
    "AS_PUBLISHED",
    "PUBLISHED",
    "RECORDED",
    "SETTINGS",
    "STUDIES",
    "UNTRAINED",
    "Records",
    "Run",
    "checked_settings",
    "runs_of",
    "settings_of",
]

UNTRAINED: Final = "no training"  # the teacher's weights, decoded block-causally


def _noise(**changes: Any) -> Objective:
    return Objective(BlockNoise(**changes), mean_over="answer")


def _loss(forward_kl: float, reverse_kl: float, cross_entropy: float) -> Objective:
    return Objective(weights=LossWeights(forward_kl, reverse_kl, cross_entropy), mean_over="answer")


PUBLISHED: Final = "published"
SETTINGS: Final[dict[str, Objective]] = {
    PUBLISHED: _noise(),
    "data": _loss(0.0, 0.0, 1.0),
    "reverse KL": _loss(0.0, 1.0, 0.0),
    "0.7 KL + 0.3 data": _loss(0.7, 0.0, 0.3),
    "random": _noise(schedules=("random",)),
    "ramp": _noise(schedules=("ramp",)),
    "0.1 to 0.9": _noise(low=0.1, high=0.9),
    "0.05 to 1": _noise(low=0.05, high=1.0),
    "blocks of 8": _noise(block_sizes=(8,)),
    "blocks of 32": _noise(block_sizes=(32,)),
    "stepped": _noise(stepped=0.5),
    "recipe": DISTILLATION,
}
STUDIES: Final[dict[str, tuple[str, ...]]] = {  # in order of what they tell
    "loss": (PUBLISHED, "data", "reverse KL", "0.7 KL + 0.3 data"),
    "schedule": (PUBLISHED, "random", "ramp"),
    "conditioning": (PUBLISHED, "fresh noise"),
    "range": (PUBLISHED, "0.1 to 0.9", "0.05 to 1"),
    "block-size": ("blocks of 8", PUBLISHED, "blocks of 32"),
    "recipe": (UNTRAINED, PUBLISHED, "stepped", "recipe"),
}
RECORDED: Final = ("fresh noise",)  # of the teacher's own; it lost, and is no longer trained
AS_PUBLISHED: Final = {  # what the published setting is in a study
    "loss": "forward KL",
    "schedule": "monotone",
    "conditioning": "same noise",
    "range": "0.2 to 0.7",
    "block-size": "blocks of 16",
    "recipe": PUBLISHED,
}


@dataclass(frozen=True, slots=True)
class Run:
    """One student to train and to evaluate.

    Attributes:
        setting: a key of SETTINGS, or UNTRAINED.
        seed: of its noise and of the order of its problems.
        steps: optimiser steps.
        problems: how many it is evaluated on.
        recipe: sizes of the model.
    """

    setting: str
    seed: int
    steps: int
    problems: int
    recipe: str = "embedded"

    @property
    def folder(self) -> str:
        """Name of the folder of the run."""
        return f"{self.setting.replace(' ', '-')}-{self.seed}"


def checked_settings(settings: Sequence[str]) -> list[str]:
    """Return the settings, each once.

    Raises:
        SystemExit: one is unknown.
    """
    for name in settings:
        if name not in (*SETTINGS, UNTRAINED):
            every = ", ".join(map(repr, (*SETTINGS, UNTRAINED)))
            raise SystemExit(f"there is no setting {name!r}; there are: {every}")
    return list(dict.fromkeys(settings))


def settings_of(studies: Iterable[str]) -> list[str]:
    """Return the settings of the studies that can be trained, each once, in order.

    Raises:
        SystemExit: one is unknown.
    """
    studies = list(studies)
    for study in studies:
        if study not in STUDIES:
            raise SystemExit(f"there is no study {study!r}; there are: {', '.join(STUDIES)}")
    names = (name for study in studies for name in STUDIES[study] if name not in RECORDED)
    return list(dict.fromkeys(names))


def runs_of(
    settings: Sequence[str], seeds: Sequence[int], *, steps: int, problems: int, recipe: str
) -> list[Run]:
    """Return all runs, those of the first seed first: a queue that is cut short compares all."""
    return [
        Run(setting, seed, 0 if setting == UNTRAINED else steps, problems, recipe)
        for seed in seeds
        for setting in settings
    ]


class Records:
    """The JSON-lines file of finished runs. A last line that was not written whole is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs = {_run_of(json.loads(line)) for line in whole_lines(path).splitlines()}

    def __contains__(self, run: Run) -> bool:
        return run in self._runs

    def add(self, record: dict[str, Any]) -> None:
        """Append the record of a run, in one write."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._runs.add(_run_of(record))


def _run_of(record: dict[str, Any]) -> Run:
    return Run(*(record[name] for name in Run.__dataclass_fields__))
