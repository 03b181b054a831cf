"""A Ray cluster of this machine with engines of a scripted model, in a process of its own.

python tests/ray_engines.py APP FOLDER LOG REPLICAS: says where it is, and ends with its input.
"""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from scripted_folder import write_model

START_S = 90.0


@dataclass(frozen=True)
class RayEngines:
    """Engines of one application.

    Attributes:
        url: for `serve --engines`.
        app: its name.
        environment: for processes that join the cluster.
    """

    url: str
    app: str
    environment: dict[str, str]

    def pids(self) -> list[int]:
        """Of the replicas that live."""
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True)
        lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
        return [int(pid) for pid, args in lines if f"ServeReplica:{self.app}:" in args]

    def kill_one(self) -> None:
        os.kill(self.pids()[0], signal.SIGKILL)

    async def wait_alive(self, number: int) -> None:
        async with asyncio.timeout(START_S):
            while len(self.pids()) < number:  # noqa: ASYNC110 - processes tell nobody
                await asyncio.sleep(0.1)


@asynccontextmanager
async def ray_engines(folder: Path, log: str, *, replicas: int = 2) -> AsyncIterator[RayEngines]:
    """Start a cluster with engines, which end with the context."""
    app = f"d2f-{os.getpid()}"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),  # or Ray writes one into the user's home
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, app, str(folder), log, str(replicas)),
        stdin=PIPE,
        stdout=PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(START_S):
            address = ""
            while not address.startswith("engines at "):
                address = (await process.stdout.readline()).decode()
                assert address, "the cluster did not start"
        yield RayEngines(f"ray://{address.split()[-1]}/{app}", app, environment)
    finally:
        process.stdin.close()
        async with asyncio.timeout(START_S):
            await process.wait()


def write_paced_model(folder: Path, answer: str, *, step_ms: float) -> Path:
    """Write a scripted model whose steps take their time."""
    script = json.dumps({"answers": answer, "step_ms": step_ms}).encode()
    digest = {"sha256": hashlib.sha256(script).hexdigest(), "bytes": len(script)}
    folder.mkdir()
    write_model(folder, files={"script.json": digest}, defaults={"cpu": {"max_new_tokens": 256}})
    (folder / "script.json").write_bytes(script)
    return folder


def main(app_name: str, folder: str, log: str, replicas: str) -> None:
    import ray
    from ray import serve

    from d2f_stream.cluster.deployment import Engine
    from d2f_stream.cluster.opening import checked

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        object_store_memory=80_000_000,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    serve.start(proxy_location="Disabled")
    options = {"num_replicas": int(replicas), "ray_actor_options": {"num_cpus": 0.1}}
    settings = {"model": folder, "backend": "scripted"} | ({"log": log} if log else {})
    bound = Engine.options(**options).bind(checked(settings))  # type: ignore[attr-defined]
    serve.run(bound, name=app_name, route_prefix=None)
    sys.stdout.write(f"engines at {ray.get_runtime_context().gcs_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
