"""The Ray Serve application of engines: `serve run d2f_stream.cluster:app model=... log=...`.

Ray pickles the class by value, so it is thin: what it does is `ReplicaWorker`'s.
"""

from d2f_stream.core.errors import MissingExtra

try:
    from ray import serve
    from ray.serve import Application
    from ray.serve.config import RequestRouterConfig

    from d2f_stream.cluster.routing import ConversationRouter
except ImportError as error:
    raise MissingExtra("a cluster of engines", "ray[serve]", "cluster") from error

from collections.abc import AsyncIterator

__all__ = ["Engine", "app"]


@serve.deployment(
    max_ongoing_requests=48,  # more than sessions: prompts are read beside them
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=30,
    request_router_config=RequestRouterConfig(request_router_class=ConversationRouter),
    logging_config={"enable_access_log": False},
)
class Engine:
    """A replica: one engine with a model of its own."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: dict[str, object]
    ) -> None:
        from d2f_stream.cluster.opening import open_worker

        self._worker = await open_worker(settings)

    async def facts(self, data: bytes) -> bytes:
        """Tell what it serves."""
        del data
        return self._worker.facts()

    async def encode(self, data: bytes) -> bytes:
        """Read a prompt."""
        return await self._worker.encode(data)

    async def work(self, data: bytes) -> AsyncIterator[bytes]:
        """Bring a stream of the log to its end; yields once.

        It yields, since only then Serve knows at once whether a replica has taken it.
        """
        yield await self._worker.work(data)

    async def answer(self, data: bytes) -> AsyncIterator[bytes]:
        """Answer a request."""
        async for events in self._worker.answer(data):
            yield events

    def check_health(self) -> None:
        """Have Serve replace it, once its engine cannot work any more."""
        self._worker.check_health()

    def record_routing_stats(self) -> dict[str, int]:
        """Tell routers of one's own how busy it is."""
        return self._worker.load()

    async def __del__(self) -> None:
        """Give running streams to others; called when Serve stops the replica."""
        await self._worker.__aexit__()


def app(args: dict[str, object]) -> Application:
    """Build the application.

    Args:
        args: of the command line or of the config file's `args`: `model`, `adapter`, `backend`,
            `device`, `quantization`, `kv_tokens`, `family`, `max_sessions`, `may_narrow`, as
            `d2f-stream serve` knows them, and `log`.

    Raises:
        InvalidRequest: an argument is not known, or its value none that it takes.
    """
    from d2f_stream.cluster.opening import checked

    return Engine.bind(checked(args))  # type: ignore[attr-defined]  # Serve has made it a deployment
