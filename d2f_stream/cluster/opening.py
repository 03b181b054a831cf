"""What a replica is deployed with: its settings, checked, and the worker that they open."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from d2f_runtime.engine.opening import open_engine
from d2f_stream.cluster.replica_worker import ReplicaWorker
from d2f_stream.core.errors import InvalidRequest
from d2f_stream.core.limits import Limits
from d2f_stream.server.limits import ServeLimits

__all__ = ["ReplicaSettings", "checked", "open_worker"]


class ReplicaSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of the application; each as `d2f-stream serve` knows it.

    Attributes:
        log: URL of the Valkey or Redis server that all servers and replicas share; None sends
            answers back to the server that asked.
        max_sessions: that run at once.
    """

    model: str | None = None
    adapter: str | None = None
    backend: Literal["auto", "onnx", "torch", "scripted"] = "auto"
    device: str = "auto"
    quantization: str = "auto"
    kv_tokens: int | None = None
    family: str | None = None
    warm_up: bool = True
    may_narrow: bool = False
    max_sessions: int = Limits().max_sessions
    log: str | None = None


def checked(args: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments as plain values, of the types that they are to have.

    Raises:
        InvalidRequest: one is not known, or is of no use.
    """
    try:
        # The command line gives strings only.
        settings = msgspec.convert(dict(args), ReplicaSettings, strict=False)
        Limits(max_sessions=settings.max_sessions)
    except msgspec.ValidationError as error:
        known = ", ".join(ReplicaSettings.__struct_fields__)
        raise InvalidRequest(f"the engines' arguments: {error}; there are {known}") from error
    values: dict[str, object] = msgspec.structs.asdict(settings)
    return values


async def open_worker(values: Mapping[str, object]) -> ReplicaWorker:
    """Open the engine and the log of a replica. Safe to cancel.

    Raises:
        D2FError: the model cannot be loaded, or the log cannot be used.
    """
    settings = msgspec.convert(dict(values), ReplicaSettings)
    engine = open_engine(
        settings.model,
        adapter=settings.adapter,
        backend=settings.backend,
        device=settings.device,
        quantization=settings.quantization,
        kv_tokens=settings.kv_tokens,
        family=settings.family,
        warm_up=settings.warm_up,
        limits=Limits(max_sessions=settings.max_sessions, may_narrow=settings.may_narrow),
    )
    log = None
    if settings.log is not None:
        from d2f_stream.server.streams.valkey.log import ValkeyLog

        log = ValkeyLog(settings.log, ServeLimits())
    worker = ReplicaWorker(engine, log)
    await worker.__aenter__()
    return worker
