"""The access rules of examples/: over MQTT, the broker keeps clients apart."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers import Device, Mosquitto, text_of, worker
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.client.mqtt_line import connect_mqtt
from d2f_stream.core.errors import ConnectionLost, Unauthorized
from d2f_stream.wire.protocol import Generate, Overrides
from d2f_stream.wire.topics import RequestTopic, StreamTopic, streams_of
from fakes import ANSWER
from requirements import require_program

pytestmark = [pytest.mark.mqtt, pytest.mark.usefixtures("nothing_left")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REQUEST = "request-0123456789"
PASSWORDS = {"worker": "w-secret", "alice": "a-secret", "bob": "b-secret"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker with the example's own settings, but for port and paths."""
    folder = tmp_path_factory.mktemp("guarded")
    passwords = folder / "passwords"
    program = require_program("mosquitto_passwd")
    for number, (user, password) in enumerate(PASSWORDS.items()):
        options = ["-b", *(["-c"] if number == 0 else [])]
        subprocess.run([program, *options, str(passwords), user, password], check=True)
    (folder / "mosquitto.acl").write_text((EXAMPLES / "mosquitto.acl").read_text())
    settings = (EXAMPLES / "mosquitto.conf").read_text()
    replaced = ("listener ", "persistence", "autosave_interval")
    lines = [line for line in settings.splitlines() if not line.startswith(replaced)]
    text = "\n".join(lines)
    for name in ("passwords", "mosquitto.acl"):
        text = text.replace(f"_file {name}", f"_file {folder / name}")
    broker = Mosquitto(folder, lines=[text])
    broker.start()
    yield broker
    broker.stop()


def url(broker: Mosquitto, user: str) -> str:
    return f"mqtt://{user}:{PASSWORDS[user]}@127.0.0.1:{broker.port}"


def device(broker: Mosquitto, user: str) -> Device:
    return Device(broker, user, username=user, password=PASSWORDS[user])


async def test_each_user_gets_its_own_answers(guarded: Mosquitto) -> None:
    async with (
        worker(url(guarded, "worker"), ScriptedBackend({"a": ANSWER, "b": "for Bob"})),
        connect_mqtt(url(guarded, "alice")) as alice,
        connect_mqtt(f"mqtt://bob@127.0.0.1:{guarded.port}", token="b-secret") as bob,
    ):
        assert (await alice.generate("a").result()).text == ANSWER
        assert (await bob.generate("b").result()).text == "for Bob"


async def test_user_cannot_read_what_another_gets(guarded: Mosquitto) -> None:
    async with (
        worker(url(guarded, "worker"), ScriptedBackend(ANSWER), group="hard-to-guess"),
        device(guarded, "alice") as alice,
        device(guarded, "bob") as bob,
    ):
        await bob.subscribe("d2f/v1/clients/#", "d2f/v1/requests/#", "$share/d2f/d2f/v1/requests/+")
        await bob.subscribe(streams_of("alice", "events"), streams_of("alice", "state"))
        await alice.subscribe(streams_of("alice", "events"))
        await alice.send(RequestTopic("alice"), Generate(request_id=REQUEST, prompt="hi"))
        assert text_of(await alice.events()) == ANSWER
        params = Overrides(max_new_tokens=8)
        request = Generate(request_id=REQUEST, prompt="hi", params=params)
        await bob.send(RequestTopic("bob"), request)
        topics = [(await bob.receive()).topic.value for _ in range(4)]
    # Alice's came first, so had Bob been able to read them, they would stand before his own.
    assert {topic.split("/")[3] for topic in topics} == {"bob"}


async def test_user_cannot_ask_or_cancel_in_the_name_of_another(guarded: Mosquitto) -> None:
    async with (
        worker(url(guarded, "worker"), ScriptedBackend(ANSWER)) as one,
        connect_mqtt(url(guarded, "bob"), client="alice") as pretender,
    ):
        with pytest.raises(Unauthorized, match="does not let 'alice' publish to d2f/v1/requests"):
            await pretender.generate("hi").result()
        assert one.backend.num_opened == 0


async def test_user_cannot_pass_for_a_worker(guarded: Mosquitto) -> None:
    async with device(guarded, "alice") as alice, device(guarded, "bob") as bob:
        await alice.subscribe(streams_of("alice", "events"), "d2f/v1/nodes/+/status")
        topic = StreamTopic("alice", REQUEST, "events")
        await bob.publish(topic, b"forged")
        await bob.publish("d2f/v1/nodes/forged/status", b"forged")
        async with worker(url(guarded, "worker"), ScriptedBackend(ANSWER), node="genuine"):
            while b"genuine" not in (message := (await alice.receive())).payload:
                assert b"forged" not in message.payload


@pytest.mark.parametrize("password", ["wrong", None])
async def test_wrong_password_is_said_without_showing_it(
    guarded: Mosquitto, password: str | None
) -> None:
    engine = connect_mqtt(f"mqtt://alice@127.0.0.1:{guarded.port}", token=password)
    with pytest.raises(Unauthorized, match="does not let us in") as caught:
        async with engine:
            pass
    assert "wrong" not in str(caught.value)
    assert not engine.usable


async def test_request_outside_async_with_learns_of_the_wrong_password(guarded: Mosquitto) -> None:
    engine = connect_mqtt(f"mqtt://alice:wrong@127.0.0.1:{guarded.port}")
    with pytest.raises(Unauthorized, match="does not let us in"):
        await engine.generate("hi").result()
    await engine.close()


async def test_worker_with_a_wrong_password_goes_on_trying(
    guarded: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="d2f_stream.mqtt"), pytest.raises(ConnectionLost):
        async with connect_mqtt(url(guarded, "alice"), connect_timeout_s=0.3):
            pass
    assert "a-secret" not in caplog.text
