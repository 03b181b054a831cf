"""Codec: the two encodings of the protocol, JSON and msgpack. Knows values and bytes."""

import re
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Struct

from d2f_stream.core.errors import InvalidRequest, ProtocolError
from d2f_stream.core.printable import printable
from d2f_stream.wire.protocol import VERSION, Operation, ServerMessage

__all__ = ["JSON", "MSGPACK", "SUBPROTOCOLS", "UNREADABLE", "Codec", "problem_of"]

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)
"""What msgspec raises for data that it cannot read: the last is for values that nest too deeply."""

_OPERATION_TAGS: Final = {kind.__struct_config__.tag for kind in get_args(Operation)}
_MESSAGE_TAGS: Final = {kind.__struct_config__.tag for kind in get_args(ServerMessage)}
_HALF: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD])")


def problem_of(error: Exception, data: bytes | str) -> str:
    """Return what is wrong with data that msgspec could not read, as one of UNREADABLE tells it.

    Half of a surrogate pair near the end of JSON is data cut short to msgspec.
    """
    if "truncated" in str(error) and _HALF.search(_bytes(data)):
        return "a string holds half of a surrogate pair, which is no character"
    return printable(error)


class _Tag(Struct):
    type: str = ""


_Name = Annotated[str, msgspec.Meta(max_length=128)]


class _Names(Struct):
    request_id: _Name | None = None
    stream: _Name | None = None


class Codec:
    """One encoding of the protocol.

    Attributes:
        name: "json" or "msgpack".
        subprotocol: its name in a websocket handshake.
        content_type: its name elsewhere.
        is_text: whether it travels in text frames.
    """

    def __init__(self, name: Literal["json", "msgpack"]) -> None:
        self.name = name
        self.subprotocol = f"d2f.v{VERSION}.{name}"
        self.content_type = f"application/vnd.d2f.v{VERSION}+{name}"
        self.is_text = name == "json"
        library = msgspec.json if name == "json" else msgspec.msgpack
        self._encoder = library.Encoder()
        self._operations = library.Decoder(Operation)
        self._messages = library.Decoder(ServerMessage)
        self._tags = library.Decoder(_Tag)
        self._names = library.Decoder(_Names)

    def encode(self, message: Operation | ServerMessage) -> bytes:
        """Return the message's bytes."""
        data: bytes = self._encoder.encode(message)
        return data

    def decode_operation(self, data: bytes | str) -> Operation:
        """Read what a client sent.

        Raises:
            ProtocolError: it cannot be read, or is no operation.
            InvalidRequest: it is one, with a field of a wrong type or name.
        """
        try:
            operation: Operation = self._operations.decode(_bytes(data))
        except msgspec.ValidationError as error:
            problem = printable(error)  # it quotes the names of fields
            if self._tag(data) in _OPERATION_TAGS:
                raise InvalidRequest(problem) from error
            raise ProtocolError(f"no operation of this protocol: {problem}") from error
        except UNREADABLE as error:
            problem = problem_of(error, data)
            raise ProtocolError(f"a message is not {self.name}: {problem}") from error
        return operation

    def decode_message(self, data: bytes | str) -> ServerMessage | None:
        """Read what a server sent; None for a type that this version does not know.

        Raises:
            ProtocolError: it cannot be read.
        """
        try:
            message: ServerMessage = self._messages.decode(_bytes(data))
        except msgspec.ValidationError as error:
            tag = self._tag(data)
            if tag and tag not in _MESSAGE_TAGS:
                return None
            problem = printable(error)
            raise ProtocolError(f"a message of the server cannot be read: {problem}") from error
        except UNREADABLE as error:
            problem = problem_of(error, data)
            raise ProtocolError(f"a message is not {self.name}: {problem}") from error
        return message

    def names_of(self, data: bytes | str) -> tuple[str | None, str | None]:
        """Return request id and stream that an operation names, even one that cannot be read."""
        try:
            names: _Names = self._names.decode(_bytes(data))
        except UNREADABLE:
            return None, None
        return names.request_id, names.stream

    def _tag(self, data: bytes | str) -> str:
        try:
            tag: str = self._tags.decode(_bytes(data)).type
        except UNREADABLE:
            return ""
        return tag


JSON: Final = Codec("json")
MSGPACK: Final = Codec("msgpack")
SUBPROTOCOLS: Final = {codec.subprotocol: codec for codec in (JSON, MSGPACK)}


def _bytes(data: bytes | str) -> bytes:
    return data.encode() if isinstance(data, str) else data
