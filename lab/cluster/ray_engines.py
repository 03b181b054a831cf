"""A Ray cluster of this machine with engines of a scripted model, in a process of its own.

python -m lab.cluster.ray_engines APP MODEL LOG REPLICAS: says where it is, ends with its input.
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
from typing import Final

MODULE: Final = "lab.cluster.ray_engines"
START_S: Final = 90.0


@dataclass(frozen=True)
class RayEngines:
    """Engines of one application.

    Attributes:
        url: for `serve --engines`.
        app: its name.
        pid: of the process that started the cluster.
        environment: for processes that join the cluster.
    """

    url: str
    app: str
    pid: int
    environment: dict[str, str]

    def pids(self) -> list[int]:
        """Of the replicas that live."""
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True)
        lines = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
        return [int(pid) for pid, args in lines if f"ServeReplica:{self.app}:" in args]

    def kill_one(self, *, number: int = 0) -> None:
        """Kill one of them; which is a number, taken in turn."""
        pids = self.pids()
        os.kill(pids[number % len(pids)], signal.SIGKILL)

    def kill_head(self) -> None:
        """Kill the process in which Ray keeps what there is in the cluster."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,comm"], capture_output=True, text=True)
        for line in listed.stdout.splitlines()[1:]:
            pid, parent, name = line.split(maxsplit=2)
            if int(parent) == self.pid and name.startswith("gcs_server"):
                os.kill(int(pid), signal.SIGKILL)
                return
        raise RuntimeError("this cluster has no head")

    async def wait_alive(self, number: int) -> None:
        """Wait until there are so many."""
        async with asyncio.timeout(START_S):
            while len(self.pids()) < number:  # noqa: ASYNC110 - processes tell nobody
                await asyncio.sleep(0.1)


@asynccontextmanager
async def ray_engines(
    model: Path | None, log: str = "", *, replicas: int = 2
) -> AsyncIterator[RayEngines]:
    """Start a cluster with engines, which end with the context.

    Args:
        model: a folder; None is the embedded model.
        log: URL of the log; without one, answers come back over the handle.
        replicas: how many engines.

    Raises:
        RuntimeError: the cluster did not start.
    """
    app = f"d2f-{os.getpid()}"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),  # or Ray writes one into the user's home
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", MODULE, app, str(model or ""), log, str(replicas)),
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
                if not address:
                    raise RuntimeError("the cluster did not start")
        yield RayEngines(f"ray://{address.split()[-1]}/{app}", app, process.pid, environment)
    finally:
        process.stdin.close()
        async with asyncio.timeout(START_S):
            await process.wait()


def write_paced_model(
    folder: Path, answer: str, *, step_ms: float, prompt_attention: str = "full"
) -> Path:
    """Write a scripted model whose steps take their time."""
    told = {"answers": answer, "step_ms": step_ms, "prompt_attention": prompt_attention}
    script = json.dumps(told).encode()
    digest = {"sha256": hashlib.sha256(script).hexdigest(), "bytes": len(script)}
    sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    manifest = {
        "format_version": 1,
        "name": "paced",
        "family": "scripted",
        "mask_id": 257,
        "eos_ids": [256],
        "shift_logits": False,
        "prompt_attention": prompt_attention,
        "native_block_size": 8,
        "max_block_size": 64,
        "max_len": 4096,
        "vocab_size": 257,
        "transformer": dict.fromkeys(sizes, 1),
        "defaults": {"cpu": {"max_new_tokens": 256, "block_size": 8}},
        "files": {"script.json": digest},
    }
    folder.mkdir()
    (folder / "script.json").write_bytes(script)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def main(app_name: str, model: str, log: str, replicas: str) -> None:
    """Run the cluster until the input ends."""
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
    options |= {"max_ongoing_requests": 200}
    settings = {name: value for name, value in (("model", model), ("log", log)) if value}
    bound = Engine.options(**options).bind(checked(settings))  # type: ignore[attr-defined]
    serve.run(bound, name=app_name, route_prefix=None)
    sys.stdout.write(f"engines at {ray.get_runtime_context().gcs_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
