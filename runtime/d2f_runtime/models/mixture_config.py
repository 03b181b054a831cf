"""What a mixture of experts looks like. Pure values; `mixture` computes it."""

from dataclasses import dataclass
from typing import Literal

from d2f_stream.core.errors import ModelDamaged

__all__ = ["MixtureConfig", "Scoring"]

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """The experts of the layers that have some, and how rows are sent to them.

    Attributes:
        num_experts: of a layer.
        num_chosen: that each row goes through.
        ffn_size: of one expert.
        scoring: how the router's logits become scores: over all experts, or each by itself.
        has_bias: the router has a bias that decides the choice, but not the weights.
        num_groups, num_kept_groups: experts are chosen from the groups whose two best are best.
        normalised: the weights of the chosen are divided by their sum.
        scale: by which the weights are multiplied at the end.
        shared_size: width of the expert that all rows go through, unweighted; 0 is none.
        dense_layers: the layers that have a dense feed-forward instead, ascending.

    Raises:
        ModelDamaged: no router chooses so.
    """

    num_experts: int
    num_chosen: int
    ffn_size: int
    scoring: Scoring
    has_bias: bool = False
    num_groups: int = 1
    num_kept_groups: int = 1
    normalised: bool = True
    scale: float = 1.0
    shared_size: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        group, rest = divmod(self.num_experts, self.num_groups)
        if rest:
            raise ModelDamaged(
                f"model config: {self.num_experts} experts make no {self.num_groups} equal groups"
            )
        if self.num_groups > 1 and group < 2:
            raise ModelDamaged("model config: a group of one expert has no two best ones")
        if not 1 <= self.num_kept_groups <= self.num_groups:
            raise ModelDamaged(
                f"model config: {self.num_kept_groups} of {self.num_groups} groups of experts "
                "cannot be kept"
            )
        if not 1 <= self.num_chosen <= group * self.num_kept_groups:
            raise ModelDamaged(
                f"model config: {self.num_chosen} experts cannot be chosen from "
                f"{self.num_kept_groups} groups of {group}"
            )

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a dense feed-forward."""
        return layer in self.dense_layers

    def num_parameters(self, hidden_size: int, num_layers: int) -> int:
        """Return the weights of all experts, routers aside."""
        number = num_layers - sum(1 for layer in self.dense_layers if layer < num_layers)
        return number * 3 * hidden_size * (self.num_experts * self.ffn_size + self.shared_size)
