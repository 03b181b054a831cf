"""Asks a server, as `d2f-stream serve` starts one, and prints each block as it arrives.

The engine of `connect` is used like a local one. If the connection breaks, it is made again and the
answer goes on where it broke off; leaving the loop early ends the answer on the server too. The
address is the first argument; a server that wants a token gets it from `connect(..., token=...)`.
"""

import asyncio
import sys

import d2f_stream

MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]


async def main(url: str) -> None:
    """Say what answers, then print its answer."""
    try:
        async with d2f_stream.connect(url) as engine:
            print(f"{engine.info.name} answers at {url}")
            async for block in engine.generate(MESSAGES):
                print(block.text, end="", flush=True)
            print()
    except d2f_stream.ConnectionLost as error:
        sys.exit(f"{error}\nStart a server with: d2f-stream serve")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000"))
