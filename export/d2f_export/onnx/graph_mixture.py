"""A mixture of experts as nodes: the same function as `models.mixture`, each expert by itself.

onnxruntime's own operators for experts know neither groups nor biases nor scaling. So each expert
has its products, over the rows that chose it, which are none for most: an empty product reads no
weights. The number of rows of an expert is only known at run time, which graphs with static shapes
cannot have.

Shapes: M rows, D hidden size, E experts, C chosen of them.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from d2f_export.onnx.graph_builder import Array, GraphBuilder, Stored, Value, Weights
from d2f_export.onnx.quantize import Linear
from d2f_runtime.kernels.routing import SMALLEST
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.mixture_config import MixtureConfig

__all__ = ["add_mixture"]

FP32 = 1  # of ONNX's types


def add_mixture(linear: Linear, config: TransformerConfig, path: str, x: Value) -> Value:
    """Return [B, W, D] of [B, W, D].

    Args:
        linear: of the graph.
        config: of the model.
        path: of the layer's feed-forward, such as "layers.3.mlp".
        x: normalised rows.
    """
    assert config.mixture is not None
    adder = _Adder(linear.graph, linear, config.mixture, config.hidden_size, path)
    graph = linear.graph
    rows = graph.op("Reshape", x, graph.constant([-1, config.hidden_size]))
    mixed = adder.mixed(rows)
    if linear.dtype != "float32":
        mixed = graph.op("Cast", mixed, to=10)
    if config.mixture.shared_size:
        shared = adder.expert(rows, f"{path}.shared", config.mixture.shared_size)
        mixed = graph.op("Add", mixed, shared)
    return graph.op("Reshape", mixed, graph.op("Shape", x))


@dataclass(frozen=True, slots=True)
class _Adder:
    graph: GraphBuilder
    linear: Linear
    mixture: MixtureConfig
    size: int
    path: str

    def mixed(self, rows: Value) -> Value:
        """Return [M, D] fp32 the weighted sum of the chosen experts."""
        graph, number = self.graph, self.mixture.num_experts
        chosen, weights = self.routed(rows)
        expert_ids = graph.constant(np.arange(number).reshape(1, 1, number))
        is_sent = graph.op("Equal", self._unsqueezed(chosen, 2), expert_ids)  # [M, C, E]
        sent = graph.op("Cast", is_sent, to=FP32)
        shares = graph.op("Mul", sent, self._unsqueezed(weights, 2))
        by_expert, sent = (
            graph.op("Transpose", self._summed(values, 1), perm=[1, 0]) for values in (shares, sent)
        )  # [E, M]
        places: list[Value] = []
        outputs: list[Value] = []
        for expert in range(number):
            own = graph.op("Gather", sent, graph.constant(expert), axis=0)  # [M]
            place = graph.op("Reshape", graph.op("NonZero", own), graph.constant([-1]))
            out = self.expert(
                graph.op("Gather", rows, place, axis=0),
                f"{self.path}.experts.{expert}",
                self.mixture.ffn_size,
            )
            if self.linear.dtype != "float32":
                out = graph.op("Cast", out, to=FP32)
            weight = graph.op("Gather", by_expert, graph.constant(expert), axis=0)
            weight = self._unsqueezed(graph.op("Gather", weight, place, axis=0), 1)
            outputs.append(graph.op("Mul", out, weight))
            places.append(place)
        index = self._unsqueezed(graph.op("Concat", *places, axis=0), 1)  # [M C, 1]
        nothing = graph.op("Expand", graph.constant(0.0, "float32"), graph.op("Shape", rows))
        joined = graph.op("Concat", *outputs, axis=0)
        return graph.op("ScatterND", nothing, index, joined, reduction="add")

    def routed(self, rows: Value) -> tuple[Value, Value]:
        """Return [M, C] the experts of each row, and fp32 what these weigh."""
        graph, mixture = self.graph, self.mixture
        exact = rows if self.linear.dtype == "float32" else graph.op("Cast", rows, to=FP32)
        router = self._stored("router.weight", (self.size, mixture.num_experts))
        logits = graph.op("MatMul", exact, router)
        if mixture.scoring == "sigmoid":
            scores = graph.op("Sigmoid", logits)
        else:
            scores = graph.op("Softmax", logits, axis=-1)
        ranking = scores
        if mixture.has_bias:
            bias = self._stored("router.bias", (mixture.num_experts,))
            ranking = graph.op("Add", scores, bias)
        if mixture.num_groups > 1:
            ranking = self._of_kept_groups(ranking)
        _, chosen = graph.ops("TopK", 2, ranking, graph.constant([mixture.num_chosen]), axis=-1)
        weights = graph.op("GatherElements", scores, chosen, axis=1)
        if mixture.normalised:
            total = graph.op("ReduceSum", weights, graph.constant([1]), keepdims=1)
            if mixture.scoring == "sigmoid":
                total = graph.op("Add", total, graph.constant(SMALLEST, "float32"))
            weights = graph.op("Div", weights, total)
        if mixture.scale != 1.0:
            weights = graph.op("Mul", weights, graph.constant(mixture.scale, "float32"))
        return chosen, weights

    def _of_kept_groups(self, ranking: Value) -> Value:
        graph, mixture = self.graph, self.mixture
        number = mixture.num_groups
        shape = graph.constant([-1, number, mixture.num_experts // number])
        groups = graph.op("Reshape", ranking, shape)
        best, _ = graph.ops("TopK", 2, groups, graph.constant([2]), axis=-1)
        best = self._summed(best, 2)
        _, kept = graph.ops("TopK", 2, best, graph.constant([mixture.num_kept_groups]), axis=-1)
        ids = graph.constant(np.arange(number).reshape(1, 1, number))
        is_kept = graph.op("Cast", graph.op("Equal", self._unsqueezed(kept, 2), ids), to=FP32)
        is_kept = graph.op("Cast", self._summed(is_kept, 1), to=9)  # [M, groups] bool
        lowest = graph.constant(-np.inf, "float32")
        groups = graph.op("Where", self._unsqueezed(is_kept, 2), groups, lowest)
        return graph.op("Reshape", groups, graph.constant([-1, mixture.num_experts]))

    def expert(self, rows: Value, path: str, width: int) -> Value:
        """Return [n, D] of [n, D]: SwiGLU."""
        graph, shape = self.graph, (width, self.size)
        gate, up = (
            self.linear(rows, f"{path}.{part}_proj", [f"{path}.{part}_proj.weight"], shape)
            for part in ("gate", "up")
        )
        gate = graph.op("Mul", gate, graph.op("Sigmoid", gate))
        name = f"{path}.down_proj"
        wide = graph.op("Mul", gate, up)
        return self.linear(wide, name, [f"{name}.weight"], (self.size, width))

    def _stored(self, name: str, shape: tuple[int, ...]) -> Value:
        """Return a parameter of the router, in fp32 and turned round where it is a matrix."""
        source = f"{self.path}.{name}"
        weights = Weights((source,), (Stored(source, "float32", shape),), lambda w: [_turned(w)])
        (value,) = self.graph.store(weights)
        return value

    def _unsqueezed(self, x: Value, axis: int) -> Value:
        return self.graph.op("Unsqueeze", x, self.graph.constant([axis]))

    def _summed(self, x: Value, axis: int) -> Value:
        return self.graph.op("ReduceSum", x, self.graph.constant([axis]), keepdims=0)


def _turned(weight: Tensor) -> Array:
    array: Array = np.ascontiguousarray(weight.float().numpy().T)
    return array
