"""Two processes that hold a share of the weights each, on a CPU."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its own name

from d2f_export.distill.corruption import BlockNoise, noise_generator
from d2f_export.distill.feed import Batch
from d2f_export.distill.run import distiller_of
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.student import trainable
from d2f_export.distill.trainer import Trainer, is_sharded, open_accelerator, resolve
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from tiny_models import CONFIGS, MASK, tiny_model

pytest.importorskip("accelerate")
pytest.importorskip("peft")

pytestmark = pytest.mark.torch

LAUNCHER = {  # what accelerate's launcher tells each process
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Layer",
    "MASTER_ADDR": "127.0.0.1",
    "WORLD_SIZE": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",  # there is a store already
}


def shard_on_the_cpu() -> None:
    """Let accelerate shard here too; on a CPU it takes the launcher's word for GPUs alone."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    begin = AcceleratorState.__init__

    def begin_sharded(self: AcceleratorState, *given: Any, **named: Any) -> None:
        is_first = not self._shared_state
        begin(self, *given, **named)
        if is_first:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = named["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded


def one_micro_batch(rank: int, port: int, folder: Path) -> None:
    """Take the first of three micro-batches, and look at the gradients."""
    torch.set_num_threads(1)
    os.environ |= {**LAUNCHER, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    shard_on_the_cpu()
    settings = DistillSettings(model=str(folder), data=("none",), accumulation=3, lora_rank=2)
    accelerator = open_accelerator(settings, cpu=True)
    assert is_sharded(accelerator)
    compute = resolve(settings, "cpu")
    distiller = distiller_of(settings, load_checkpoint(folder), None, compute=compute)
    trainer = Trainer(settings, distiller, accelerator=accelerator)
    tokens = torch.randint(5, 140, (1, 64), generator=torch.Generator().manual_seed(rank))
    given = Batch(tokens, torch.tensor([9]))
    batch = BlockNoise().draw(given, noise_generator(0, 0, rank), mask_id=MASK)
    with accelerator.accumulate(trainer.distiller):
        accelerator.backward(trainer.distiller(batch))
        assert not accelerator.sync_gradients  # two more come before the optimiser's step
    missing = [name for name, p in trainable(trainer.distiller).items() if p.grad is None]
    assert not missing, f"not reduced: {missing}"
    accelerator.end_training()


def test_shards_reduce_their_gradients_after_each_micro_batch(tmp_path: Path) -> None:
    """Kept until the last one, they led to wrong heads on GPUs; see open_accelerator."""
    save_checkpoint(tmp_path, tiny_model(CONFIGS["llada"]))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["d2f_export.distill.run", "peft", "torch.distributed.fsdp"])
    processes = [
        context.Process(target=one_micro_batch, args=(rank, store.port, tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
