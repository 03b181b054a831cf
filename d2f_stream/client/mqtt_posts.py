"""What a conversation says, as messages to a broker: their topics, and what replaces what."""

from d2f_stream.channels.broker import Outgoing
from d2f_stream.client.asked import Post
from d2f_stream.wire.codec import Codec
from d2f_stream.wire.protocol import Cancel, Generate, Resume
from d2f_stream.wire.topics import OperationTopic, RequestTopic, StreamTopic, Topic

__all__ = ["Key", "keys_of", "message_of"]

Key = tuple[str, str]
"""Of a message that waits for the broker; the next one of the same key replaces it."""


def message_of(post: Post, client: str, codec: Codec) -> tuple[Key, Outgoing] | None:
    """Return a message and its key; None where nobody would take it.

    Args:
        post: of the conversation.
        client: our name in the topics.
        codec: of the payload.
    """
    operation, request_id, worker = post
    topic: Topic
    match operation:
        case Generate():
            key, topic = ("generate", request_id), RequestTopic(client)
        case Cancel(stream=None):
            key, topic = ("cancel", request_id), StreamTopic(client, request_id, "cancel")
        case Cancel(stream=str(name)) | Resume(stream=name) if worker:
            topic = OperationTopic(worker, client, request_id)
            is_cancel = isinstance(operation, Cancel)
            key = ("cancel", name) if is_cancel else ("resume", request_id)
        case _:
            return None
    payload = codec.encode(operation)
    return key, Outgoing(str(topic), payload, content_type=codec.content_type)


def keys_of(request_id: str) -> tuple[Key, ...]:
    """Return the keys of what need not be sent once a request is over."""
    return ("generate", request_id), ("resume", request_id)
