"""docs/serving.md says what the code does: every option that bounds something, and every field."""

from pathlib import Path

import msgspec
import pytest

from d2f_stream import cli
from d2f_stream.core.errors import InvalidParams
from d2f_stream.server.command import settings_of
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.openai.fields import (
    CHAT,
    COMPLETION,
    MESSAGE,
    STREAM_OPTIONS,
    TEXT_PART,
    Field,
)
from d2f_stream.server.openai.requests import ChatRequest, CompletionRequest
from d2f_stream.server.options import OPTIONS, Option
from d2f_stream.server.settings import ServeSettings, Timeouts

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def row_of(option: Option) -> str:
    value = option.default
    shown = "none" if value is None else f"{value:g} s" if option.in_seconds else str(value)
    return f"| `{option.flag}` | {shown} | {option.text} |"


def outcome_of(field: Field) -> str:
    if field.outcome != "refused" or not field.off:
        return field.outcome
    values = " or ".join(f"`{msgspec.json.encode(value).decode()}`" for value in field.off)
    return f"refused, except {values}"


def rows_of_fields() -> list[str]:
    rows: list[str] = []
    for name in dict.fromkeys([*CHAT, *COMPLETION]):
        chat, completion = CHAT.get(name), COMPLETION.get(name)
        if chat == completion:
            places = [("both", chat)]
        else:
            places = [("chat", chat), ("completions", completion)]
        rows += [f"| `{name}` | {place} | {outcome_of(f)} |" for place, f in places if f]
    inner = (
        ("a message", MESSAGE),
        ("`stream_options`", STREAM_OPTIONS),
        ("a text part", TEXT_PART),
    )
    for place, fields in inner:
        rows += [f"| `{name}` | {place} | {outcome_of(field)} |" for name, field in fields.items()]
    return rows


def test_table_of_options_is_the_code_s() -> None:
    assert "\n".join(map(row_of, OPTIONS)) in PAGE


def test_table_of_fields_is_the_code_s() -> None:
    assert "\n".join(rows_of_fields()) in PAGE


def test_every_limit_is_an_option_of_serve() -> None:
    known = {option.field for option in OPTIONS}
    limits, timeouts = ServeLimits.__slots__, set(Timeouts.__slots__) - {"stall_s"}
    assert {*limits, *timeouts, "shutdown_deadline_s"} == known


def test_obeyed_fields_are_those_that_are_read() -> None:
    for fields, kind in ((CHAT, ChatRequest), (COMPLETION, CompletionRequest)):
        obeyed = {name for name, field in fields.items() if field.outcome == "obeyed"}
        assert obeyed == set(kind.__struct_fields__)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_option_sets_its_field_and_refuses_what_is_out_of_range(option: Option) -> None:
    def settings(value: str) -> ServeSettings:
        return settings_of(cli.build_parser().parse_args(["serve", f"{option.flag}={value}"]), {})

    chosen = settings("7")
    holders = (chosen.limits, chosen.timeouts, chosen)
    assert next(getattr(h, option.field) for h in holders if hasattr(h, option.field)) == 7
    with pytest.raises(InvalidParams, match=option.flag):
        settings("-1")
    if option.field == "stall_timeout_s":
        assert chosen.timeouts.stall_s == 12.0
