"""Catalogue: models that are known by a short name, and what each needs. Pure values.

Sizes are those of the published checkpoints; licences are those of their model cards, to be read
there before use. A name stands for a repository, with the adapter that it is meant to be run with.
"""

from dataclasses import dataclass
from typing import Final

__all__ = ["CATALOGUE", "Entry"]

BITS: Final = {"fp32": 32.0, "bf16": 16.0, "fp8": 8.0, "int8": 8.0, "nf4": 4.127}
"""Bits of a weight in a layer; nf4 with its block scales, themselves quantised."""
ON_GPU: Final = ("bf16", "fp8", "int8", "nf4")
ON_CPU: Final = ("fp32", "bf16")
"""The quantisations that are offered there, the one that is taken by itself first."""
CONTEXT: Final = 4096  # tokens of K/V that a user will want at least
RESERVE: Final = 3 << 29  # bytes: the library's own, activations, graphs


@dataclass(frozen=True, slots=True)
class Entry:
    """A model with a short name.

    Attributes:
        name: what users type.
        repo: of the hub.
        family: as ModelFacts names it.
        parameters: in all, billions.
        table: of them in embedding and head, which keep 16 bits at least; billions.
        kv_bytes: K/V of a token in 16 bits, over all layers.
        licence: as the model card names it.
        adapter: repository of the LoRA that makes a D2F student of it.
        preset: of decoding, where the model's own defaults are not what its authors publish.
    """

    name: str
    repo: str
    family: str
    parameters: float
    table: float
    kv_bytes: int
    licence: str
    adapter: str | None = None
    preset: str | None = None

    def memory(self, quantization: str, *, context: int = CONTEXT) -> int:
        """Return the bytes that running it takes: weights, K/V of one context, and a reserve.

        Loading it takes no more, save in fp8, whose weights are all there in 16 bits before they
        are packed: then it is that.

        Raises:
            KeyError: the quantisation is not one of BITS.
        """
        wide = 4 if quantization == "fp32" else 2
        layers = (self.parameters - self.table) * 1e9 * BITS[quantization] / 8
        kv = context * self.kv_bytes * wide // 2
        loaded = int(layers + self.table * 1e9 * wide) + kv + RESERVE
        return (
            max(loaded, int(self.parameters * 2e9) + RESERVE) if quantization == "fp8" else loaded
        )

    def download(self) -> float:
        """Return what is fetched, GB: the checkpoint in 16 bits."""
        return self.parameters * 2


def _kv(layers: int, kv_heads: int, head_dim: int = 128) -> int:
    return layers * kv_heads * head_dim * 2 * 2


_LLADA: Final = (8.02, 1.04, _kv(32, 32))
_QWEN_7B: Final = (7.62, 1.09, _kv(28, 4))
_LLADA2_MINI: Final = (16.26, 0.64, _kv(20, 4))
_LLADA2_FLASH: Final = (102.9, 1.29, _kv(32, 4))

CATALOGUE: Final[tuple[Entry, ...]] = (
    Entry("llada:8b", "GSAI-ML/LLaDA-8B-Instruct", "llada", *_LLADA, "MIT", None, "llada-vanilla"),
    Entry("d2f-llada:8b", "GSAI-ML/LLaDA-8B-Instruct", "llada", *_LLADA, "MIT",
          "SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora"),
    Entry("dream:7b", "Dream-org/Dream-v0-Instruct-7B", "dream", *_QWEN_7B, "Apache-2.0", None,
          "dream-vanilla"),
    Entry("d2f-dream:7b", "Dream-org/Dream-v0-Base-7B", "dream", *_QWEN_7B, "Apache-2.0",
          "SJTU-Deng-Lab/D2F_Dream_Base_7B_Lora"),
    Entry("diffucoder:7b", "apple/DiffuCoder-7B-Instruct", "dream", *_QWEN_7B, "see its card", None,
          "dream-vanilla"),
    Entry("d2f-diffucoder:7b", "apple/DiffuCoder-7B-Instruct", "dream", *_QWEN_7B, "see its card",
          "SJTU-DENG-Lab/D2F_DiffuCoder_Instruct_7B_Lora"),
    Entry("sdar:1.7b", "JetLM/SDAR-1.7B-Chat", "sdar", 2.03, 0.62, _kv(28, 8), "MIT"),
    Entry("sdar:4b", "JetLM/SDAR-4B-Chat", "sdar", 4.41, 0.78, _kv(36, 8), "MIT"),
    Entry("sdar:8b", "JetLM/SDAR-8B-Chat", "sdar", 8.19, 1.24, _kv(36, 8), "MIT"),
    Entry("sdar:30b-a3b", "JetLM/SDAR-30B-A3B-Chat", "sdar", 30.5, 0.62, _kv(48, 4), "MIT"),
    Entry("trado:4b", "Gen-Verse/TraDo-4B-Instruct", "sdar", 4.41, 0.78, _kv(36, 8), "MIT"),
    Entry("trado:8b", "Gen-Verse/TraDo-8B-Instruct", "sdar", 8.19, 1.24, _kv(36, 8), "MIT"),
    Entry("llada2.0-mini:16b", "inclusionAI/LLaDA2.0-mini", "llada2", *_LLADA2_MINI, "Apache-2.0"),
    Entry("llada2.1-mini:16b", "inclusionAI/LLaDA2.1-mini", "llada2", *_LLADA2_MINI, "Apache-2.0"),
    Entry("llada2.0-flash:100b", "inclusionAI/LLaDA2.0-flash", "llada2", *_LLADA2_FLASH,
          "Apache-2.0"),
    Entry("llada2.1-flash:100b", "inclusionAI/LLaDA2.1-flash", "llada2", *_LLADA2_FLASH,
          "Apache-2.0"),
    Entry("stable-diffcoder:8b", "ByteDance-Seed/Stable-DiffCoder-8B-Instruct", "stable-diffcoder",
          8.25, 1.27, _kv(32, 8), "MIT"),
    Entry("nemotron-diffusion:3b", "nvidia/Nemotron-Labs-Diffusion-3B", "nemotron",
          3.83, 0.81, _kv(26, 8), "NVIDIA Nemotron Open Model License"),
    Entry("nemotron-diffusion:8b", "nvidia/Nemotron-Labs-Diffusion-8B", "nemotron",
          8.49, 1.07, _kv(34, 8), "NVIDIA Nemotron Open Model License"),
    Entry("nemotron-diffusion:14b", "nvidia/Nemotron-Labs-Diffusion-14B", "nemotron",
          13.51, 1.34, _kv(40, 8), "NVIDIA Nemotron Open Model License"),
    Entry("tiny-a2d:0.6b", "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", "a2d",
          0.6, 0.16, _kv(28, 8), "Apache-2.0"),
    Entry("opdlm:4b", "divelab/OPDLM-4B", "a2d", 4.02, 0.39, _kv(36, 8), "MIT"),
    Entry("opdlm:8b", "divelab/OPDLM-8B", "a2d", 8.19, 1.24, _kv(36, 8), "MIT"),
    Entry("fast-dllm-v2:1.5b", "Efficient-Large-Model/Fast_dLLM_v2_1.5B", "fast_dllm_v2",
          1.54, 0.23, _kv(28, 2), "Apache-2.0"),
    Entry("fast-dllm-v2:7b", "Efficient-Large-Model/Fast_dLLM_v2_7B", "fast_dllm_v2",
          *_QWEN_7B, "Apache-2.0"),
    Entry("qwen3:0.6b", "Qwen/Qwen3-0.6B", "qwen3", 0.6, 0.16, _kv(28, 8), "Apache-2.0"),
    Entry("qwen2.5-coder:0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "qwen2", 0.49, 0.14,
          _kv(24, 2, 64), "Apache-2.0"),
    Entry("smollm2:135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 0.135, 0.028,
          _kv(30, 3, 64), "Apache-2.0"),
)  # fmt: skip
