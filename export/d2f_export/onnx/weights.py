"""A checkpoint's weights on their way into a step graph, of which memory holds few at a time.

Each stored tensor is made of the parameters that it needs, read when its turn comes, adapter merged
in, and let go before the next.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor

from d2f_export.onnx.graph import StepGraph
from d2f_export.onnx.graph_builder import Array, Stored
from d2f_export.onnx.smoothing import DOWN, smoothing_of
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_adapter import DraftAdapter
from d2f_runtime.models.draft_facts import DraftFacts
from d2f_runtime.models.stored_weights import StoredWeights
from d2f_runtime.quantization.stored import dense
from d2f_stream.core.errors import ModelDamaged

__all__ = ["INLINE_BYTES", "Checkpoint", "Parameters", "num_bytes", "write_graphs"]

Parameters = Callable[[Sequence[str]], list[Tensor]]
"""Returns the parameters of those names, each [N, K] or [N]."""

INLINE_BYTES: Final = 1 << 28
"""Weights of more than this lie in a file of their own; protobuf ends at 2 GiB."""

ALIGNMENT: Final = 1 << 16  # of large tensors in that file, so that they can be mapped anywhere


class Checkpoint:
    """A model folder whose parameters are read one by one.

    Checks everything by the files' headers.

    Args:
        folder: in this project's layout or a published one.
        adapter: folder of a LoRA adapter to merge, or of a draft adapter.
        family: which it is, where its files do not tell; see `family_of`.

    Raises:
        ModelNotFound: a folder or one of its files is missing.
        ModelDamaged: a file is truncated, or a tensor is missing, unknown or of the wrong shape.
        UnsupportedModel: config, weights or adapter are not for this build or for each other.
    """

    def __init__(
        self, folder: Path, *, adapter: Path | None = None, family: str | None = None
    ) -> None:
        facts = None if adapter is None else DraftFacts.read(adapter)
        self._stored = StoredWeights.open(
            folder, adapter=adapter if facts is None else None, family=family
        )
        self.config: TransformerConfig = self._stored.config
        self._draft: DraftAdapter | None = None
        self._has_mask = facts is None or facts.mask_id is not None
        self._folder, self._family = folder, family
        self._smoothing: dict[str, Tensor] | None = None
        if facts is not None and adapter is not None:
            self.config = facts.adapted(self.config)
            self._draft = DraftAdapter.open(adapter, facts, self.config)

    @property
    def draft_ranks(self) -> dict[str, int] | None:
        """The ranks of a draft adapter's factors by product; None without one."""
        return None if self._draft is None else self._draft.ranks

    def __call__(self, names: Sequence[str]) -> list[Tensor]:
        """Read parameters by our names, dense where they are quantised, adapter merged in.

        Those of a draft adapter begin with "draft.": its mask_embedding, and down and up of a
        product. Those that begin with "smooth." are the factors behind a norm, or before a down
        projection; "divided." are the rows of an up projection divided by the latter.

        Raises:
            ModelDamaged: one holds a value that is no number.
        """
        tensors: list[Tensor] = []
        shards, adapter = self._stored.shards, self._stored.adapter
        for name in names:
            if name.startswith("smooth."):
                tensors.append(self._factors(name.removeprefix("smooth.")))
                continue
            if name.startswith("divided."):
                (rows,) = self([name.removeprefix("divided.")])
                layer = name[name.index("layers.") :].partition(".mlp.")[0]
                tensors.append(rows.float() / self._factors(f"{layer}.{DOWN}")[:, None])
                continue
            if name == "draft.mask_embedding" and not self._has_mask:
                (table,) = self(["embed_tokens.weight"])
                tensors.append(table[self.config.mask_id])
                continue
            if self._draft is not None and name.startswith("draft."):
                tensors.append(self._draft.tensor(name.removeprefix("draft.")))
                continue
            parameter = self._stored.parameters[name]
            ((stored, tensor),) = shards.tensors([parameter.stored])
            if stored in shards.quantized:
                outputs, features = parameter.whole
                weight = shards.quantized_weight(stored, tensor, (outputs, features))
                tensor = dense(weight, torch.float32)
            if adapter is not None:
                tensor = adapter.merged(parameter.adapted, tensor)
            tensor = parameter.part(tensor)
            if not torch.isfinite(tensor).all():  # integers would hide it
                raise ModelDamaged(
                    f"{shards.path}: {stored} holds values that are NaN or infinite; fetch or "
                    "train it again"
                )
            tensors.append(tensor)
        return tensors

    def _factors(self, name: str) -> Tensor:
        """Return factors by the name that `smoothing_of` gives; the first call runs the model."""
        if self._smoothing is None:
            self._smoothing = smoothing_of(self._folder, family=self._family)
        return self._smoothing[name]


def write_graphs(
    graphs: dict[Path, StepGraph], parameters: Parameters, *, data: Path | None = None
) -> None:
    """Write graphs of one model, whose weights are the same, to their paths.

    Args:
        graphs: by the path of each; all in one folder.
        parameters: of the model.
        data: where the weights go, in the same folder; None puts them into the graphs.
    """
    first = next(iter(graphs.values()))
    if data is None:
        tensors = {t.name: t for g in graphs.values() for t in g.model.graph.initializer}
        assert len(graphs) == 1
        for stored, array in _arrays(first, parameters):
            tensors[stored.name].raw_data = array.tobytes()
    else:
        places = _places(first)
        with data.open("wb") as file:
            for stored, array in _arrays(first, parameters):
                file.seek(places[stored.name])
                file.write(array.data)
        for graph in graphs.values():
            _point_to(graph, places, data.name)
    for path, graph in graphs.items():
        onnx.save(graph.model, str(path))


def num_bytes(graph: StepGraph) -> int:
    """Return the size of a graph's weights."""
    return sum(stored.num_bytes for weights in graph.weights for stored in weights.stored)


def _arrays(graph: StepGraph, parameters: Parameters) -> Iterator[tuple[Stored, Array]]:
    for weights in graph.weights:
        arrays = weights.pack(*parameters(weights.sources))
        yield from zip(weights.stored, arrays, strict=True)


def _places(graph: StepGraph) -> dict[str, int]:
    """Return where each stored tensor begins in the file."""
    places: dict[str, int] = {}
    end = 0
    for weights in graph.weights:
        for stored in weights.stored:
            if stored.num_bytes >= ALIGNMENT:
                end = -(-end // ALIGNMENT) * ALIGNMENT
            places[stored.name] = end
            end += stored.num_bytes
    return places


def _point_to(graph: StepGraph, places: dict[str, int], location: str) -> None:
    sizes = {stored.name: stored.num_bytes for w in graph.weights for stored in w.stored}
    for tensor in graph.model.graph.initializer:
        if tensor.name not in places:
            continue
        tensor.data_location = onnx.TensorProto.EXTERNAL
        facts: dict[str, Any] = {
            "location": location,
            "offset": places[tensor.name],
            "length": sizes[tensor.name],
        }
        for key, value in facts.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
