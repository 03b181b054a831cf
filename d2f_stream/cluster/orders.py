"""What an ingress and a replica say to each other: bytes, so that Ray pickles nothing of ours."""

import random
from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

import d2f_stream
from d2f_stream.core.errors import D2FError, ProtocolError, UnsupportedModel
from d2f_stream.core.events import Block, Event, StreamNames
from d2f_stream.core.identity import ModelIdentity
from d2f_stream.core.params import GenerationParams
from d2f_stream.wire.protocol import Generate, ModelCard, Overrides, RequestRejected, WirePrompt

__all__ = [
    "AnswerOrder",
    "PromptOrder",
    "ReplicaFacts",
    "Told",
    "WorkOrder",
    "decode",
    "encode",
    "ids_of",
    "raise_refusal",
    "read_facts",
    "read_told",
    "refusal",
    "seeded",
]

T = TypeVar("T")

MAP: Final = 0b1000
"""What the first byte of a struct begins with in msgpack, and that of a list does not."""


class WorkOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Bring a stream of the shared log to its end.

    Attributes:
        stream: its id.
        prompt: as it was sent.
        raw: whether a string is taken verbatim.
        params: of the request.
        clamp: whether the answer is shortened where the model has no room for its length.
        max_prompt_tokens: that the server takes.
        by_force: whether its last worker is known to be dead, so that its lease need not run out.
    """

    stream: str
    prompt: WirePrompt
    raw: bool = True
    params: Overrides
    clamp: bool = False
    max_prompt_tokens: int | None = None
    by_force: bool = False


class PromptOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Read a prompt.

    Attributes:
        prompt: as it was sent.
        raw: whether a string is taken verbatim.
    """

    prompt: WirePrompt
    raw: bool = True


class AnswerOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Answer a request, behind the blocks that another replica has told.

    Attributes:
        request: what is asked.
        names: that the events carry: stream, request, scope.
        committed: the answer so far.
        model: whose that is.
    """

    request: Generate
    names: StreamNames
    committed: tuple[Block, ...] = ()
    model: ModelIdentity | None = None


class Told(msgspec.Struct, frozen=True, array_like=True):
    """What a replica tells of an answer at a time.

    Attributes:
        model: whose answer it is.
        events: that came.
    """

    model: ModelIdentity | None
    events: Sequence[Event]


class ReplicaFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica tells of itself.

    Attributes:
        version: of d2f_stream; an ingress has the same.
        card: of its model.
        has_log: whether it appends to a log that servers share.
        keeps_turns: whether it computes a conversation's next turn from its last one on.
    """

    version: str
    card: ModelCard
    has_log: bool
    keeps_turns: bool


class _Version(msgspec.Struct):
    version: str = "unknown"


def encode(
    order: PromptOrder | WorkOrder | AnswerOrder | ReplicaFacts | Told | Sequence[int],
) -> bytes:
    """Return what crosses."""
    return msgspec.msgpack.encode(order)


def decode(data: bytes, kind: type[T]) -> T:
    """Read an order.

    Raises:
        ProtocolError: it is none of this version.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"an order of another version of d2f_stream came: {error}") from error


def read_told(data: bytes) -> Told:
    """Read what a replica told of an answer.

    Raises:
        D2FError: it refused the request.
    """
    _check_refusal(data)
    return decode(data, Told)


def ids_of(data: bytes) -> list[int]:
    """Read a prompt's ids.

    Raises:
        D2FError: it was refused.
    """
    _check_refusal(data)
    return decode(data, list[int])


def refusal(error: D2FError) -> bytes:
    """Return what crosses of an error: exceptions made of values cannot be pickled."""
    return msgspec.msgpack.encode(RequestRejected.of(error))


def raise_refusal(data: bytes) -> None:
    """Raise the error that a replica answered with, if it did.

    Raises:
        D2FError: it did.
    """
    _check_refusal(data)


def read_facts(data: bytes, *, logs: bool) -> ReplicaFacts:
    """Read what a replica tells of itself, and check that this process can work with it.

    Args:
        data: of the replica.
        logs: whether this process reads its streams from a log.

    Raises:
        UnsupportedModel: the replica runs another version, or has no log where this process has.
    """
    theirs, ours = decode(data, _Version).version, d2f_stream.__version__
    if theirs != ours:
        raise UnsupportedModel(
            f"the engines run d2f_stream {theirs} but this server is {ours}; install one version "
            "on all machines, and deploy the engines again"
        )
    facts = decode(data, ReplicaFacts)
    if logs and not facts.has_log:
        raise UnsupportedModel(
            "this server keeps its streams in a log, but the engines were deployed without one; "
            "give both the same: log=URL to the engines, --log URL to the server"
        )
    return facts


def seeded(params: Overrides, defaults: GenerationParams) -> Overrides:
    """Return parameters with a seed where something is drawn, for a second replica to go on."""
    chosen = defaults.with_overrides(params.to_dict())
    if chosen.temperature == 0 or chosen.seed is not None:
        return params
    return msgspec.structs.replace(params, seed=random.getrandbits(63))


def _check_refusal(data: bytes) -> None:
    if data and data[0] >> 4 == MAP:
        raise decode(data, RequestRejected).error()
