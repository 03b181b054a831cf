"""Shards: the safetensors files of a model folder, their headers first, their tensors one by one.

Headers say names, shapes and dtypes and are checked before any weight is read. A tensor is read
when it is asked for, and the file is let go before the next one is opened, so that host memory
holds one shard at most. Never reads a pickle.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from d2f_runtime.models.config_file import ConfigFile
from d2f_runtime.models.pickles import refuse_pickles
from d2f_runtime.quantization.bitsandbytes import Beside, find_quantized, read_quantized
from d2f_runtime.quantization.stored import QuantizedWeight
from d2f_runtime.text.files import holds_file
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel

__all__ = ["Shards", "TensorHeader"]

INDEX_SUFFIX: Final = ".index.json"
DTYPES: Final = ("F64", "F32", "F16", "BF16")
ROWS_AT_ONCE: Final = 4096  # of two tensors that are compared
QUANTIZED: Final = ("U8", "I8")  # of weights beside which bitsandbytes put what they mean
PASSED_OVER: Final = (
    ".rotary_emb.inv_freq",  # stored by older versions of transformers
    ".self_attn.k_scale", ".self_attn.v_scale",  # of a cache in fp8, as Nemotron's may have them
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str = "F32"


class Shards:
    """The tensors of one or several safetensors files.

    Attributes:
        path: what stands for all of them in errors: the one file, or the index.
        headers: by the tensor's name.
        quantized: by the name of a weight that bitsandbytes quantised, what lies beside it.

    Raises:
        UnsupportedModel: weights are quantised in a way that is not read here.
    """

    def __init__(self, path: Path, headers: Mapping[str, TensorHeader]) -> None:
        self.path = path
        self.headers = headers
        self.quantized: Mapping[str, Beside] = find_quantized(headers, path)
        self._beside = {n for found in self.quantized.values() for n in found.names.values()}
        for name, header in headers.items():
            known = name in self.quantized or name in self._beside
            if header.dtype not in DTYPES and not (known and header.dtype in QUANTIZED):
                raise UnsupportedModel(
                    f"{header.file}: {name} is stored as {header.dtype}; of quantized checkpoints "
                    "those of bitsandbytes are read alone, fetch the bf16 one"
                )

    @classmethod
    def open(cls, folder: Path, name: str) -> "Shards":
        """Read the headers of `name`, or of the files that `name`.index.json lists.

        Raises:
            ModelNotFound: the folder has neither.
            UnsupportedModel: it has pickles instead, or the weights are quantized.
            ModelDamaged: a file is truncated or missing, or lacks what the index promises.
        """
        index = ConfigFile.read(folder / (name + INDEX_SUFFIX))
        if holds_file(folder / name):
            return cls(folder / name, _headers(folder / name))
        if index is None:
            refuse_pickles(folder)
            raise ModelNotFound(f"{folder} has no {name}; is it a model folder?")
        headers: dict[str, TensorHeader] = {}
        promised = _weight_map(index)
        for file in sorted(set(promised.values())):
            if not holds_file(folder / file):
                raise ModelDamaged(
                    f"{index.path} names {file:.100}, which {folder} does not hold; fetch it again"
                )
            for tensor, header in _headers(folder / file).items():
                wanted = promised.get(tensor)
                if wanted is None and tensor in headers:
                    raise ModelDamaged(
                        f"{tensor} lies in {headers[tensor].file.name} and in {file}, and "
                        f"{index.path} does not say which is meant"
                    )
                if wanted in (None, file):  # the index decides where a tensor lies twice
                    headers[tensor] = header
        for tensor, file in promised.items():
            if tensor not in headers:
                raise ModelDamaged(f"{index.path} says that {file} holds {tensor}; it does not")
        return cls(index.path, headers)

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.headers

    @property
    def num_tensors(self) -> int:
        """How many there are, whatever they are for."""
        return len(self.headers)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors have equal values; reads some rows at a time.

        Raises:
            ModelDamaged: a file cannot be read any more.
        """
        one, other = self.headers[first], self.headers[second]
        if one.shape != other.shape or {first, second} & self.quantized.keys():
            return False
        length = one.shape[0] if one.shape else 0
        with _opened(one.file) as file, _opened(other.file) as beside:
            ours, theirs = file.get_slice(first), beside.get_slice(second)
            for start in range(0, length, ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, length)
                if not torch.equal(ours[start:stop].float(), theirs[start:stop].float()):
                    return False
        return True

    def check(
        self, expected: Mapping[str, tuple[int, ...]], *, ignored: Collection[str] = ()
    ) -> None:
        """Compare names and shapes; tensors in `ignored` may be there or not.

        Raises:
            ModelDamaged: for the first that is missing, unknown or of another shape.
        """
        if missing := sorted(set(expected) - set(self.headers)):
            raise ModelDamaged(
                f"{self.path} lacks the tensor {missing[0]:.200} ({len(missing)} in all)"
            )
        buffers = {name for name in self.headers if name.endswith(PASSED_OVER)}
        passed_over = self._beside | buffers | set(ignored)
        if unknown := sorted(set(self.headers) - set(expected) - passed_over):
            raise ModelDamaged(
                f"{self.path} has the unknown tensor {unknown[0]:.200} ({len(unknown)} in all)"
            )
        for name, shape in expected.items():
            header = self.headers[name]
            if name not in self.quantized and header.shape != shape:
                raise ModelDamaged(
                    f"{header.file}: {name} has shape {header.shape} but the config asks for "
                    f"{shape}"
                )

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors in host memory, file by file; use each before the next is asked.

        Raises:
            ModelDamaged: a file cannot be read any more.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.headers[name].file, []).append(name)
        for path, held in by_file.items():
            with _opened(path) as file:
                for name in held:
                    yield name, file.get_tensor(name)
            del file  # it holds the shard's memory

    def quantized_weight(
        self, name: str, codes: torch.Tensor, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """Return a weight of `quantized` on its codes' device.

        Args:
            name: of the weight.
            codes: its tensor.
            shape: that the config asks for.

        Raises:
            ModelDamaged, UnsupportedModel: see `read_quantized`.
        """
        beside = self.quantized[name]
        parts = {
            part: dict(self.tensors([tensor]))[tensor].to(codes.device)
            for part, tensor in beside.names.items()
        }
        where = f"{self.headers[name].file}: {name}"
        return read_quantized(beside.kind, codes, parts, shape, where)

    @property
    def stored(self) -> str:
        """How the weights are stored: fp32, bf16, fp16, nf4 or int8.

        Raises:
            UnsupportedModel: in more than one way of bitsandbytes.
        """
        kinds = {beside.kind for beside in self.quantized.values()}
        if len(kinds) > 1:
            raise UnsupportedModel(f"{self.path} holds weights of {' and '.join(sorted(kinds))}")
        largest = max(self.headers.values(), key=lambda header: header.shape)
        dense = {"F16": "fp16", "BF16": "bf16"}.get(largest.dtype, "fp32")
        return kinds.pop() if kinds else dense

    @property
    def dtype(self) -> None:
        """What all tensors become where nobody says: each keeps its own."""
        return None

    @property
    def dense_dtype(self) -> torch.dtype:
        """What `quantized` weights become where nobody says: as the weights beside them."""
        held = {h.dtype for name, h in self.headers.items() if name.endswith("weight")}
        return (
            torch.float16 if "F16" in held else torch.bfloat16 if "BF16" in held else torch.float32
        )


def _headers(path: Path) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            part = file.get_slice(name)
            headers[name] = TensorHeader(path, tuple(part.get_shape()), str(part.get_dtype()))
    return headers


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as exc:
        raise ModelDamaged(
            f"{path} cannot be read ({exc!s:.300}); fetch or export it again"
        ) from exc


def _weight_map(index: ConfigFile) -> Mapping[str, str]:
    promised = index.section("weight_map").values
    for tensor, file in promised.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelDamaged(
                f"{index.path} says that {tensor:.100} lies in {file!r:.100}, no file name"
            )
    if not promised:
        raise ModelDamaged(f"{index.path} has no weight_map")
    return promised
