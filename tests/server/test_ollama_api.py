"""Ollama's API: its own client, and the requests that chat UIs make at their start."""

import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
import ollama
import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine import LocalEngine
from d2f_stream import NoChatTemplate, __version__
from d2f_stream.server.app import create_app
from d2f_stream.server.auth import Auth
from d2f_stream.server.ollama.requests import CHAT, GENERATE, OPTIONS
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry

TOKEN = "a-token-of-32-characters-at-least"
TEXT = "Six and two make eight."


class Server:
    """An application over a scripted model, and clients of it without sockets."""

    def __init__(self, backend: ScriptedBackend, codec: ByteCodec, auth: Auth) -> None:
        self.backend = backend
        self.engine = LocalEngine.over(backend, codec)
        self._auth = auth

    async def __aenter__(self) -> "Server":
        await self.engine.__aenter__()
        self.registry = StreamRegistry(self.engine)
        self.app = create_app(Gateway(self.registry, auth=self._auth), ui=True)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.registry.shut_down(10.0)
        await self.engine.__aexit__(None, None, None)
        assert not self.backend.open_slots

    def client(self, token: str | None = None) -> ollama.AsyncClient:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = httpx.ASGITransport(app=self.app)
        return ollama.AsyncClient(host="http://test", transport=transport, headers=headers)

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app), base_url="http://test"
        )


def serving(
    text: str = TEXT, *, codec: ByteCodec | None = None, tokens: Mapping[str, str] | None = None
) -> Server:
    return Server(ScriptedBackend(text), codec or ByteCodec(), Auth(dict(tokens or {})))


QUESTION = [{"role": "user", "content": "How many?"}]


async def test_chat_streams_a_line_a_block_and_figures_at_the_end() -> None:
    async with serving() as server:
        stream: AsyncIterator[Any] = await server.client().chat("d2f", QUESTION, stream=True)
        parts = [part async for part in stream]
    assert "".join(part.message.content for part in parts) == TEXT
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("stop", len(TEXT) + 1)
    assert parts[-1].total_duration >= parts[-1].eval_duration >= 0


async def test_chat_and_generate_answer_whole() -> None:
    async with serving() as server:
        client = server.client()
        answer = await client.chat("scripted", QUESTION)
        assert answer.message.content == TEXT
        assert (await client.generate("d2f", "How many?")).response == TEXT


async def test_template_and_system_are_used_unless_raw() -> None:
    asked: list[str] = []

    class Codec(ByteCodec):
        def render(self, messages: Sequence[Mapping[str, str]]) -> str:
            asked.append("+".join(message["role"] for message in messages))
            return super().render(messages)

    async with serving(codec=Codec()) as server:
        client = server.client()
        await client.generate("d2f", "How many?", system="Be brief.")
        await client.generate("d2f", "How many?", raw=True)
    assert asked == ["system+user"]


async def test_model_without_a_template_generates_from_the_prompt() -> None:
    class Plain(ByteCodec):
        def render(self, messages: Sequence[Mapping[str, str]]) -> str:
            raise NoChatTemplate("the model has no chat template")

    async with serving(codec=Plain()) as server:
        assert (await server.client().generate("d2f", "How many?")).response == TEXT
        with pytest.raises(ollama.ResponseError, match="no chat template") as caught:
            await server.client().chat("d2f", QUESTION)
        assert caught.value.status_code == 400


async def test_options_are_obeyed() -> None:
    async with serving() as server:
        client = server.client()
        cut = await client.chat("d2f", QUESTION, options={"num_predict": 3})
        assert (cut.message.content, cut.done_reason) == (TEXT[:3], "length")
        stopped = await client.chat("d2f", QUESTION, options={"stop": [" and"], "num_ctx": 4096})
        assert stopped.message.content == "Six"
        whole = await client.chat("d2f", QUESTION, options={"num_predict": -1, "seed": -1})
        assert whole.message.content == TEXT


async def test_turns_with_tools_are_accepted_as_history() -> None:
    messages: Any = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "4", "tool_name": "add"},
    ]
    prompt = (
        'user: How many?\nassistant: <tool_call>\n{"name":"add","arguments":{"a":1}}\n'
        "</tool_call>\nuser: <tool_response>\n4\n</tool_response>\nassistant: "
    )
    server = Server(ScriptedBackend({prompt: TEXT}), ByteCodec(), Auth({}))
    async with server:
        assert (await server.client().chat("d2f", messages)).message.content == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_those_of_the_committed_tokens(stream: bool) -> None:
    backend = ScriptedBackend(TEXT, confidence=lambda position, step: 1 / (position + 2))
    async with Server(backend, ByteCodec(), Auth({})) as server:
        client, parts = server.client(), []
        if stream:
            lines: AsyncIterator[Any] = await client.chat(
                "d2f", QUESTION, stream=True, logprobs=True
            )
            parts = [part.logprobs async for part in lines if part.logprobs]
        else:
            parts = [(await client.generate("d2f", "How many?", logprobs=True)).logprobs]
    tokens = [token for part in parts for token in part]
    assert "".join(token.token for token in tokens) == TEXT
    assert [t.logprob for t in tokens] == [math.log(1 / (at + 2)) for at in range(len(TEXT))]


@pytest.mark.parametrize(
    ("path", "change", "named"),
    [
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"format": "json"}, "format"),
        ("chat", {"think": True}, "think"),
        ("chat", {"options": {"top_k": 40}}, "options.top_k"),
        ("chat", {"options": {"heat": 1}}, "options.heat"),
        ("chat", {"noise": 1}, "noise"),
        ("chat", {"messages": [{"role": "user", "content": "?", "images": ["x"]}]}, "images"),
        ("chat", {"messages": [{"role": "critic", "content": "?"}]}, "critic"),
        ("generate", {"suffix": "end"}, "suffix"),
        ("generate", {"raw": True, "system": "?"}, "system"),
        ("generate", {"options": {"temperature": -1}}, "temperature"),
        ("generate", {"prompt": 3}, "prompt"),
    ],
)
async def test_what_is_not_done_is_refused_by_name(
    path: str, change: dict[str, Any], named: str
) -> None:
    body = {"model": "d2f", "prompt": "?"} if path == "generate" else {"messages": QUESTION}
    async with serving() as server, server.http() as http:
        answer = await http.post(f"/api/{path}", json={**body, **change})
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert set(answer.json()) == {"error"}


def test_every_field_that_ollama_documents_is_known() -> None:
    documented = {
        "model",
        "messages",
        "tools",
        "format",
        "options",
        "stream",
        "keep_alive",
        "think",
    }
    assert documented <= set(CHAT)
    more = {"prompt", "suffix", "images", "system", "template", "raw", "context"}
    assert (documented - {"messages", "tools"}) | more <= set(GENERATE)
    assert set(ollama.Options.model_fields) - {"numa"} <= set(OPTIONS) | {
        "logits_all",
        "embedding_only",
    }


async def test_what_clients_ask_first() -> None:
    async with serving() as server, server.http() as http:
        listed = await server.client().list()
        assert [model.model for model in listed.models] == ["scripted"]
        shown = await server.client().show("scripted")
        assert shown.capabilities == ["completion"]
        assert (await http.get("/api/version")).json() == {"version": __version__}
        assert (
            (await http.post("/api/pull", json={"model": "x"}))
            .json()["error"]
            .endswith("not found")
        )
        assert (await http.post("/api/generate", json={"model": "d2f"})).json()[
            "done_reason"
        ] == "load"
        with pytest.raises(ollama.ResponseError, match="model 'other' not found") as caught:
            await server.client().show("other")
        assert caught.value.status_code == 404


async def test_token_is_asked_for() -> None:
    async with serving(tokens={"ann": TOKEN}) as server:
        with pytest.raises(ollama.ResponseError, match="no token") as caught:
            await server.client().list()
        assert caught.value.status_code == 401
        assert (await server.client(TOKEN).chat("d2f", QUESTION)).message.content == TEXT


async def test_unreadable_bodies_are_refused() -> None:
    async with serving() as server, server.http() as http:
        for body in (b"{", b"[]", b"\xff", b"[" * 100_000, json.dumps({"messages": 3}).encode()):
            answer = await http.post("/api/chat", content=body)
            assert answer.status_code == 400, body[:10]
            assert answer.json()["error"]


async def test_failure_amid_an_answer_is_the_last_line() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 60, gate=gate, errors={2: RuntimeError("broken")})
    gate.open()
    server = Server(backend, ByteCodec(), Auth({}))
    await server.engine.__aenter__()
    server.registry = StreamRegistry(server.engine)
    server.app = create_app(Gateway(server.registry, auth=Auth({})))
    async with server.http() as http:
        answer = await http.post("/api/chat", json={"messages": QUESTION})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert "broken" in lines[-1]["error"]
    await server.registry.shut_down(10.0)
    await server.engine.__aexit__(None, None, None)
