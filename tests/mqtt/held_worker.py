"""A worker in a process of its own, which stops in the middle of every answer."""

import asyncio
import sys

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.params import GenerationParams
from d2f_stream.server.mqtt.gateway import MqttGateway
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry


async def main(url: str) -> None:
    gate = StepGate()
    gate.let_through(6)
    backend = ScriptedBackend("It never comes to the end of this answer.", gate=gate)
    defaults = GenerationParams(block_size=8, max_new_tokens=128)
    async with LocalEngine.over(backend, ByteCodec(), defaults=defaults) as engine:
        registry = StreamRegistry(engine)
        hello = Gateway(registry).hello
        await MqttGateway(registry, url, hello=hello, will_delay_s=0).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
