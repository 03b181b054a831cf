"""How much memory loading takes beside the model itself, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llada2_oracle import LLaDA2
from tiny_checkpoints import (
    FAMILIES,
    config_of,
    published,
    stack_experts,
    write_adapter,
    write_weights,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

# Linux counts the highest resident memory (VmHWM); writing 5 to clear_refs begins to count anew.
CHILD = """
import sys
from pathlib import Path
import torch
from d2f_runtime.models.checkpoints import load_checkpoint

def memory(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

first, big = ([Path(path) for path in part.split(":")] for part in sys.argv[1:])

def load(model, adapter=None):
    return load_checkpoint(model, adapter=adapter, dtype=torch.float32)

load(*first)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load(*big)
peak = memory("VmHWM") - before
held = sum(p.numel() * p.element_size() for p in model.parameters())
assert abs(model.lm_head.weight.mean() - 1) < 1e-3
print(peak - held)
"""


def write(root: Path, name: str, *, num_shards: int, **sizes: int) -> int:
    """Write a bf16 LLaDA of ones and an adapter for it; return the bytes of its largest shard."""
    llada = FAMILIES["llada"]
    folder = root / name
    folder.mkdir()
    values = config_of(llada, mask_token_id=5, eos_token_id=6, **sizes)
    (folder / "config.json").write_text(json.dumps(values))
    settings = transformers.LlamaConfig(
        hidden_size=values["d_model"],
        intermediate_size=values["mlp_hidden_size"],
        num_attention_heads=4,
        num_hidden_layers=values["n_layers"],
        vocab_size=values["embedding_size"],
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        names = transformers.LlamaForCausalLM(settings).state_dict()
    ones = {n: torch.ones(t.shape, dtype=torch.bfloat16) for n, t in names.items()}
    write_weights(folder, {published(llada, n): t for n, t in ones.items()}, num_shards=num_shards)
    write_adapter(root / "adapter" / name, llada, ones)
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def beside(first: str, big: str) -> int:
    """Return the bytes that loading takes beside the model, once another one was loaded."""
    command = [sys.executable, "-c", CHILD, first, big]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_loading_takes_no_more_than_the_largest_shard_beside_the_model(tmp_path: Path) -> None:
    write(tmp_path, "tiny", num_shards=2)
    largest = write(
        tmp_path, "big", num_shards=3,
        d_model=512, mlp_hidden_size=1536, n_layers=12, embedding_size=8000, vocab_size=8000,
    )  # fmt: skip
    assert largest > 30e6
    tiny, big = (f"{tmp_path / name}:{tmp_path / 'adapter' / name}" for name in ("tiny", "big"))
    assert 0.5 * largest < beside(tiny, big) < 1.2 * largest  # it is mapped while it is read


def write_experts(root: Path, name: str, *, stacked: bool, **sizes: int) -> int:
    """Write a bf16 LLaDA2 of ones, of which an adapter changes q, k, v and o; see `write`."""
    tiny = FAMILIES["llada2_moe"]
    folder = root / name
    folder.mkdir(parents=True)
    values = config_of(tiny, mask_token_id=5, eos_token_id=6, **sizes)
    (folder / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        names = LLaDA2(values).state_dict()
    ones = {n: torch.ones(t.shape, dtype=torch.bfloat16) for n, t in names.items()}
    write_adapter(root / "adapter" / name, tiny, dict(ones))
    write_weights(folder, stack_experts(ones) if stacked else ones, num_shards=3)
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_loaded_one_by_one(tmp_path: Path, stacked: bool) -> None:
    write_experts(tmp_path, "tiny", stacked=stacked)
    largest = write_experts(
        tmp_path, "big", stacked=stacked,
        hidden_size=256, moe_intermediate_size=512, num_experts=32, num_hidden_layers=7,
        vocab_size=8000,
    )  # fmt: skip
    assert largest > 30e6
    tiny, big = (f"{tmp_path / name}:{tmp_path / 'adapter' / name}" for name in ("tiny", "big"))
    assert beside(tiny, big) < 1.2 * largest  # no copy of the experts that are stored together


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_gguf_file_is_unpacked_a_few_rows_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tiny_gguf import oracle, write_gguf

    paths = []
    for name, num_layers, width, num_rows in [("tiny", 1, 512, 500), ("big", 12, 1536, 12_000)]:
        model = oracle(
            "llama", num_hidden_layers=num_layers, intermediate_size=width, vocab_size=num_rows
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        paths.append(write_gguf(tmp_path / f"{name}.gguf", "llama", model, stored="Q8_0"))
    largest = 12_000 * 256 * 4
    assert largest > 12e6
    found = beside(*map(str, paths))
    assert found < 8e6  # neither the file nor a tensor of it a second time
