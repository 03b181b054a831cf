"""What the training of a draft adapter will hold on its device, added up before it begins. Pure.

Shapes: R rows, C clean and N noisy positions of a row, D hidden size, F feed-forward size.
"""

from typing import Final

from d2f_export.distill.from_ar.head_loss import ROWS
from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_export.distill.memory import GIB, MemoryPlan, num_parameters
from d2f_runtime.models.config import TransformerConfig
from d2f_stream.core.errors import InvalidRequest

__all__ = ["check_draft_fits", "plan_draft_memory"]

RESERVE: Final = 1 << 30  # context, kernels, library workspaces of a GPU
SLACK: Final = 0.10  # of what is not held for good: fragments, temporaries
LOGIT_BYTES: Final = 16  # of each logit: the base's and the draft's, their fp32 forms, the slope


def plan_draft_memory(
    config: TransformerConfig, settings: DraftSettings, *, is_fused: bool
) -> MemoryPlan:
    """Add up what a training takes.

    Args:
        config: of the base.
        settings: of the training.
        is_fused: whether it computes in bf16 by fused kernels, as a GPU does.
    """
    size = 2 if is_fused else 4
    adapter = num_draft_parameters(config, settings.rank)
    clean, noisy = settings.rows * settings.clean_length, settings.rows * settings.noisy_length
    keys = 2 * config.num_kv_heads * config.head_dim
    queries = config.num_heads * config.head_dim
    # Of the clean half keys and values are kept, of the noisy one what the backward pass reads.
    layer = clean * keys * size
    layer += noisy * size * (3 * config.hidden_size + 2 * queries + 3 * config.ffn_size)
    layer += noisy * size * 7 * settings.rank + (clean + noisy) * keys * size
    if not is_fused:  # scores and a mask of every pair
        pairs = settings.noisy_length * (settings.clean_length + settings.noisy_length)
        layer += settings.rows * pairs * (1 + size * config.num_heads)
    activations = config.num_layers * layer
    logits = min(ROWS, noisy) * config.vocab_size * LOGIT_BYTES
    return MemoryPlan(
        weights=num_parameters(config) * size,
        teacher=0,
        adapters=adapter * 4,
        casts=adapter * size,
        gradients=adapter * (4 + size),
        optimizer=adapter * 8,
        activations=activations,
        logits=logits,
        validation=0,
        reserve=RESERVE + int(SLACK * (activations + logits)),
    )


def num_draft_parameters(config: TransformerConfig, rank: int) -> int:
    """Return the size of an adapter of all products, and of its mask embedding."""
    size, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sides = (size + queries) * 2 + (size + keys) * 2 + (size + ffn) * 3
    return config.num_layers * rank * sides + size


def check_draft_fits(plan: MemoryPlan, available: int, settings: DraftSettings) -> None:
    """Refuse a training that the device cannot hold.

    Raises:
        InvalidRequest: names what it needs, what there is, and what would help.
    """
    if plan.total > available:
        raise InvalidRequest(
            f"the training needs {plan.total / GIB:.1f} GiB but the device has "
            f"{available / GIB:.1f} GiB; lower rows (now {settings.rows}), noisy_length (now "
            f"{settings.noisy_length}) or clean_length (now {settings.clean_length})"
        )
