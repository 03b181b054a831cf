import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_stream.core.errors import InvalidRequest, ProtocolError
from d2f_stream.wire.codec import JSON, MSGPACK, Codec
from d2f_stream.wire.topics import (
    NodeStatus,
    NodeStatusTopic,
    OperationTopic,
    RequestTopic,
    StreamState,
    StreamTopic,
    Topic,
    codec_of,
    decode,
    encode,
    operations_of,
    parse,
    streams_of,
)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.@:=-]{0,127}", fullmatch=True)
request_ids = st.from_regex(r"[A-Za-z0-9_-]{16,128}", fullmatch=True)
topics = st.one_of(
    st.builds(RequestTopic, names),
    st.builds(
        StreamTopic, names, request_ids, st.sampled_from(("events", "state", "drafts", "cancel"))
    ),
    st.builds(OperationTopic, names, names, request_ids),
    st.builds(NodeStatusTopic, names),
)
GOOD = "request-0123456789"


@given(topics)
def test_topic_is_read_back(topic: Topic) -> None:
    assert parse(str(topic)) == topic


@given(topics)
def test_topic_holds_nothing_that_a_broker_takes_for_a_pattern(topic: Topic) -> None:
    assert not set("+#$") & set(str(topic))
    assert "" not in str(topic).split("/")


@given(st.text(), st.sampled_from("/+#$\0\n "), st.text())
def test_name_that_reaches_into_other_topics_is_refused(left: str, sign: str, right: str) -> None:
    name = left + sign + right
    with pytest.raises(InvalidRequest, match="the client name is"):
        RequestTopic(name)
    with pytest.raises(InvalidRequest, match="the node name is"):
        operations_of(name)
    with pytest.raises(InvalidRequest, match="the client name is"):
        streams_of(name, "events")
    with pytest.raises(InvalidRequest, match="request_id is"):
        StreamTopic("client", name.ljust(16, "x"), "events")


@pytest.mark.parametrize("name", ["", "a" * 129, "-a", ".", "..", "naïve", "ａ"])
def test_unfit_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        NodeStatusTopic(name)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "d2f/v1",
        "d2f/v1/requests",
        "d2f/v1/requests/",
        "d2f/v1/requests/a/b",
        "d2f/v2/requests/a",
        "/d2f/v1/requests/a",
        f"d2f/v1/clients/a/{GOOD}/else",
        "d2f/v1/clients/a/short/events",
        f"d2f/v1/clients/+/{GOOD}/events",
        "d2f/v1/nodes/a/operations/b",
        "$SYS/broker",
    ],
)
def test_foreign_topic_means_nothing(topic: str) -> None:
    assert parse(topic) is None


@given(st.text())
def test_any_topic_can_be_looked_at(topic: str) -> None:
    parse(f"d2f/v1/{topic}")


@pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=lambda codec: codec.name)
def test_state_is_read_back(codec: Codec) -> None:
    state = StreamState(stream="s", request_id=GOOD, node="n", last_seq=3, text="naïve 🙂")
    assert decode(encode(state, codec), StreamState, codec) == state
    assert codec_of(codec.content_type) is codec


@given(st.binary(max_size=64))
def test_unreadable_status_is_a_protocol_error(data: bytes) -> None:
    for codec in (JSON, MSGPACK):
        with pytest.raises(ProtocolError, match="NodeStatus cannot be read"):
            decode(data, NodeStatus, codec)
