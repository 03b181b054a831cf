"""How much memory loading takes beside the model itself, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny_checkpoints import FAMILIES, config_of, published, write_adapter, write_weights

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

folder, adapter = Path(sys.argv[1]), Path(sys.argv[2])
tiny = load_checkpoint(folder.parent / "tiny", adapter=adapter / "tiny", dtype=torch.float32)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_checkpoint(folder, adapter=adapter / "big", dtype=torch.float32)
peak = memory("VmHWM") - before
held = sum(p.numel() * p.element_size() for p in model.parameters())
assert model.lm_head.weight.sum() == model.lm_head.weight.numel()
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_loading_takes_no_more_than_the_largest_shard_beside_the_model(tmp_path: Path) -> None:
    write(tmp_path, "tiny", num_shards=2)
    largest = write(
        tmp_path, "big", num_shards=3,
        d_model=512, mlp_hidden_size=1536, n_layers=12, embedding_size=8000, vocab_size=8000,
    )  # fmt: skip
    assert largest > 30e6
    command = [sys.executable, "-c", CHILD, str(tmp_path / "big"), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    beside = int(done.stdout)
    assert 0.5 * largest < beside < 1.2 * largest  # the shard is mapped while it is read
