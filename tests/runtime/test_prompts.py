"""Chat messages whose role a model's template does not know."""

from collections.abc import Mapping, Sequence

import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.prompts import encode
from d2f_runtime.loaded_model import ModelParts
from d2f_stream.core.errors import InvalidPrompt
from fakes import info, params


class KnowingCodec(ByteCodec):
    """Leaves out the messages of other roles, as templates do that ask for each role by name."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return super().render([message for message in messages if message["role"] == "user"])


def parts(codec: ByteCodec) -> ModelParts:
    return ModelParts(ScriptedBackend(info=info()), codec, params())


MESSAGES = [{"role": "bogus", "content": " unheard\n"}, {"role": "user", "content": "hi"}]


def test_message_that_the_template_leaves_out_is_refused() -> None:
    with pytest.raises(InvalidPrompt, match=r"leaves chat message 0 out.* the role 'bogus'; take"):
        encode(MESSAGES, parts(KnowingCodec()))


def test_role_that_the_template_writes_is_the_model_s_affair() -> None:
    codec = ByteCodec()
    assert "bogus:  unheard" in codec.decode(encode(MESSAGES, parts(codec)))
