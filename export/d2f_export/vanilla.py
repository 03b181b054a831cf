"""Vanilla decoding of a bidirectional masked-diffusion model, as LLaDA and Dream publish it.

Full attention over prompt and answer, nothing cached, blocks from left to right, a fixed number of
the most confident tokens accepted in each step. Shapes: B rows, T canvas positions, K block size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2f_export.evaluate import Answer
from d2f_runtime.models.sampling import forbid
from d2f_runtime.models.transformer import Transformer

__all__ = ["decode_vanilla"]


@torch.inference_mode()
def decode_vanilla(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    block_size: int,
    per_step: int = 1,
    rows: int = 256,
) -> list[Answer]:
    """Decode all prompts greedily; every answer takes about max_new_tokens / per_step steps."""
    answers: list[Answer] = []
    for first in range(0, len(prompts), rows):
        chosen = prompts[first : first + rows]
        canvas, steps = _decode(model, chosen, max_new_tokens, block_size, per_step)
        for prompt, row in zip(chosen, canvas.tolist(), strict=True):
            answer = row[len(prompt) : len(prompt) + max_new_tokens]
            answers.append(_cut(answer, model.config.eos_ids, steps))
    return answers


def _decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    block_size: int,
    per_step: int,
) -> tuple[Tensor, int]:
    config, device = model.config, model.embed_tokens.weight.device
    stops = torch.tensor([len(prompt) + max_new_tokens for prompt in prompts], device=device)
    canvas = torch.full((len(prompts), int(stops.max())), config.mask_id, device=device)
    for row, prompt in enumerate(prompts):
        canvas[row, : len(prompt)] = torch.tensor(prompt, device=device)
    positions = torch.arange(canvas.shape[1], device=device)[None]
    visible = (positions < stops[:, None])[:, None, None]  # [B, 1, 1, T]: not past its own answer
    steps = 0
    for start in range(0, max_new_tokens, block_size):
        ahead = torch.arange(start, min(start + block_size, max_new_tokens), device=device)
        block = stops[:, None] - max_new_tokens + ahead  # [B, K] canvas positions
        for _ in range(-(-len(ahead) // per_step)):
            hidden, _ = model(canvas, positions, visible.expand(-1, -1, canvas.shape[1], -1))
            _accept_best(model, canvas, hidden, block, per_step)
            steps += 1
    return canvas, steps


def _accept_best(
    model: Transformer, canvas: Tensor, hidden: Tensor, block: Tensor, number: int
) -> None:
    """Fill the `number` masks of each row's block that the model is surest of."""
    config = model.config
    states = block - 1 if config.shift_logits else block
    index = states[:, :, None].expand(-1, -1, hidden.shape[2])
    logits = model.logits(hidden.gather(1, index))  # [B, K, V]
    logits = forbid(logits, mask_id=config.mask_id, num_tokens=config.num_tokens)
    confidence, tokens = logits.softmax(dim=-1).max(dim=-1)
    masked = canvas.gather(1, block) == config.mask_id
    confidence = confidence.masked_fill(~masked, -1.0)
    best = confidence.topk(min(number, block.shape[1]), dim=1)
    chosen = block.gather(1, best.indices)
    filled = torch.where(best.values >= 0, tokens.gather(1, best.indices), canvas.gather(1, chosen))
    canvas.scatter_(1, chosen, filled)


def _cut(answer: list[int], eos_ids: Sequence[int], steps: int) -> Answer:
    ends = [i for i, token in enumerate(answer) if token in eos_ids]
    tokens = answer[: ends[0] + 1] if ends else answer
    return Answer(tuple(tokens), len(tokens), steps)
