"""MemoryPlan: what a training will hold on its device, added up before anything is loaded.

Pure. Counts what lasts (weights, adapters, gradients, optimiser) exactly and activations by the
tensors that autograd keeps; a share on top stands for what is not counted.

Shapes: B sequences, T positions, D hidden size, F feed-forward size, L layers, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Final

from d2f_export.distill.settings import DistillSettings
from d2f_runtime.models.config import TransformerConfig
from d2f_stream.core.errors import InvalidRequest

__all__ = [
    "MemoryPlan",
    "as_text",
    "check_fits",
    "num_adapter_parameters",
    "num_parameters",
    "plan_memory",
]

GIB: Final = 1 << 30
RESERVE: Final = 1 << 30  # context, kernels, library workspaces of a GPU
SLACK: Final = 0.10  # of what is not held for good: fragments, temporaries
LOGIT_BYTES: Final = 36  # of each logit: teacher's and student's, their fp32 softmax, gradients


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        weights: of the student's base, once; with a LoRA also the teacher's.
        teacher: of a frozen copy.
        adapters: fp32.
        casts: copies of what is trained, in the precision of the products.
        gradients: of what is trained, fp32.
        optimizer: two fp32 moments of each.
        activations: kept for the backward pass, and one layer's while it is recomputed.
        logits: of the positions that are held at a time.
        validation: K/V of the answers that are decoded side by side.
        reserve: what is not counted.
    """

    weights: int
    teacher: int
    adapters: int
    casts: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    validation: int
    reserve: int

    @property
    def total(self) -> int:
        """The sum. Validation and a training step take turns, so the larger counts."""
        held = self.weights + self.teacher + self.adapters + self.casts
        held += self.gradients + self.optimizer
        return held + max(self.activations + self.logits, self.validation) + self.reserve

    def lines(self) -> list[tuple[str, str]]:
        """Return a row for each part and one for the total, for a table."""
        parts = [(field.name, getattr(self, field.name)) for field in fields(self)]
        shown = [*((name, size) for name, size in parts if size), ("total", self.total)]
        return [(name, as_text(size)) for name, size in shown]


def as_text(size: int) -> str:
    """Return bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"


def plan_memory(
    config: TransformerConfig, settings: DistillSettings, *, is_bf16: bool, is_flex: bool
) -> MemoryPlan:
    """Add up what a training takes.

    Args:
        config: of the model.
        settings: of the training.
        is_bf16: whether it computes in bf16, else in fp32.
        is_flex: whether attention is fused, so that nobody holds [T, T] scores.
    """
    size = 2 if is_bf16 else 4
    parameters = num_parameters(config)
    adapters = 0 if settings.full else num_adapter_parameters(config, settings.lora_rank)
    trained = parameters if settings.full else adapters
    positions = settings.micro_batch * settings.length
    layer = positions * _layer_bytes(config, settings, size)
    if not is_flex:  # a bool mask, and an additive one of it
        layer += settings.micro_batch * settings.length**2 * (1 + size)
    between = positions * config.hidden_size * size
    if settings.checkpointing:
        activations = config.num_layers * between + layer
    else:
        activations = config.num_layers * layer
    rows = min(settings.logit_rows, positions)
    logits = rows * config.vocab_size * LOGIT_BYTES
    validation = 0
    if settings.validation is not None:
        answer = settings.validation_tokens + settings.validation_block_size
        places = settings.validation_rows * (settings.length + answer)
        validation = places * config.kv_bytes_per_token * (4 if settings.full else size) // 4
    return MemoryPlan(
        weights=parameters * (4 if settings.full else size),
        teacher=parameters * size if settings.full and settings.needs_teacher else 0,
        adapters=adapters * 4,
        casts=trained * 2 if is_bf16 else 0,
        gradients=trained * 4,
        optimizer=trained * 8,
        activations=activations,
        logits=logits,
        validation=validation,
        reserve=RESERVE + int(SLACK * (activations + logits)),
    )


def num_parameters(config: TransformerConfig) -> int:
    """Return how many weights the model has."""
    size, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    attention = size * (queries + 2 * keys) + queries * size
    if config.qkv_bias:
        attention += queries + 2 * keys
    if config.qk_norm:
        attention += 2 * head
    layer = attention + 3 * size * config.ffn_size + 2 * size
    tables = 1 if config.tie_embeddings else 2
    return config.num_layers * layer + tables * config.vocab_size * size + size


def num_adapter_parameters(config: TransformerConfig, rank: int) -> int:
    """Return the size of a LoRA on q, k, v and o."""
    size, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    return config.num_layers * rank * (2 * (size + queries) + 2 * (size + keys))


def check_fits(plan: MemoryPlan, available: int, settings: DistillSettings) -> None:
    """Refuse a training that the device cannot hold.

    Raises:
        InvalidRequest: names what it needs, what there is, and what would help.
    """
    if plan.total <= available:
        return
    ways = []
    if settings.full:
        ways.append("train a LoRA (without --full)")
    if not settings.checkpointing:
        ways.append("turn checkpointing on")
    if settings.micro_batch > 1:
        ways.append(f"lower micro_batch (now {settings.micro_batch}; accumulation makes up for it)")
    ways.append(f"shorten length (now {settings.length})")
    if settings.validation is not None:
        ways.append(f"lower validation_rows (now {settings.validation_rows})")
    raise InvalidRequest(
        f"the training needs {plan.total / GIB:.1f} GiB but the device has "
        f"{available / GIB:.1f} GiB; {', or '.join(ways)}"
    )


def _layer_bytes(config: TransformerConfig, settings: DistillSettings, size: int) -> int:
    """Return what autograd keeps of one layer for each position, bytes."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    norms = 2 * hidden * size
    attention = (2 * queries + 2 * keys) * size + 4 * config.num_heads  # q, k, v, out; row sums
    feed_forward = 3 * ffn * size  # gate, its SiLU, up
    if settings.full:  # the inputs of the products, whose weights have gradients
        return norms + attention + feed_forward + (2 * hidden + queries + ffn) * size
    dropped = 3 * hidden + queries  # each adapter has a dropout of its own
    masks = dropped if settings.lora_dropout else 0
    return norms + attention + feed_forward + dropped * size + masks
