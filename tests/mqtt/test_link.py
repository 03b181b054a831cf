import asyncio
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from brokers import Device, Mosquitto, brief, worker
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.channels.broker import BrokerAddress, Incoming, LinkDown, Outgoing
from d2f_stream.channels.mqtt import BrokerLink
from d2f_stream.client.mqtt_line import connect_mqtt
from d2f_stream.core.errors import ConnectionLost, InvalidRequest
from fakes import ANSWER
from requirements import require_program

SECRET = "p%40ss/word"


def test_address_is_read() -> None:
    plain = BrokerAddress.parse("mqtt://broker")
    assert (plain.host, plain.port, plain.tls, plain.username) == ("broker", 1883, False, None)
    full = BrokerAddress.parse(f"mqtts://al%20ice:{SECRET.replace('/', '%2F')}@[::1]:99/")
    assert (full.host, full.port, full.tls) == ("::1", 99, True)
    assert (full.username, full.password) == ("al ice", "p@ss/word")
    assert str(full) == "mqtts://[::1]:99"
    assert BrokerAddress.parse("mqtt://alice@host", password="given").password == "given"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker",
        "http://alice:secret@broker",
        "mqtt://alice:secret@",
        "mqtt://alice:secret@broker:port",
        "mqtt://alice:secret@broker:99999",
        "mqtt://alice:secret@broker/path",
        "mqtt://:secret@broker",
        "mqtt://alice:secret@[::1",
    ],
)
def test_unfit_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        BrokerAddress.parse(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_address_shows_no_credentials() -> None:
    address = BrokerAddress.parse("mqtt://alice:secret@broker")
    assert "secret" not in f"{address} {address!r}"
    assert "alice" not in f"{address} {address!r}"


class Listener:
    """Notes what a link tells."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.reasons: list[str] = []
        self.num_connections = 0
        self.changed = asyncio.Condition()

    def on_connected(self) -> None:
        self.num_connections += 1

    async def on_message(self, message: Incoming) -> None:
        self.messages.append(message.payload)

    def on_lost(self, reason: str, *, refused: bool) -> None:
        self.reasons.append(reason)

    def on_refused(self, message: Outgoing, reason: str) -> None:
        raise AssertionError(reason)


def link_to(broker: Mosquitto, user: Listener, *, max_inbox: int = 100) -> BrokerLink:
    return BrokerLink(
        BrokerAddress.parse(broker.url),
        user,
        identifier="link",
        subscriptions=[("flood/+", 1)],
        session_expiry_s=60,
        sleep=brief,
        max_inbox=max_inbox,
    )


@pytest.mark.mqtt
async def test_link_that_is_flooded_connects_anew_instead_of_losing_silently(
    mosquitto: Mosquitto,
) -> None:
    listener = Listener()
    link = link_to(mosquitto, listener, max_inbox=1)
    running = asyncio.create_task(link.run())
    await link.wait_connected()
    async with Device(mosquitto, "flooder") as flooder:
        while listener.num_connections < 2:
            for number in range(50):
                link.post(number, Outgoing("flood/x", b"x" * 10, qos=0))
            await flooder.publish("flood/y", b"y")
            await link.flush()
    running.cancel()
    await asyncio.wait((running,))
    assert any("1 messages waited" in reason for reason in listener.reasons)


@pytest.mark.mqtt
async def test_messages_are_published_once_the_broker_is_there(
    make_broker: Callable[..., Mosquitto],
) -> None:
    broker = make_broker()
    listener = Listener()
    link = link_to(broker, listener)
    running = asyncio.create_task(link.run())
    link.post("a", Outgoing("flood/a", b"old"))
    link.post("a", Outgoing("flood/a", b"new"))
    link.post("b", Outgoing("flood/b", b"withdrawn"))
    link.withdraw("b")
    with pytest.raises(LinkDown):
        await link.publish(Outgoing("flood/c", b"at once"))
    broker.start()
    await link.flush()
    async with Device(broker, "echo") as echo:
        await echo.publish("flood/end", b"end")
        while b"end" not in listener.messages:
            await echo.publish("flood/end", b"end")
    running.cancel()
    await asyncio.wait((running,))
    assert listener.messages[:2] == [b"new", b"end"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate that signs itself, for the loopback; its key lies beside it."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    openssl = [require_program("openssl"), "req", "-x509", "-nodes", "-newkey", "ec"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    kind = ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run([*openssl, *kind, *files, *names], check=True, capture_output=True)
    return certificate


@pytest.mark.mqtt
async def test_tls_with_a_certificate_of_our_own(
    make_broker: Callable[..., Mosquitto], certificate: Path
) -> None:
    key = certificate.with_name("key")
    settings = [f"certfile {certificate}", f"keyfile {key}", "allow_anonymous true"]
    broker = make_broker(lines=settings)
    broker.start()
    url = broker.url.replace("mqtt:", "mqtts:")
    trusted = ssl.create_default_context(cafile=str(certificate))
    async with (
        worker(url, ScriptedBackend(ANSWER), tls=trusted),
        connect_mqtt(url, tls=trusted) as engine,
    ):
        assert (await engine.generate("hi").result()).text == ANSWER
    with pytest.raises(ConnectionLost, match="certificate verify failed"):
        async with connect_mqtt(url):
            pass
