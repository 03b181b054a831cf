"""GgufWeights: a GGUF file's tensors, dequantised one by one, under the published names.

What reads a checkpoint's shards reads these the same way. The file's bits are not kept: no kernel
here multiplies them. The blocks are unpacked by gguf-py, a few rows at a time, so that beside the
tensor that is asked for memory holds some megabytes.
"""

import importlib.util
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from d2f_runtime.gguf.file import GgufFile, GgufTensor
from d2f_runtime.quantization.bitsandbytes import Beside
from d2f_runtime.quantization.stored import QuantizedWeight
from d2f_stream.core.errors import MissingExtra, ModelDamaged

__all__ = ["GgufWeights"]

logger = logging.getLogger("d2f_stream.gguf_weights")

STRETCH: Final = "rope_freqs.weight"  # what the config says of the rotary positions
PIECE: Final = 1 << 18  # numbers that are unpacked at once

_NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_DENSE: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufWeights:
    """The tensors of a GGUF file; stands where `Shards` does.

    Attributes:
        path: of the file, for errors.
        quantized: none: what is quantised is not kept so.

    Raises:
        MissingExtra: gguf is not installed.
    """

    def __init__(self, file: GgufFile, *, head_dim: int) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtra(f"reading {file.path}", "gguf", "torch")
        self.path: Path = file.path
        self.quantized: Mapping[str, Beside] = {}
        self._file = file
        self._head_dim = head_dim
        # llama's rows of q and k come in pairs to be rotated, ours in halves
        self._is_paired = file.metadata["general.architecture"] == "llama"

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return _stored_name(name) in self._file.tensors

    @property
    def num_tensors(self) -> int:
        """How many there are, whatever they are for."""
        return len(self._file.tensors)

    def same(self, first: str, second: str) -> bool:
        """Never called: a file that holds a head does not tie it."""
        raise AssertionError(first, second)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], *, ignored: Collection[str] = ()
    ) -> None:
        """Compare names and shapes; tensors in `ignored` may be there or not.

        Raises:
            ModelDamaged: for the first that is missing, unknown or of another shape.
        """
        held = self._file.tensors
        wanted = {_stored_name(name): shape for name, shape in expected.items()}
        if missing := sorted(set(wanted) - set(held)):
            raise ModelDamaged(f"{self.path} lacks the tensor {missing[0]} ({len(missing)} in all)")
        passed_over = {STRETCH, *map(_stored_name, ignored)}
        if unknown := sorted(set(held) - set(wanted) - passed_over):
            raise ModelDamaged(
                f"{self.path} has the unknown tensor {unknown[0]} ({len(unknown)} in all)"
            )
        for name, shape in wanted.items():
            if held[name].shape != shape:
                raise ModelDamaged(
                    f"{self.path}: {name} has shape {held[name].shape} but the metadata asks for "
                    f"{shape}"
                )

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors in host memory: 16-bit ones as they are, the others in fp32.

        Raises:
            ModelDamaged: the file cannot be read any more.
        """
        for name in names:
            yield name, self._read(name)  # and let go of it before the next

    def quantized_weight(
        self, name: str, codes: torch.Tensor, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """Never called: there is nothing in `quantized`."""
        raise AssertionError(name, codes.shape, shape)

    @property
    def stored(self) -> str:
        """How most of the weights are stored: fp32, bf16, fp16, or Q4_K and the like."""
        sizes: Counter[str] = Counter()
        for tensor in self._file.tensors.values():
            sizes[tensor.type.name] += tensor.num_bytes
        name = sizes.most_common(1)[0][0]
        return {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(name, name)

    @property
    def dtype(self) -> torch.dtype:
        """What all tensors become where nobody says: 16 bits if all matrices have the same 16."""
        found = {t.type.name for t in self._file.tensors.values() if len(t.shape) > 1}
        return _DENSE.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32

    @property
    def dense_dtype(self) -> torch.dtype:
        """What `quantized` weights become; there are none."""
        return self.dtype

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file the tensors take."""
        return sum(tensor.num_bytes for tensor in self._file.tensors.values())

    def _read(self, name: str) -> torch.Tensor:
        weight = _dense(self._file, self._file.tensors[_stored_name(name)])
        if self._is_paired and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            pairs = weight.view(-1, self._head_dim // 2, 2, *weight.shape[1:])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        return weight


def _stored_name(name: str) -> str:
    """Return what the file calls a parameter that has this name in checkpoints as published."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_NAMES.get(module, module)}.{leaf}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.{leaf}"


def _dense(file: GgufFile, tensor: GgufTensor) -> torch.Tensor:
    width = tensor.shape[-1]
    weight = torch.empty(
        (tensor.num_rows, width), dtype=_DENSE.get(tensor.type.name, torch.float32)
    )
    step = max(1, PIECE // width)
    for first in range(0, tensor.num_rows, step):
        rows = range(first, min(first + step, tensor.num_rows))
        weight[rows.start : rows.stop] = _unpacked(file.read(tensor, rows), tensor, len(rows))
    return weight.view(tensor.shape)


def _unpacked(stored: bytes, tensor: GgufTensor, num_rows: int) -> torch.Tensor:
    """Return [num_rows, width] of the stored bytes of some rows."""
    raw: Any = bytearray(stored)  # torch wants bytes that may be written
    if (dtype := _DENSE.get(tensor.type.name)) is not None:
        return torch.frombuffer(raw, dtype=dtype).view(num_rows, -1)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = np.frombuffer(stored, dtype=np.uint8).reshape(num_rows, tensor.row_bytes)
    return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[tensor.type.name]))
