"""Metrics: what the server does, for Prometheus. Knows prometheus_client, as engine_load.py does.

Counts are made from what the registry tells its observer; what the engine and the gateway know
anyway is read when Prometheus asks. Labels are outcomes and error codes, of which there are few;
never clients, streams or texts.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import D2FError, Unauthorized
from d2f_stream.core.events import Block, Event, StreamFailed, StreamFinished
from d2f_stream.core.session import Engine
from d2f_stream.server.auth import Auth
from d2f_stream.server.engine_load import MeasuredEngine, read_load
from d2f_stream.server.http.login import LastFailedLogin, client_of
from d2f_stream.server.http.middleware import error_response
from d2f_stream.server.logins import FailedLogins
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.served_stream import ServedStream

__all__ = ["Metrics"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The text format that every Prometheus reads."""

STEP_SECONDS: Final = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015),
    *(0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0),
)
WAIT_SECONDS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
TOKENS_PER_STEP: Final = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
ROWS: Final = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Observes one server: its streams, engine, connections and refusals.

    Hand it to the registry as its observer, and to the OpenAI routes; then let it `watch` the
    engine and the gateway.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._last_event: dict[str, tuple[float, bool]] = {}  # stream id -> when, a block before?
        self._num_slow_readers = 0
        self._gateway: Gateway | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._requests = self._counter(
            "requests",
            "Requests that ended, by outcome: eos, length, stop, cancelled, failed, or refused "
            "(before the answer began)",
            "outcome",
        )
        self._errors = self._counter(
            "errors", "Requests refused and streams failed, by the code of the error", "code"
        )
        self._active = Gauge(
            "d2f_streams_active", "Streams that run or wait", registry=self.registry
        )
        self._blocks = self._counter("blocks", "Blocks of all streams that were committed")
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of the streams that ended"
        )
        self._completion_tokens = self._counter(
            "completion_tokens", "Useful tokens of the streams that ended: up to the first EOS"
        )
        self._stream_steps = self._counter(
            "stream_steps",
            "Steps of the streams that ended; a step that several streams share counts for each",
        )
        self._resumes = self._counter(
            "resumes", "Times that a reader came back to a stream that it had begun"
        )
        self._dropped_drafts = self._counter(
            "dropped_drafts", "Drafts that a reader wanted and a later state overtook"
        )
        self._tokens_per_step = self._histogram(
            "tokens_per_step",
            "Useful tokens per step of a stream, one observation for each that ended",
            TOKENS_PER_STEP,
        )
        self._first_block = self._histogram(
            "time_to_first_block_seconds",
            "From a request's arrival to its first committed block, waiting included",
            WAIT_SECONDS,
        )
        self._interval = self._histogram(
            "block_interval_seconds",
            "Between a committed block of a stream and the one before it",
            WAIT_SECONDS,
        )
        self._step_seconds = self._histogram(
            "step_duration_seconds", "Wall time of a step of the backend", STEP_SECONDS
        )
        self._step_rows = self._histogram("step_rows", "Rows that shared a step", ROWS)

    def watch(self, engine: Engine, gateway: Gateway | None = None) -> None:
        """Read the engine's load and steps, where it has them, and the gateway's connections.

        To be called once, when the engine is open; `unwatch` ends it, as an engine may outlive its
        server.
        """
        self._gateway = gateway
        self.registry.register(_Readings(self._read_connections))
        if isinstance(engine, MeasuredEngine):
            self._unwatch = engine.on_step(self._note_step)
            self.registry.register(_Readings(lambda: read_load(engine.current_load)))

    def unwatch(self) -> None:
        """Take nothing more from the engine's steps. Idempotent."""
        self._unwatch()

    def route(self, auth: Auth | None = None, logins: FailedLogins | None = None) -> Route:
        """Return the route that Prometheus reads, `/metrics`.

        Args:
            auth: who may read it; None lets everybody.
            logins: counts wrong tokens.
        """
        readers, counted = auth or Auth(), logins or FailedLogins()

        async def metrics(request: Request) -> Response:
            try:
                await client_of(request, readers, counted)
            except Unauthorized as error:
                headers = {"WWW-Authenticate": "Bearer"}
                if isinstance(error, LastFailedLogin):
                    headers["Connection"] = "close"
                sentence = f"{error}; /metrics needs one, unless the server has --open-metrics"
                kind = "authentication_error"
                return error_response(401, error.code, sentence, kind=kind, headers=headers)
            return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE})

        return Route("/metrics", metrics, methods=["GET"])

    # StreamObserver

    def on_start(self, stream: ServedStream) -> None:
        """Count an active stream."""
        self._active.inc()
        self._last_event[stream.id] = (self._clock(), False)

    def on_event(self, stream: ServedStream, event: Event) -> None:
        """Count blocks, and the figures of a stream's end."""
        match event:
            case Block():
                self._note_block(stream)
            case StreamFinished():
                self._requests.labels(event.reason).inc()
                self._prompt_tokens.inc(event.usage.prompt_tokens)
                self._completion_tokens.inc(event.usage.completion_tokens)
                self._stream_steps.inc(event.usage.steps)
                if event.usage.steps:
                    self._tokens_per_step.observe(event.usage.tokens_per_step)
            case StreamFailed():
                self._requests.labels("failed").inc()
                self._count_error(error_from(event.code, event.message))

    def on_end(self, stream: ServedStream) -> None:
        """Count the stream as active no more, and as refused if it never began."""
        self._active.dec()
        self._dropped_drafts.inc(stream.num_drafts_dropped)
        self._last_event.pop(stream.id, None)
        if stream.error is not None:
            self._requests.labels("refused" if not stream.started else "failed").inc()
            self._count_error(stream.error)

    def on_resume(self, stream: ServedStream) -> None:
        """Count a reader that came back."""
        del stream
        self._resumes.inc()

    def on_refused(self, error: D2FError) -> None:
        """Count a request that got no stream."""
        self._requests.labels("refused").inc()
        self._count_error(error)

    # HttpObserver, beside on_refused

    def on_slow_consumer(self) -> None:
        """Count a client of the OpenAI routes that did not read."""
        self._num_slow_readers += 1

    def _note_block(self, stream: ServedStream) -> None:
        now = self._clock()
        then, had_block = self._last_event[stream.id]
        (self._interval if had_block else self._first_block).observe(now - then)
        self._last_event[stream.id] = (now, True)
        self._blocks.inc()

    def _note_step(self, wall_s: float, num_rows: int) -> None:
        self._step_seconds.observe(wall_s)
        self._step_rows.observe(num_rows)

    def _count_error(self, error: D2FError) -> None:
        # A remote engine may bring codes that no class here has: those count as "error".
        self._errors.labels(type(error).code).inc()

    def _read_connections(self) -> Iterator[Metric]:
        gateway = self._gateway
        if gateway is not None:
            yield GaugeMetricFamily(
                "d2f_connections", "Open websocket connections", gateway.num_connections
            )
            yield CounterMetricFamily(
                "d2f_failed_logins", "Wrong tokens that were shown", gateway.logins.total
            )
        slow = self._num_slow_readers + (0 if gateway is None else gateway.num_slow_consumers)
        yield CounterMetricFamily(
            "d2f_slow_consumers", "Readers that did not read and lost their connection", slow
        )

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"d2f_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"d2f_{name}", meaning, buckets=buckets, registry=self.registry)


class _Readings(Collector):
    """Metrics that are read from elsewhere when Prometheus asks."""

    def __init__(self, read: Callable[[], Iterator[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        return self._read()
