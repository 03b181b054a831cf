"""A worker in a process of its own, which stops in the middle of every answer."""

import asyncio
import sys
from contextlib import AsyncExitStack

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.params import GenerationParams
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.mqtt.gateway import MqttGateway
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.log import StreamLog
from d2f_stream.server.streams.registry import StreamRegistry


async def main(url: str, log_url: str = "") -> None:
    gate = StepGate()
    gate.let_through(6)
    backend = ScriptedBackend("It never comes to the end of this answer.", gate=gate)
    defaults = GenerationParams(block_size=8, max_new_tokens=128)
    async with (
        AsyncExitStack() as stack,
        LocalEngine.over(backend, ByteCodec(), defaults=defaults) as engine,
    ):
        log: StreamLog | None = None
        if log_url:
            from d2f_stream.server.streams.valkey.log import ValkeyLog

            shared = ValkeyLog(log_url, ServeLimits(), lease_s=0.4)
            log = await stack.enter_async_context(shared)
        registry = StreamRegistry(engine, log=log)
        hello = Gateway(registry).hello
        await MqttGateway(registry, url, hello=hello, will_delay_s=0).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
