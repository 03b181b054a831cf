"""RemoteStream: what a client knows of one stream that a server runs. Pure; knows no transport.

Events come in, possibly twice, possibly from a second worker; each durable one reaches the reader
once and in order. A client reads on after a lost connection from `last_seq`.
"""

import uuid
from collections.abc import Mapping, Sequence

import msgspec

from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import D2FError, InvalidParams, InvalidRequest
from d2f_stream.core.events import (
    Block,
    Draft,
    Event,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
    Timings,
    Usage,
)
from d2f_stream.core.params import GenerationParams, ParamOverrides, check_given
from d2f_stream.core.session import Prompt
from d2f_stream.wire.protocol import Generate, Overrides, WirePrompt, wire_prompt

__all__ = ["RemoteStream", "new_request"]


class RemoteStream:
    """Joins the events of one request into the buffer that its session reads.

    Attributes:
        request: as it was sent.
        stream_id: the server's name of the stream, once it has started.
        last_seq: of the last durable event; -1 before the first.

    Args:
        request: what was asked.
        buffer: gets the events.
        names: that the events are to carry instead of the server's and the request's.
    """

    def __init__(
        self, request: Generate, buffer: EventBuffer, names: StreamNames | None = None
    ) -> None:
        self.request = request
        self.stream_id: str | None = None
        self.last_seq = -1
        self._buffer = buffer
        self._names = names
        self._prompt_tokens = 0
        self._first_block: Block | None = None
        self._last_block: Block | None = None

    @property
    def started(self) -> bool:
        """Whether the stream exists; from then on the request must not be sent again."""
        return self.stream_id is not None

    @property
    def ended(self) -> bool:
        """Whether the reader was told the end, or was turned away."""
        return self._buffer.ended

    def receive(self, event: Event) -> bool:
        """Take an event; False where one before it is missing, so that `last_seq` must be resumed.

        Repeated events, and those of a second stream for the same request, are dropped.
        """
        if self.ended:
            return True
        if isinstance(event, StreamStarted) and not self.started:
            if event.request_id != self.request.request_id:
                return True
            self.stream_id = event.stream
        if event.stream != self.stream_id:
            # The beginning of our own stream may be missing; that of a second one is not ours.
            return self.started
        if isinstance(event, Draft):
            self._put(event)
            return True
        if event.seq <= self.last_seq:
            return True
        if event.seq > self.last_seq + 1:
            return False
        self.last_seq = event.seq
        if isinstance(event, StreamStarted):
            self._prompt_tokens = event.prompt_tokens
        elif isinstance(event, Block):
            self._first_block = self._first_block or event
            self._last_block = event
        self._put(event)
        return True

    def fail(self, error: D2FError) -> None:
        """End the stream from this side: it is lost, or the server turned it away. Idempotent."""
        if self.ended:
            return
        if self.stream_id is None:
            self._buffer.reject(error)
            return
        self.last_seq += 1
        self._put(
            StreamFailed(
                stream=self.stream_id, seq=self.last_seq, code=error.code, message=str(error)
            )
        )

    def end_cancelled(self) -> None:
        """End the stream as cancelled from this side, with what has come. Idempotent."""
        if self.ended:
            return
        first, last = self._first_block, self._last_block
        self._put(
            StreamFinished(
                stream=self.stream_id or self.request.request_id,
                seq=self.last_seq + 1,
                reason="cancelled",
                text_length=len(self._buffer.text),
                usage=Usage(
                    prompt_tokens=self._prompt_tokens,
                    completion_tokens=len(self._buffer.token_ids),
                    steps=last.steps if last else 0,
                ),
                timings=Timings(
                    first_block_ms=first.elapsed_ms if first else None,
                    total_ms=last.elapsed_ms if last else 0.0,
                ),
            )
        )

    def _put(self, event: Event) -> None:
        if self._names is not None:
            event = msgspec.structs.replace(event, stream=self._names.stream)
            if isinstance(event, StreamStarted):
                event = msgspec.structs.replace(event, request_id=self._names.request)
        self._buffer.append(event)


def new_request(
    prompt: Prompt,
    params: GenerationParams | None,
    overrides: ParamOverrides,
    *,
    defaults: GenerationParams | None,
    raw: bool = True,
) -> Generate:
    """Return a request under a new id: every field of given params, else what is overridden.

    Args:
        prompt: as of generate().
        params: instead of the model's defaults.
        overrides: single fields, on top of either.
        defaults: the model's, where they are known already: the fields are then checked here.
        raw: take a string verbatim.

    Raises:
        InvalidRequest: prompt or parameters cannot be sent, or are known to be out of range.
    """
    check_given(params)
    base = params or defaults
    checked = base.with_overrides(overrides) if base is not None else None
    chosen: object = overrides if params is None else msgspec.structs.asdict(checked or params)
    try:
        fields = msgspec.convert(chosen, Overrides)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the parameters cannot be sent: {error}") from error
    _check_encodable(fields)
    return Generate(
        request_id=uuid.uuid4().hex,
        prompt=_sent_prompt(prompt),
        params=fields,
        raw=bool(raw),
    )


def _check_encodable(fields: Overrides) -> None:
    # Here, and not where it is sent: a failure there ends all requests of the connection.
    for name, value in fields.to_dict().items():
        try:
            msgspec.msgpack.encode(value)
        except OverflowError as error:
            raise InvalidParams(name, value, "an integer of at most 64 bits") from error
        except UnicodeEncodeError as error:
            raise InvalidParams(name, value, "whole characters, without half surrogates") from error


def _sent_prompt(prompt: Prompt) -> WirePrompt:
    if isinstance(prompt, str | bytes | bytearray) or not isinstance(prompt, Sequence):
        return wire_prompt(prompt)
    return wire_prompt([dict(item) if isinstance(item, Mapping) else item for item in prompt])
