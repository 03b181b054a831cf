"""Calls over a handle of Ray Serve, and how a process gets one: what an ingress knows of Ray."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from d2f_stream.cluster.calls import ReplicaLost
from d2f_stream.cluster.conversations import IN_DOUBT
from d2f_stream.cluster.engines_url import EnginesUrl
from d2f_stream.cluster.handle_engine import HandleEngine
from d2f_stream.cluster.logging_handle_engine import LoggingHandleEngine
from d2f_stream.core.errors import ConnectionLost, EngineFailed, MissingExtra

try:
    import ray
    from grpc import StatusCode
    from grpc.aio import AioRpcError
    from ray import serve
    from ray.exceptions import RayActorError, RayError, RayTaskError
    from ray.serve.exceptions import RayServeException
except ImportError as error:
    raise MissingExtra("a cluster of engines", "ray[serve]", "cluster") from error

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

__all__ = ["HandleCalls", "connect_engines"]


async def connect_engines(url: EnginesUrl, *, logs: bool) -> HandleEngine:
    """Join the cluster, find the application there, and return an engine over it, to be entered.

    Args:
        url: where it is.
        logs: whether the engines append to a log that this process reads.

    Raises:
        ConnectionLost: the cluster cannot be joined, or has no such application.
    """
    handle = await asyncio.to_thread(_handle_of, url)
    calls = HandleCalls(handle, leaves=True)
    return LoggingHandleEngine(calls) if logs else HandleEngine(calls)


class HandleCalls:
    """`Calls` over a handle.

    Args:
        handle: of the deployment.
        leaves: whether this process leaves the cluster when they are closed.
    """

    def __init__(self, handle: "DeploymentHandle", *, leaves: bool = False) -> None:
        self._handle = handle
        self._leaves = leaves
        # By value: half the processor time of a call that passes through Ray's object store. It
        # goes to the gRPC port that each replica has, which wants the cluster's token. Only Ray's
        # own way tells of a machine that is gone without a word, so what has no log takes that.
        self._worker = handle.options(
            stream=True,
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        ).work

    async def call(self, method: str, data: bytes) -> bytes:
        """Call a method. Safe to cancel."""
        with _telling():
            answer: bytes = await getattr(self._handle, method).remote(data)
        return answer

    async def stream(
        self, method: str, data: bytes, *, conversation: str = ""
    ) -> AsyncIterator[bytes]:
        """Call one that yields. Closing it early ends it there too."""
        handle = self._handle.options(stream=True, session_id=conversation)
        async for answer in _answers_of(getattr(handle, method).remote(data)):
            yield answer

    async def work(self, data: bytes, *, conversation: str = "", doubts: bool = False) -> bytes:
        """Call `work`. Safe to cancel."""
        worker, session = self._worker, IN_DOUBT if doubts else conversation
        if session:  # a handle that is made anew costs a part of the call
            worker = worker.options(session_id=session)
        told = [answer async for answer in _answers_of(worker.remote(data))]
        if not told:
            raise ReplicaLost("it did not tell what became of its work")
        return told[0]

    async def close(self) -> None:
        """Call nobody any more."""
        if self._leaves:
            await asyncio.to_thread(ray.shutdown)


@contextmanager
def _telling() -> Iterator[None]:
    """Raise what `Calls` raises for what Ray does."""
    try:
        yield
    except RayActorError as error:
        raise ReplicaLost(str(error)) from error
    except RayTaskError as error:
        raise EngineFailed(f"a replica failed: {error.cause!r}") from error
    except (RayError, RayServeException) as error:
        raise ReplicaLost(f"{type(error).__name__}: {error}") from error
    except AioRpcError as error:
        if error.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED):
            raise ReplicaLost(f"{error.code()}: {error.details()}") from error
        raise EngineFailed(f"a call failed: {error.code()}: {error.details()}") from error


async def _answers_of(answers: "DeploymentResponseGenerator") -> AsyncIterator[bytes]:
    is_over = False
    try:
        with _telling():
            async for answer in answers:
                yield answer
        is_over = True
    except (ReplicaLost, EngineFailed):
        is_over = True
        raise
    finally:
        if not is_over:
            answers.cancel()


def _handle_of(url: EnginesUrl) -> "DeploymentHandle":
    where = url.address or "of this machine"
    if not ray.is_initialized():
        try:
            ray.init(
                address=url.address or "auto",
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise ConnectionLost(
                f"the Ray cluster {where} cannot be joined: {error}; start one with `ray start`, "
                "on this machine too where its head is another one, and set RAY_AUTH_MODE=token "
                "where it wants a token"
            ) from error
    try:
        return serve.get_app_handle(url.app)
    except RayServeException as error:
        ray.shutdown()
        raise ConnectionLost(
            f"the Ray cluster {where} has no application {url.app!r}: {error}; deploy it with "
            "`serve deploy`"
        ) from error
