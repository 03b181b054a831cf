"""What a task and a command line of lm-eval ask for, as an engine understands it. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.nearest import one_of
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.presets import PRESETS

__all__ = [
    "answers_at_a_time",
    "cut_at",
    "overrides_of",
    "overrides_of_task",
    "preset_of",
    "stop_strings",
]

AUTO_BATCH_SIZE: Final = 16
LENGTH_NAMES: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def answers_at_a_time(value: int | str, bound: int | None) -> int:
    """Return a batch size; a bound is for "auto" alone.

    Raises:
        InvalidParams: it is no number from 1 on.
    """
    if str(value).startswith("auto"):
        return AUTO_BATCH_SIZE if bound is None else min(AUTO_BATCH_SIZE, bound)
    number = int(value)
    if number < 1:
        raise InvalidParams("batch_size", value, 'an integer of at least 1, or "auto"')
    return number


def preset_of(name: str) -> GenerationParams:
    """Return the preset of a name.

    Raises:
        InvalidParams: there is none.
    """
    if name not in PRESETS:
        raise InvalidParams("preset", name, one_of(name, sorted(PRESETS)))
    return PRESETS[name]


def overrides_of(values: Mapping[str, Any]) -> ParamOverrides:
    """Read fields as lm-eval parses them from a command line: a whole number for a share, say."""
    chosen = dict(values)
    if isinstance(stop := chosen.get("stop"), str | list):
        chosen["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if chosen.get("max_active_blocks") in ("None", "none"):
        chosen["max_active_blocks"] = None
    return cast(ParamOverrides, chosen)


def overrides_of_task(settings: Mapping[str, Any]) -> ParamOverrides:
    """Translate a task's generation_kwargs; without do_sample the answer is greedy."""
    chosen = {k: v for k, v in settings.items() if k not in ("until", "do_sample", *LENGTH_NAMES)}
    lengths = [settings[name] for name in LENGTH_NAMES if settings.get(name) is not None]
    if lengths:
        chosen["max_new_tokens"] = int(lengths[0])
    if settings.get("do_sample") is False:
        chosen["temperature"] = 0.0
    if "temperature" in chosen:
        chosen["temperature"] = float(chosen["temperature"])
    if not chosen.get("temperature"):
        chosen.pop("top_p", None)  # greedy: without effect, and not every backend has it
    return overrides_of(chosen)


def stop_strings(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return a task's stop strings, each once."""
    given = [value] if isinstance(value, str) else list(value or ())
    return tuple(dict.fromkeys(text for text in given if text))


def cut_at(text: str, until: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text
