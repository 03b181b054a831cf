"""d2f-client.d.ts says what the server says: the fields of each interface are those of the wire."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

import d2f_stream.server
from d2f_stream.core import events
from d2f_stream.core.params import GenerationParams
from d2f_stream.wire import protocol

DECLARATIONS = Path(d2f_stream.server.__file__).parent / "static" / "d2f-client.d.ts"
STRUCTS = {
    "StreamStarted": events.StreamStarted,
    "Block": events.Block,
    "Draft": events.Draft,
    "Usage": events.Usage,
    "Timings": events.Timings,
    "StreamFinished": events.StreamFinished,
    "StreamFailed": events.StreamFailed,
    "Params": GenerationParams,
    "ModelCard": protocol.ModelCard,
    "ServerHello": protocol.ServerHello,
    "ServerClosing": protocol.ServerClosing,
}


@pytest.mark.parametrize("name", STRUCTS)
def test_interface_has_the_fields_of_the_wire(name: str) -> None:
    found = re.search(rf"export interface {name} {{(.*?)\n}}", DECLARATIONS.read_text(), re.DOTALL)
    assert found is not None
    declared = dict(re.findall(r"^  (\w+)\??: (.*);$", found[1], re.MULTILINE))
    struct = STRUCTS[name]
    tag = struct.__struct_config__.tag
    assert declared.pop("type", None) == (None if tag is None else f'"{tag}"')
    hints = get_type_hints(struct)
    expected = {field: typescript(hints[field]) for field in struct.__struct_fields__}
    assert list(declared) == list(expected)
    assert {field: alternatives(kind) for field, kind in declared.items()} == expected


def alternatives(declared: str) -> set[str]:
    """The members of a declared union; of a name that is declared elsewhere, that one's."""
    alias = re.search(rf"export type {re.escape(declared)} = (.*?);", DECLARATIONS.read_text())
    return set((alias[1] if alias else declared).split(" | "))


def typescript(kind: Any) -> set[str]:
    """The members of the union that a type becomes in TypeScript."""
    plain = {int: "number", float: "number", str: "string", bool: "boolean", NoneType: "null"}
    if kind in plain:
        return {plain[kind]}
    if get_origin(kind) in (UnionType, Union):
        return set().union(*map(typescript, get_args(kind)))
    if get_origin(kind) is Literal:
        return {f'"{value}"' for value in get_args(kind)}
    if get_origin(kind) in (tuple, list, Sequence):
        (inner,) = typescript(get_args(kind)[0])
        return {f"{inner}[]"}
    if kind is protocol.ModelDefaults:
        return {"Required<Params>"}
    return {kind.__name__}


def test_requests_carry_the_fields_that_the_server_knows() -> None:
    script = DECLARATIONS.with_name("d2f-client.js").read_text()
    for operation in (protocol.Generate, protocol.Resume, protocol.Cancel, protocol.Authenticate):
        assert issubclass(operation, msgspec.Struct)
        assert f'type: "{operation.__struct_config__.tag}"' in script
