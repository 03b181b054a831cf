"""DraftAdapter: low-rank factors for draft rows alone, and what a mask is to the layers.

Rows of the prompt and of what is committed run the base as it is, bit for bit, so that its cache is
the base's own and verified answers are, too. A folder has PEFT's layout (see `adapters` and
`draft_facts`) and the tensor "mask_embedding" beside the factors. Never merged.

Shapes: R draft rows of a step, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from d2f_runtime.models.adapters import Adapter
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.draft_facts import DraftFacts
from d2f_stream.core.errors import UnsupportedModel

__all__ = ["PARENTS", "DraftAdapter", "LayerDraft", "product_shapes"]

MASK_EMBEDDING: Final = "mask_embedding"
PARENTS: Final = {
    f"{part}_proj": "self_attn" if part in "qkvo" else "mlp"
    for part in ("q", "k", "v", "o", "gate", "up", "down")
}
"""Where a layer has each product that can be adapted."""


@dataclass(frozen=True, slots=True)
class LayerDraft:
    """The factors of one layer, and which rows of a step they are for.

    Attributes:
        rows: [R] int64, draft rows among all rows of the step.
        factors: by the product's name, such as "q_proj": [rank, in] and [out, rank], scaled.
    """

    rows: Tensor
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def add(self, name: str, x: Tensor, out: Tensor) -> None:
        """Add the adapter's share to the draft rows of a product, in place; other rows stay.

        Args:
            name: of the product.
            x: [..., in], what was multiplied.
            out: [..., out], contiguous.
        """
        factors = self.factors.get(name)
        if factors is None:
            return
        down, up = factors
        share = x.flatten(0, -2)[self.rows] @ down.T @ up.T
        out.view(-1, out.shape[-1]).index_add_(0, self.rows, share)


class DraftAdapter(nn.Module):
    """The factors of all layers, on the model's device and in its dtype; no part of its weights.

    Args:
        facts: of the adapter.
        mask_embedding: [D].
        layers: for each layer the factors by the product's name; scaled.
    """

    def __init__(
        self,
        facts: DraftFacts,
        mask_embedding: Tensor,
        layers: list[dict[str, tuple[Tensor, Tensor]]],
    ) -> None:
        super().__init__()
        assert facts.mask_id is not None, "whose it is, is known here"
        self.facts, self.mask_id = facts, facts.mask_id
        self.mask_embedding: Tensor
        self.register_buffer("mask_embedding", mask_embedding, persistent=False)
        self._names = [list(factors) for factors in layers]
        for index, factors in enumerate(layers):
            for name, (down, up) in factors.items():
                self.register_buffer(f"{index}_{name}_down", down, persistent=False)
                self.register_buffer(f"{index}_{name}_up", up, persistent=False)

    @classmethod
    def open(cls, folder: Path, facts: DraftFacts, config: TransformerConfig) -> "DraftAdapter":
        """Read an adapter for a base: fp32, on the CPU.

        Args:
            folder: the adapter's.
            facts: read from it.
            config: of the base.

        Raises:
            ModelNotFound, ModelDamaged, UnsupportedModel: see `Adapter.open`; or there is no mask
                embedding of the base's size.
        """
        has_mask = facts.mask_id is not None
        beside = (MASK_EMBEDDING,) if has_mask else ()
        adapter = Adapter.open(folder, _parameters(config), beside=beside)
        if adapter.replaced:
            raise UnsupportedModel(
                f"{folder} holds {min(adapter.replaced)} whole, but a draft adapter leaves the "
                "base as it is"
            )
        embedding = torch.zeros(config.hidden_size)  # of the base's table, once that is there
        if has_mask:
            embedding = adapter.beside(MASK_EMBEDDING)
        if embedding.shape != (config.hidden_size,):
            raise UnsupportedModel(
                f"{folder} has a {MASK_EMBEDDING} of shape {tuple(embedding.shape)}, but the base "
                f"has a hidden size of {config.hidden_size}"
            )
        layers: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(config.num_layers)]
        for name, down, up in adapter.factors():
            layer, _, product = name.removesuffix(".weight").partition(".")[2].partition(".")
            layers[int(layer)][product.rpartition(".")[2]] = down, up
        return cls(replace(facts, mask_id=config.mask_id), embedding.float(), layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the factors by product, such as "layers.0.mlp.up_proj"."""
        return {
            f"layers.{index}.{PARENTS[name]}.{name}": len(self.get_buffer(f"{index}_{name}_down"))
            for index, names in enumerate(self._names)
            for name in names
        }

    def tensor(self, name: str) -> Tensor:
        """Return "mask_embedding", or a factor such as "layers.0.mlp.up_proj.down"."""
        if name == MASK_EMBEDDING:
            return self.mask_embedding
        _, index, _, product, side = name.split(".")
        return self.get_buffer(f"{index}_{product}_{side}")

    def embed(self, tokens: Tensor, table: nn.Embedding) -> Tensor:
        """Return [..., D] what tokens are to the first layer, masks included."""
        is_mask = tokens == self.mask_id
        known = table(tokens.masked_fill(is_mask, 0))
        return torch.where(is_mask[..., None], self.mask_embedding, known)

    def layer(self, index: int, rows: Tensor) -> LayerDraft:
        """Return a layer's factors for the rows of a step."""
        return LayerDraft(
            rows,
            {
                name: (
                    self.get_buffer(f"{index}_{name}_down"),
                    self.get_buffer(f"{index}_{name}_up"),
                )
                for name in self._names[index]
            },
        )


def product_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of the products of a layer, by name."""
    size, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (queries, size),
        "k_proj": (keys, size),
        "v_proj": (keys, size),
        "o_proj": (size, queries),
        "gate_proj": (ffn, size),
        "up_proj": (ffn, size),
        "down_proj": (size, ffn),
    }


def _parameters(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what may be adapted, by our names."""
    return {
        f"layers.{index}.{PARENTS[name]}.{name}.weight": shape
        for index in range(config.num_layers)
        for name, shape in product_shapes(config).items()
    }
