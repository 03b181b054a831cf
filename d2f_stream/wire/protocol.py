"""The protocol between clients and servers: operations and messages.

Knows values; nothing of encodings (`codec.py`), sockets, engines or time. The same messages travel
over a websocket (`/v1/stream`) and over MQTT. The JSON Schema and the AsyncAPI page in `schema/`
are made from the classes of this file.

A client sends operations, a server answers with the events of the streams (`events.py`) and with
the few messages below that belong to no stream. Both sides ignore fields that they do not know; a
client also skips messages of a type that it does not know, so that the protocol can grow.

A request is named twice. `request_id` is the client's name for it: sending the same operation again
attaches to the stream that it started and never starts a second one. The stream's id is the
server's: whoever knows it may read, resume and cancel the stream, so both must be hard to guess.
"""

import re
from collections.abc import Sequence
from typing import Final, Literal, Self

import msgspec
from msgspec import UNSET, Struct, UnsetType

from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import D2FError, InvalidPrompt, InvalidRequest, LimitExceeded
from d2f_stream.core.events import Block, Draft, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.core.params import (
    Attention,
    Commit,
    GenerationParams,
    ParamOverrides,
    Rank,
    Schedule,
    StopAtEos,
    Tail,
)

__all__ = [
    "VERSION",
    "Authenticate",
    "Cancel",
    "Generate",
    "ModelCard",
    "ModelDefaults",
    "OnDisconnect",
    "Operation",
    "Overrides",
    "RequestRejected",
    "Resume",
    "ServerClosing",
    "ServerHello",
    "ServerMessage",
    "WirePrompt",
    "check_request_id",
    "wire_prompt",
]

VERSION: Final = 1

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")

OnDisconnect = Literal["continue", "cancel"]
WirePrompt = str | list[int | dict[str, str]]


class Overrides(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of GenerationParams that a request sets; the others are the model's own."""

    max_new_tokens: int | UnsetType = UNSET
    block_size: int | UnsetType = UNSET
    add_threshold: float | UnsetType = UNSET
    activate_threshold: float | UnsetType = UNSET
    confidence_threshold: float | UnsetType = UNSET
    max_active_blocks: int | UnsetType | None = UNSET
    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    seed: int | UnsetType | None = UNSET
    rank: Rank | UnsetType = UNSET
    stop: str | tuple[str, ...] | UnsetType = UNSET
    stop_at_eos: StopAtEos | UnsetType = UNSET
    tail: Tail | UnsetType = UNSET
    num_per_step: int | UnsetType = UNSET
    steps_per_block: int | UnsetType = UNSET
    schedule: Schedule | UnsetType = UNSET
    edit_threshold: float | UnsetType | None = UNSET
    max_edit_steps: int | UnsetType = UNSET
    sub_block_size: int | UnsetType = UNSET
    attention: Attention | UnsetType = UNSET
    may_narrow: bool | UnsetType = UNSET
    commit: Commit | UnsetType = UNSET
    drafts: bool | UnsetType = UNSET
    logprobs: bool | UnsetType = UNSET

    def to_dict(self) -> ParamOverrides:
        """Return the fields that are set, as keyword arguments of generate()."""
        values = msgspec.structs.asdict(self)
        chosen: ParamOverrides = {  # type: ignore[assignment]
            name: value for name, value in values.items() if value is not UNSET
        }
        return chosen


class Authenticate(Struct, frozen=True, kw_only=True, tag="authenticate"):
    """The first message of a client that could not send its token with the handshake."""

    token: str


class Generate(Struct, frozen=True, kw_only=True, tag="generate"):
    """Start an answer, or attach to the one that this `request_id` started.

    Attributes:
        request_id: the client's name for the request: 16 to 128 letters, digits, "_" or "-", hard
            to guess, such as a UUID.
        prompt: a string, token ids or chat messages.
        params: the fields of GenerationParams to set.
        on_disconnect: whether the stream goes on when its last connection is gone.
        raw: whether a string is taken verbatim; else it is a user's turn, for a model that chats.
    """

    request_id: str
    prompt: WirePrompt
    params: Overrides = Overrides()
    on_disconnect: OnDisconnect = "continue"
    raw: bool = True


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel"):
    """End a stream within a step. What it committed stays, and it ends with stream.finished.

    Names the stream, or the request while its stream has not started; exactly one of them.
    """

    stream: str | None = None
    request_id: str | None = None

    @property
    def name(self) -> str:
        """What it names.

        Raises:
            InvalidRequest: both, or neither.
        """
        names = [name for name in (self.stream, self.request_id) if name is not None]
        if len(names) != 1:
            raise InvalidRequest("cancel names either a stream or a request_id")
        return names[0]


class Resume(Struct, frozen=True, kw_only=True, tag="resume"):
    """Read a stream from the event after `after_seq` on; -1 is from its beginning."""

    stream: str
    after_seq: int = -1
    drafts: bool = False


Operation = Authenticate | Generate | Cancel | Resume


class ModelDefaults(GenerationParams, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A model's parameters as a server tells them; a later one may have more of them."""


class ModelCard(Struct, frozen=True, kw_only=True):
    """What a server tells of its model.

    Attributes:
        name: for people and `stream.started`.
        family: dream, llada, sdar, ...
        native_block_size: what the model was trained for, tokens.
        max_block_size: upper bound for a request's block size, tokens.
        max_len: prompt and answer together, tokens.
        defaults: the parameters of a request that gives none.
        description: what the model can do, in a sentence or two for its users.
        license: of the weights, such as "Apache-2.0"; empty where it is not known.
        examples: prompts that show what the model can do.
    """

    name: str
    family: str
    native_block_size: int
    max_block_size: int
    max_len: int
    defaults: ModelDefaults
    description: str = ""
    license: str = ""
    examples: tuple[str, ...] = ()

    @property
    def params(self) -> GenerationParams:
        """The defaults that this version knows."""
        return GenerationParams(**msgspec.structs.asdict(self.defaults))


class ServerHello(Struct, frozen=True, kw_only=True, tag="server.hello"):
    """The server's first message on a connection, once the client is let in.

    Attributes:
        protocol: version of the protocol.
        model: what answers.
        resume_ttl_s: seconds for which a stream can still be resumed after its end.
    """

    protocol: int
    model: ModelCard
    resume_ttl_s: float


class RequestRejected(Struct, frozen=True, kw_only=True, tag="request.rejected"):
    """An operation was refused; names what the operation named. Streams are not affected.

    `code` is that of the error class; `retry_after_s` says when the same request may succeed.
    """

    code: str
    message: str
    request_id: str | None = None
    stream: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(
        cls, error: D2FError, *, request_id: str | None = None, stream: str | None = None
    ) -> Self:
        """Return what tells a client of the error."""
        return cls(
            code=error.code,
            message=str(error),
            request_id=request_id,
            stream=stream,
            retry_after_s=error.retry_after_s if isinstance(error, LimitExceeded) else None,
        )

    def error(self) -> D2FError:
        """Return the error that it tells of."""
        error = error_from(self.code, self.message)
        if isinstance(error, LimitExceeded):
            error.retry_after_s = self.retry_after_s
        return error


class ServerClosing(Struct, frozen=True, kw_only=True, tag="server.closing"):
    """The server shuts down: it takes no new requests and ends what runs in `deadline_s`."""

    message: str
    deadline_s: float


ServerMessage = (
    StreamStarted
    | Block
    | Draft
    | StreamFinished
    | StreamFailed
    | ServerHello
    | RequestRejected
    | ServerClosing
)


def check_request_id(request_id: str) -> None:
    """Refuse a name that another client could guess, or that does not fit a topic.

    Raises:
        InvalidRequest: it is not 16 to 128 letters, digits, "_" or "-".
    """
    if REQUEST_ID.fullmatch(request_id) is None:
        shown = request_id if len(request_id) <= 40 else request_id[:40] + "..."
        raise InvalidRequest(
            f"request_id is {shown!r} but must be 16 to 128 letters, digits, '_' or '-', "
            "hard to guess: take a UUID"
        )


def wire_prompt(prompt: str | Sequence[object]) -> WirePrompt:
    """Return a prompt of generate() as it travels.

    Raises:
        InvalidPrompt: it is not a string, ids or chat messages, or no encoding holds it.
    """
    try:
        wire: WirePrompt = msgspec.convert(prompt, WirePrompt)
        msgspec.msgpack.encode(wire)  # here, since its sender serves other requests too
    except UnicodeEncodeError as error:
        raise InvalidPrompt(
            "the prompt cannot be sent: it holds half of a surrogate pair, which is no character"
        ) from error
    except (msgspec.ValidationError, OverflowError) as error:
        raise InvalidPrompt(f"the prompt cannot be sent: {error}") from error
    return wire
