import pytest

from d2f_stream.core import errors
from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    InvalidParams,
    InvalidRequest,
    MissingExtra,
    ModelError,
    ModelNotFound,
    PromptTooLong,
    Unauthorized,
)

ALL: list[type[D2FError]] = [
    kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)
]


def test_every_error_is_in_the_tree_drawn_in_the_docstring() -> None:
    assert errors.__doc__ is not None
    for kind in ALL:
        assert issubclass(kind, D2FError)
        assert f" {kind.__name__}" in errors.__doc__


def test_codes_are_distinct() -> None:
    assert len({kind.code for kind in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidRequest, ValueError),
        (ModelNotFound, FileNotFoundError),
        (MissingExtra, ImportError),
        (ConnectionLost, ConnectionError),
        (Unauthorized, PermissionError),
    ],
)
def test_errors_can_be_caught_as_builtin_ones(
    kind: type[D2FError], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)


def test_model_not_found_is_a_model_error_with_a_plain_sentence() -> None:
    error = ModelNotFound("no model at /x")
    assert isinstance(error, ModelError)
    assert str(error) == "no model at /x"


def test_invalid_params_names_field_value_and_range() -> None:
    error = InvalidParams("top_p", 2.0, "above 0 and at most 1")
    assert str(error) == "top_p is 2.0 but must be above 0 and at most 1"
    assert (error.name, error.value, error.allowed) == ("top_p", 2.0, "above 0 and at most 1")


def test_prompt_too_long_says_what_to_do() -> None:
    assert str(PromptTooLong(5000, 256, 4096)) == (
        "prompt has 5000 tokens, but the model holds 4096 in all; shorten the prompt"
    )
    assert str(PromptTooLong(4000, 256, 4096)) == (
        "prompt has 4000 tokens and max_new_tokens is 256, but the model holds 4096 in all; "
        "shorten the prompt or lower max_new_tokens to 96"
    )


def test_missing_extra_gives_the_command() -> None:
    error = MissingExtra("backend 'onnx'", "onnxruntime", "edge")
    assert str(error).endswith("run: pip install 'd2f-stream[edge]'")


@pytest.mark.parametrize("kind", ALL)
def test_error_comes_back_from_the_wire_as_itself_or_its_parent(kind: type[D2FError]) -> None:
    error = error_from(kind.code, "what happened")
    assert issubclass(kind, type(error))
    assert type(error) is kind or "__init__" in vars(kind)
    assert (error.code, str(error)) == (kind.code, "what happened")


def test_unknown_code_is_kept() -> None:
    error = error_from("added_later", "what happened")
    assert type(error) is D2FError
    assert (error.code, str(error)) == ("added_later", "what happened")
    assert D2FError.code == "error"
