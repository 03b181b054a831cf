"""Talks to a server with OpenAI's own client: pip install openai, then d2f-stream serve.

Each chunk of a streamed answer is a whole block, final when it comes. With `diffusing` every chunk
holds the whole text as it stands, drafts included, and replaces the one before.
"""

import asyncio
import os

import openai

URL = os.environ.get("D2F_URL", "http://127.0.0.1:8000/v1")
TOKEN = os.environ.get("D2F_TOKEN", "none-needed")
QUESTION = "Why is the sky blue?"


async def main() -> None:
    """Ask for the answer block by block, then watch it being denoised."""
    async with openai.AsyncOpenAI(base_url=URL, api_key=TOKEN) as client:
        chunks = await client.chat.completions.create(
            model="d2f",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in chunks:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            elif chunk.usage is not None:
                print(f"\n({chunk.usage.completion_tokens} tokens)\n")
        drafts = await client.chat.completions.create(
            model="d2f",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            extra_body={"diffusing": True},
        )
        async for chunk in drafts:
            print(repr(chunk.choices[0].delta.content or ""))


asyncio.run(main())
