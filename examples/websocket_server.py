"""Serves the default model from a program of your own, on a free port, until Ctrl-C.

The page, the websocket, OpenAI's API and the metrics are on one port, as with `d2f-stream serve`;
your program keeps the engine and can use it beside them. Needs the extras edge and serve.
"""

import asyncio

import d2f_stream
from d2f_stream.server.serve import Server, ServeSettings


async def main() -> None:
    """Say where it can be reached, and serve until it is interrupted."""
    async with d2f_stream.load() as engine, Server(engine, ServeSettings(port=0)) as server:
        print(f"open {server.url}, or connect to {server.url.replace('http', 'ws', 1)}", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            await server.shut_down(deadline_s=5.0)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("stopped")
