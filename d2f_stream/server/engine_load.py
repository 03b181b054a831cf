"""What an engine that runs here does at this moment, and its metrics."""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["EngineLoad", "MeasuredEngine", "read_load"]


@runtime_checkable
class MeasuredEngine(Protocol):
    """An engine that runs its steps in this process, so that it can say more."""

    @property
    def current_load(self) -> "EngineLoad":
        """What it does at this moment."""
        ...

    def on_step(self, observe: Callable[[float, int], None]) -> Callable[[], None]:
        """Call `observe` after each step with its wall time, seconds, and its rows."""
        ...


class EngineLoad(Protocol):
    """What an engine does at one moment."""

    @property
    def num_running(self) -> int:
        """Sessions that hold a slot."""
        ...

    @property
    def num_waiting(self) -> int:
        """Sessions in the queue."""
        ...

    @property
    def kept_tokens(self) -> int:
        """Tokens of storage that is kept for prompts that begin like earlier ones."""
        ...

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens so far that needed no computing."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of running sessions' prompts that are still to be computed."""
        ...

    @property
    def kv_tokens(self) -> int:
        """Tokens that the open slots have room for."""
        ...


def read_load(load: EngineLoad) -> Iterator[Metric]:
    """Yield the metrics of a load."""
    readings = (
        ("d2f_sessions_running", "Sessions of the engine that hold a slot", load.num_running),
        ("d2f_sessions_waiting", "Sessions of the engine that wait for a slot", load.num_waiting),
        ("d2f_kv_tokens", "Tokens that the engine's open slots have room for", load.kv_tokens),
        ("d2f_kept_tokens", "Tokens of storage kept for prompts to come", load.kept_tokens),
        ("d2f_prompt_tokens", "Prompt tokens still to be computed", load.prompt_tokens),
    )
    for name, meaning, value in readings:
        yield GaugeMetricFamily(name, meaning, value)
    meaning = "Prompt tokens that needed no computing, since their K/V were kept"
    yield CounterMetricFamily("d2f_reused_prompt_tokens", meaning, load.reused_tokens)
