"""A trial: does a backend work on this machine, on each of its devices?

Runs in a process of its own, so that a backend that crashes or is slow to import harms nobody; that
process is this module, run as `python -m d2f_stream.terminal.trial BACKEND`.
"""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

import msgspec

from d2f_runtime.backends.devices import devices_of
from d2f_stream.api import load
from d2f_stream.core.session import Engine

__all__ = ["Trial", "try_in_subprocess"]

TIMEOUT_S: Final = 180.0
PROBLEM: Final = "Ben has 12 apples. He buys 3 more apples. How many apples does Ben have now?"


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One backend on one device: did a block come out?"""

    backend: str
    device: str
    works: bool
    detail: str


def try_in_subprocess(backend: str) -> Sequence[Trial]:
    """Try a backend in a process of its own; a crash or a hang becomes a failed trial."""
    command = [sys.executable, "-m", "d2f_stream.terminal.trial", backend]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return msgspec.json.decode(done.stdout, type=list[Trial])
    except subprocess.TimeoutExpired:
        detail = f"no answer within {TIMEOUT_S:.0f} s"
    except msgspec.DecodeError:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        detail = f"crashed with exit code {done.returncode}: {lines[-1] if lines else 'no output'}"
    return [Trial(backend=backend, device="-", works=False, detail=detail)]


def _open(backend: str, device: str) -> AbstractAsyncContextManager[Engine]:
    """Open the embedded model, or for torch, whose weights do not ship, a tiny random one."""
    if backend != "torch":
        return load(None, backend=backend, device=device)
    from d2f_runtime.backends.scripted import EOS_ID, MASK_ID, ByteCodec
    from d2f_runtime.backends.torch_backend import TorchBackend
    from d2f_runtime.engine.local import LocalEngine
    from d2f_runtime.models.config import TransformerConfig
    from d2f_runtime.models.transformer import Transformer

    config = TransformerConfig(
        family="llada",
        vocab_size=MASK_ID + 1,
        num_tokens=EOS_ID + 1,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=64,
        mask_id=MASK_ID,
        eos_ids=(EOS_ID,),
    )
    model = TorchBackend(Transformer(config), name="random weights", device=device)
    return LocalEngine.over(model, ByteCodec())


async def _try(backend: str, device: str) -> Trial:
    began = time.monotonic()
    try:
        async with _open(backend, device) as engine:
            loaded = time.monotonic()
            name, max_new_tokens = engine.info.name, engine.defaults.block_size
            async with engine.generate(PROBLEM, max_new_tokens=max_new_tokens) as session:
                await session.result()
    except Exception as exc:  # whatever it is, it is the finding, and the next device is tried
        return Trial(backend=backend, device=device, works=False, detail=_one_line(exc))
    ready = time.monotonic()
    detail = f"{name}: loaded in {loaded - began:.2f} s, a block in {ready - loaded:.2f} s"
    if backend == "torch":
        detail += f"; models in bf16 take the {_step(device)}"
    return Trial(backend=backend, device=device, works=True, detail=detail)


def _step(device: str) -> str:
    """Say which step a model in bf16 would take there, and why."""
    import torch

    from d2f_runtime.backends.choice import DeviceFacts, choose_runner

    choice = choose_runner(DeviceFacts.of(torch.device(device)), quantization="bf16")
    kept = ""
    if choice.name == "fast":
        from d2f_runtime.kernels.compilation import kept_in

        with contextlib.suppress(ImportError):  # no Triton that tells
            kept = f"; compiled kernels are kept in {kept_in()}"
    return f"{choice.name} step: {choice.reason}{kept}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _main(backend: str) -> None:
    devices = [device for device in devices_of(backend) if ":" not in device]
    trials = [asyncio.run(_try(backend, device)) for device in devices]
    sys.stdout.buffer.write(msgspec.json.encode(trials))


if __name__ == "__main__":
    _main(sys.argv[1])
