"""Every field of OpenAI's requests that clients send: obeyed, without effect, or refused. Pure.

The table in docs/serving.md is this one, and a test compares both. What is not in it is refused as
well: a setting that is dropped without a word gives another answer than the one that was asked for.
A refused field may hold a value that asks for nothing, such as 0 or an empty list; null is as good
as absent everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from d2f_stream.core.errors import InvalidRequest
from d2f_stream.core.printable import printable

__all__ = [
    "CHAT",
    "COMPLETION",
    "Field",
    "Fields",
    "UnsupportedParameter",
    "check_fields",
    "check_known",
]


class UnsupportedParameter(InvalidRequest):
    """The request asks for something that is not done here; `param` is its place in the JSON."""

    code = "unsupported_parameter"

    def __init__(self, param: str, sentence: str) -> None:
        self.param = param
        super().__init__(sentence)


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    Attributes:
        outcome: what becomes of it.
        off: values of a refused one that ask for nothing.
    """

    outcome: Literal["obeyed", "no effect", "refused"]
    off: tuple[object, ...] = ()


Fields = Mapping[str, Field]


def _obeyed(*names: str) -> dict[str, Field]:
    return {name: Field("obeyed") for name in names}


def _without_effect(*names: str) -> dict[str, Field]:
    return {name: Field("no effect") for name in names}


def _refused(**off: tuple[object, ...]) -> dict[str, Field]:
    return {name: Field("refused", values) for name, values in off.items()}


BOTH: Final[Fields] = {
    **_obeyed("model", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"),
    **_obeyed("stream_options", "diffusing", "d2f"),
    **_without_effect("user", "metadata", "store", "service_tier", "safety_identifier"),
    **_without_effect("prompt_cache_key", "prompt_cache_retention", "cache_salt", "cache_prompt"),
    **_without_effect("request_id", "priority", "keep_alive"),
    **_refused(logit_bias=({},), presence_penalty=(0,), frequency_penalty=(0,)),
    **_refused(repetition_penalty=(1,), length_penalty=(1,), top_k=(-1, 0), min_p=(0,)),
    **_refused(typical_p=(1,), top_a=(0,), tfs_z=(1,), mirostat=(0,), use_beam_search=(False,)),
    **_refused(ignore_eos=(False,), min_tokens=(0,), stop_token_ids=([],), bad_words=([],)),
    **_refused(include_stop_str_in_output=(False,), skip_special_tokens=(True,)),
    **_refused(spaces_between_special_tokens=(True,), allowed_token_ids=()),
    **_refused(truncate_prompt_tokens=(), prompt_logprobs=(), add_special_tokens=(False,)),
    **_refused(structured_outputs=(), guided_json=(), guided_regex=(), guided_choice=()),
    **_refused(guided_grammar=(), grammar=("",), json_schema=(), logits_processors=([],)),
    **_refused(return_token_ids=(False,), return_tokens_as_token_ids=(False,), echo=(False,)),
}

CHAT: Final[Fields] = {
    **BOTH,
    **_obeyed("messages", "max_completion_tokens", "logprobs"),
    **_without_effect("parallel_tool_calls", "prediction", "include_reasoning"),
    **_refused(tools=([],), functions=([],), tool_choice=("none", "auto")),
    **_refused(function_call=("none", "auto"), top_logprobs=(0,)),
    **_refused(response_format=({"type": "text"},), modalities=(["text"],), audio=()),
    **_refused(reasoning_effort=("none",), verbosity=("medium",), web_search_options=()),
    **_refused(thinking=({"type": "disabled"},), reasoning=(), enable_thinking=()),
    **_refused(chat_template=(), chat_template_kwargs=({},), documents=([],)),
    **_obeyed("continue_final_message", "add_generation_prompt"),
}

COMPLETION: Final[Fields] = {
    **BOTH,
    **_obeyed("prompt", "logprobs"),
    **_refused(best_of=(1,), suffix=("",)),
}

STREAM_OPTIONS: Final[Fields] = {
    **_obeyed("include_usage"),
    **_without_effect("include_obfuscation"),
    **_refused(continuous_usage_stats=(False,)),
}

MESSAGE: Final[Fields] = {
    **_obeyed("role", "content", "name", "reasoning_content"),
    **_obeyed("refusal", "tool_calls", "function_call"),
    **_without_effect("tool_call_id"),  # results stand in the order of their calls
    **_refused(audio=(), annotations=([],), prefix=(False,), partial=(False,)),
}

TEXT_PART: Final[Fields] = {**_obeyed("type", "text"), **_without_effect("cache_control")}


def check_fields(body: Mapping[str, object], known: Fields) -> None:
    """Refuse what would change the answer and is not done here, and what nobody knows.

    Args:
        body: a request as it came.
        known: the fields of its endpoint.

    Raises:
        UnsupportedParameter: names the first such field.
    """
    check_known(body, known, "")
    check_known(body.get("stream_options"), STREAM_OPTIONS, "stream_options.")
    messages = body.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        check_known(message, MESSAGE, f"messages[{number}].")
        content = message.get("content") if isinstance(message, Mapping) else None
        for part_number, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, Mapping) and part.get("type") == "text":
                check_known(part, TEXT_PART, f"messages[{number}].content[{part_number}].")


def check_known(values: object, known: Fields, place: str = "") -> None:
    """Refuse what one level of a request asks for and is not done here.

    Args:
        values: as they came; no mapping is refused elsewhere.
        known: the fields of this level.
        place: of the level in the request, ending with a dot.

    Raises:
        UnsupportedParameter: names the first such field.
    """
    if not isinstance(values, Mapping):
        return  # absent, or of a wrong type, which is told elsewhere
    for name, value in values.items():
        field = known.get(name)
        if value is None or (field is not None and field.outcome != "refused"):
            continue
        param = printable(f"{place}{name}", 100)
        if field is None:
            raise UnsupportedParameter(
                param, f"this server does not know {param}; leave it out of the request"
            )
        if not any(_same(value, off) for off in field.off):
            raise UnsupportedParameter(param, _sentence(param, value, field))


def _sentence(param: str, value: object, field: Field) -> str:
    if isinstance(value, str | int | float | bool):
        shown = f"{param} is {printable(_json(value), 60)}, which"
    else:
        shown = param
    if not field.off:
        return f"{shown} is not supported by this server; leave it out of the request"
    allowed = " or ".join(map(_json, field.off))
    return f"{shown} is not supported by this server; leave it out, or send {allowed}"


def _same(value: object, off: object) -> bool:
    return isinstance(value, bool) == isinstance(off, bool) and value == off


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
