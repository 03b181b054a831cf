"""d2f-client.d.ts says what the server says: the fields of each interface are those of the wire."""

import re
from pathlib import Path

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
    declared = re.findall(r"^  (\w+)\??:", found[1], re.MULTILINE)
    struct = STRUCTS[name]
    tag = struct.__struct_config__.tag
    assert [field for field in declared if field != "type"] == list(struct.__struct_fields__)
    assert (f'type: "{tag}"' in found[1]) is (tag is not None)


def test_requests_carry_the_fields_that_the_server_knows() -> None:
    script = DECLARATIONS.with_name("d2f-client.js").read_text()
    for operation in (protocol.Generate, protocol.Resume, protocol.Cancel, protocol.Authenticate):
        assert issubclass(operation, msgspec.Struct)
        assert f'type: "{operation.__struct_config__.tag}"' in script
