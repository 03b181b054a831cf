"""`d2f-stream serve` with a scripted model whose steps are as long as a small model's.

python tests/cluster/paced_server.py --port 0 --log valkey://127.0.0.1:6379
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.scripted import SCRIPTED_INFO, ByteCodec, ScriptedBackend
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.server.command import add_arguments, settings_of
from d2f_stream.server.serve import configure_logging, serve
from fakes import params

MAX_LEN = 200_000
STEP_S = 0.01


@dataclass(slots=True)
class PacedBackend(ScriptedBackend):
    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        time.sleep(STEP_S)
        return ScriptedBackend.step(self, rows)


async def _serve(args: argparse.Namespace) -> int:
    info = replace(SCRIPTED_INFO, max_len=MAX_LEN)
    backend = PacedBackend("on and " * MAX_LEN, info=info)
    async with LocalEngine.over(backend, ByteCodec(), defaults=params()) as engine:
        return await serve(engine, settings_of(args, {}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    configure_logging()
    sys.exit(asyncio.run(_serve(parser.parse_args())))
