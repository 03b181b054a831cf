"""The requests that chat UIs make: at their start, for an answer, for a title. Shapes as of 2026.

Open WebUI: backend/open_webui/routers/{openai,ollama,tasks}.py. LibreChat: its page on default
parameters. Continue: its OpenAI provider. LiteLLM 1.110.2: as recorded; it takes 200 MB, which the
tests' environment has better uses for, so that its documented example runs only where it is there.
"""

from typing import Any

import httpx
import pytest

from d2f_stream.server.auth import Auth
from fakes import ANSWER
from serving import serving

TOKEN = "sk-a-token-of-enough-characters"
QUESTION = [{"role": "user", "content": "How many?"}]
USER = {
    "X-OpenWebUI-User-Name": "Ann%20B.",
    "X-OpenWebUI-User-Id": "8f1",
    "X-OpenWebUI-User-Email": "ann@example.com",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "c-1",
}
TITLE: dict[str, Any] = {
    "model": "scripted",
    "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title ..."}],
    "stream": False,
}


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/api/ps", "/api/version"])
async def test_open_webui_finds_the_server(path: str) -> None:
    async with serving(auth=Auth({"webui": TOKEN})) as server:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **USER}
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            response = await client.get(path, headers=headers)
    assert response.status_code == 200
    names = response.json().get("data", response.json().get("models", []))
    assert path == "/api/version" or len(names) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**TITLE, "max_completion_tokens": 1000}),
        ("/v1/chat/completions", {**TITLE, "max_tokens": 1000}),
        ("/api/chat", {**TITLE, "model": "scripted:latest", "options": {"num_predict": 1000}}),
        (
            "/v1/chat/completions",  # LibreChat
            {
                "model": "d2f", "messages": QUESTION, "temperature": 1, "top_p": 1,
                "presence_penalty": 0, "frequency_penalty": 0, "user": "65f", "stream": False,
            },
        ),
        (
            "/v1/chat/completions",  # Continue
            {"model": "d2f", "messages": QUESTION, "max_tokens": 2048, "stream": False, "stop": []},
        ),
        ("/v1/chat/completions", {"model": "d2f", "messages": QUESTION}),  # LiteLLM
    ],
)  # fmt: skip
async def test_chat_uis_get_answers_and_titles(path: str, body: dict[str, Any]) -> None:
    async with (
        serving() as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        response = await client.post(path, json=body)
    answer = response.json()
    message = answer["choices"][0]["message"] if "choices" in answer else answer["message"]
    assert (response.status_code, message["content"]) == (200, ANSWER)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_answers_stream_to_open_webui(path: str) -> None:
    body: dict[str, Any] = {"model": "scripted", "messages": QUESTION, "stream": True}
    body |= {"options": {}, "keep_alive": "5m"} if path == "/api/chat" else {}
    body |= {} if path == "/api/chat" else {"stream_options": {"include_usage": True}}
    async with (
        serving() as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        response = await client.post(path, json=body, headers=USER)
    lines = [line for line in response.text.splitlines() if line]
    assert response.status_code == 200
    assert len(lines) > 3
