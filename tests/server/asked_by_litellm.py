"""Asks a server by LiteLLM and prints what came, as JSON; a program of its own.

Importing LiteLLM takes seconds, and it leaves sockets behind.
"""

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network

import litellm


def main() -> None:
    address = sys.argv[1]
    report = {
        "openai": ask(model="openai/d2f", api_base=f"{address}/v1"),
        "ollama": ask(model="ollama_chat/d2f", api_base=address),
    }
    print(json.dumps(report))


def ask(**where: str) -> dict[str, Any]:
    call: Any = {**where, "api_key": "unused", "messages": [{"role": "user", "content": "hi"}]}
    whole = litellm.completion(**call)
    streamed = [part.choices[0].delta.content for part in litellm.completion(**call, stream=True)]
    try:
        refusal = litellm.completion(**call, temperature=-1, max_retries=0)
    except Exception as error:
        refusal = f"{type(error).__name__}: {error}"
    return {
        "text": whole.choices[0].message.content,
        "finish_reason": whole.choices[0].finish_reason,
        "num_tokens": whole.usage.completion_tokens,
        "streamed": [part for part in streamed if part],
        "streamed_to_coroutine": asyncio.run(stream(call)),
        "refusal": refusal,
    }


async def stream(call: Any) -> str:
    parts = await litellm.acompletion(**call, stream=True)
    return "".join([part.choices[0].delta.content or "" async for part in parts])


if __name__ == "__main__":
    main()
