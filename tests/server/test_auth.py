import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_stream.core.errors import Unauthorized
from d2f_stream.server.auth import (
    AUTH_SUBPROTOCOL,
    LOCAL,
    Auth,
    token_of_header,
    token_of_subprotocols,
)

AUTH = Auth({"ann": "a" * 32, "bob": "b" * 32}, origins=("https://chat.example.com",))


def test_each_token_stands_for_its_client() -> None:
    assert AUTH.client_of("a" * 32) == "ann"
    assert AUTH.client_of("b" * 32) == "bob"


@pytest.mark.parametrize("token", [None, "", "a" * 31, "ann", "A" * 32, "ü", "\ud800"])
def test_other_tokens_stand_for_nobody(token: str | None) -> None:
    with pytest.raises(Unauthorized):
        AUTH.client_of(token)


def test_without_tokens_everybody_is_the_local_client() -> None:
    assert not Auth().required
    assert Auth().client_of(None) == Auth().client_of("anything") == LOCAL


def test_tokens_do_not_show_in_reprs_or_errors() -> None:
    assert "aaaa" not in repr(AUTH)
    with pytest.raises(Unauthorized) as caught:
        AUTH.client_of("secret-of-mine")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "127.0.0.1:8000", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://localhost:8000", "127.0.0.1:8000", False),
        ("http://127.0.0.1:9999", "127.0.0.1:8000", False),
        ("https://chat.example.com", "127.0.0.1:8000", True),
        ("https://chat.example.com.evil.org", "127.0.0.1:8000", False),
        ("null", "127.0.0.1:8000", False),
        ("", "", False),
        ("https://evil.org", None, False),
        ("http://[", "127.0.0.1:8000", False),
    ],
)
def test_pages_of_other_origins_are_kept_out(
    origin: str | None, host: str | None, allowed: bool
) -> None:
    assert AUTH.allows_origin(origin, host) is allowed


def test_star_lets_every_origin_in() -> None:
    assert Auth(origins=("*",)).allows_origin("https://anywhere.org", "127.0.0.1:8000")


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("abc", None),
        ("", None),
        (None, None),
    ],
)
def test_token_of_a_header(header: str | None, token: str | None) -> None:
    assert token_of_header(header) == token


@given(token=st.text(min_size=1))
def test_token_travels_as_a_subprotocol(token: str) -> None:
    encoded = base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")
    offered = ["d2f.v1.json", AUTH_SUBPROTOCOL + encoded]
    assert token_of_subprotocols(offered) == token


@pytest.mark.parametrize("name", ["d2f.v1.json", "d2f.auth.%%%", "d2f.auth._w", "d2f.auth.a"])
def test_subprotocols_without_a_readable_token(name: str) -> None:
    assert token_of_subprotocols([name]) is None
