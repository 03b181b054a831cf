"""Documents of the protocol. Pure: classes in, texts out."""

import inspect
import json
from typing import Any, Final, get_args

import msgspec

from d2f_stream.core.events import Block, Draft, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.wire import protocol
from d2f_stream.wire.codec import JSON, MSGPACK
from d2f_stream.wire.protocol import (
    Cancel,
    Generate,
    Operation,
    RequestRejected,
    Resume,
    ServerMessage,
)
from d2f_stream.wire.topics import (
    NodeStatus,
    NodeStatusTopic,
    OperationTopic,
    RequestTopic,
    StreamState,
    StreamTopic,
    Topic,
)

__all__ = ["asyncapi", "documents", "json_schema"]

Document = dict[str, Any]

UNIONS: Final[dict[str, tuple[Any, str]]] = {
    "Operation": (Operation, "What a client sends."),
    "ServerMessage": (ServerMessage, "What a server sends."),
    "MqttMessage": (StreamState | NodeStatus, "What is retained on an MQTT broker."),
}
STREAM_EVENTS: Final = (StreamStarted, Block, StreamFinished, StreamFailed)
RETAINED: Final = ("state", "status")
RULES: Final = (
    "Receivers ignore fields that they do not know, and clients skip messages of a type that they "
    "do not know. The durable events of a stream carry `seq`, from 0, without gaps; drafts carry "
    "none and may be dropped."
)


def documents() -> dict[str, str]:
    """Return the text of every document by its file name."""
    found = {f"d2f.v{protocol.VERSION}.json": json_schema(), "asyncapi.json": asyncapi()}
    return {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in found.items()
    }


def json_schema() -> Document:
    """Return the JSON Schema; a value is valid if it is any operation or message."""
    definitions = _schemas("#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"The d2f_stream protocol, version {protocol.VERSION}",
        "description": RULES,
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in UNIONS],
        "$defs": definitions,
    }


def asyncapi() -> Document:
    """Return the AsyncAPI document: the websocket and the MQTT topics, as the server sees them."""
    channels = {"stream": _websocket_channel()} | _mqtt_channels()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "d2f_stream",
            "version": str(protocol.VERSION),
            "description": "Blocks of text as they become final. " + RULES,
        },
        "defaultContentType": "application/json",
        "servers": {
            "websocket": {
                "host": "127.0.0.1:8000",
                "protocol": "ws",
                "description": "`d2f-stream serve`. Where the server wants tokens, send "
                "`Authorization: Bearer ...`, or `authenticate` as the first message.",
            },
            "broker": {
                "host": "127.0.0.1:1883",
                "protocol": "mqtt",
                "protocolVersion": "5.0",
                "description": "Any MQTT 5 broker between clients and `d2f-stream serve --mqtt`.",
            },
        },
        "channels": channels,
        "operations": _operations(channels),
        "components": {
            "messages": {name: _message(kind) for name, kind in _kinds().items()},
            "schemas": _without_discriminators(_schemas("#/components/schemas/{name}")),
        },
    }


def _schemas(ref_template: str) -> Document:
    """Return the schema of each class, and of each union under its name."""
    types = [union for union, _ in UNIONS.values()]
    unions, schemas = msgspec.json.schema_components(types, ref_template=ref_template)
    for schema in schemas.values():
        # Python before 3.13 keeps the indentation of docstrings.
        schema["description"] = inspect.cleandoc(schema["description"])
    for name, union in zip(UNIONS, unions, strict=True):
        schemas[name] = {"title": name, "description": UNIONS[name][1], **union}
    return dict(sorted(schemas.items()))


def _without_discriminators(value: Any) -> Any:
    """Leave out what AsyncAPI calls by the same name and means otherwise; `type` tells anyway."""
    if isinstance(value, list):
        return [_without_discriminators(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_discriminators(inner)
        for name, inner in value.items()
        if name != "discriminator"
    }


def _kinds() -> dict[str, type[msgspec.Struct]]:
    members = [kind for union, _ in UNIONS.values() for kind in get_args(union)]
    return {kind.__name__: kind for kind in members}


def _message(kind: type[msgspec.Struct]) -> Document:
    return {
        "name": kind.__struct_config__.tag,
        "title": kind.__name__,
        "summary": (kind.__doc__ or "").split("\n")[0],
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
    }


def _websocket_channel() -> Document:
    return {
        "address": "/v1/stream",
        "title": "One connection, any number of streams",
        "description": f"Subprotocol `{JSON.subprotocol}` (the default) or `{MSGPACK.subprotocol}`."
        " Streams outlive the connection and are resumed on another one.",
        "servers": [{"$ref": "#/servers/websocket"}],
        "messages": _references(*get_args(Operation), *get_args(ServerMessage)),
        "bindings": {"ws": {"method": "GET"}},
    }


def _mqtt_channels() -> Document:
    request = ("CLIENT", "REQUEST_ID-REQUEST_ID")
    return {
        "requests": _mqtt_channel(
            RequestTopic(request[0]),
            "Requests; workers share them: each reaches one of them",
            Generate,
        ),
        "cancels": _mqtt_channel(
            StreamTopic(*request, "cancel"), "Ends a request, whoever runs it", Cancel
        ),
        "operations": _mqtt_channel(
            OperationTopic("NODE", *request), "For the worker that runs the stream", Cancel, Resume
        ),
        "events": _mqtt_channel(
            StreamTopic(*request, "events"),
            "The durable events of a stream, in order; or why there is none",
            *STREAM_EVENTS,
            RequestRejected,
        ),
        "state": _mqtt_channel(
            StreamTopic(*request, "state"), "Retained: the stream so far", StreamState
        ),
        "drafts": _mqtt_channel(
            StreamTopic(*request, "drafts"), "Provisional states of blocks, at QoS 0", Draft
        ),
        "status": _mqtt_channel(
            NodeStatusTopic("NODE"), "Retained: whether a worker serves; its will", NodeStatus
        ),
    }


def _mqtt_channel(topic: Topic, title: str, *kinds: type[msgspec.Struct]) -> Document:
    parameters = {
        "client": ("CLIENT", "name of the client"),
        "request_id": ("REQUEST_ID-REQUEST_ID", "the client's name for the request"),
        "node": ("NODE", "name of the worker"),
    }
    address = str(topic)
    used = {name: meaning for name, (mark, meaning) in parameters.items() if mark in address}
    for name in used:
        address = address.replace(parameters[name][0], f"{{{name}}}")
    return {
        "address": address,
        "title": title,
        "servers": [{"$ref": "#/servers/broker"}],
        "messages": _references(*kinds),
        "parameters": {name: {"description": meaning} for name, meaning in used.items()},
    }


def _references(*kinds: type[msgspec.Struct]) -> Document:
    return {kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in kinds}


def _operations(channels: Document) -> Document:
    taken = {kind.__name__ for kind in get_args(Operation)}
    found: Document = {}
    for channel, described in channels.items():
        for action, is_taken in (("receive", True), ("send", False)):
            names = [name for name in described["messages"] if (name in taken) is is_taken]
            if names:
                found[f"{action}_{channel}"] = _operation(action, channel, names)
    return found


def _operation(action: str, channel: str, names: list[str]) -> Document:
    where = f"#/channels/{channel}"
    operation: Document = {
        "action": action,
        "channel": {"$ref": where},
        "messages": [{"$ref": f"{where}/messages/{name}"} for name in names],
    }
    if channel != "stream":
        quality = {"qos": 0 if channel == "drafts" else 1, "retain": channel in RETAINED}
        operation["bindings"] = {"mqtt": quality}
    return operation
