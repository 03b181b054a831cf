"""Asks a worker behind an MQTT broker, as a device would, and prints the blocks as they come.

Start a broker and a worker first:

    mosquitto -p 1883
    d2f-stream serve --mqtt mqtt://127.0.0.1:1883

The connection may break and the broker may be restarted meanwhile: the answer still comes whole.
With users at the broker, the address is mqtt://user:password@host:port.
"""

import asyncio
import os

import d2f_stream

BROKER = os.environ.get("BROKER", "mqtt://127.0.0.1:1883")
MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]


async def main() -> None:
    """Print each block as it becomes final."""
    async with d2f_stream.connect(BROKER) as engine:
        print(f"{engine.info.name} answers:", flush=True)
        async for block in engine.generate(MESSAGES):
            print(block.text, end="", flush=True)
        print()


asyncio.run(main())
