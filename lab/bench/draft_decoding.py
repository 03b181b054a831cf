"""Verified decoding of many prompts at once, in plain torch: the tokens a step that a draft gives.

A step runs [committed tokens that are not cached yet, and a first block that is filled] causally
through the base, and the other active blocks through the draft. A filled block is committed up to
the first token that the base contradicts, with the base's in its place; what stood behind it
becomes masks again. So the answer is the base's own greedy one, and only the number of steps
depends on the draft.

Shapes: S prompts, P cached positions at most, W rows of a step, KV key/value heads, hd head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_export.distill.from_ar.streams import AdapterLayer, Streams
from d2f_runtime.models.rotary import rotary, rotate

__all__ = ["Decoding", "Tally", "decode_verified"]

ADD: Final = 0.1  # filled share of the last block at which another one is added
ROWS: Final = 4096  # whose logits are held at a time
ACTIVATE: Final = 0.95  # filled share of the block before, at which a block must accept its best


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to decode.

    Attributes:
        block_size: tokens.
        active: blocks that are drafted at once, at most.
        confidence: above which a proposal is accepted.
    """

    block_size: int
    active: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of it, a prompt each.

    Attributes:
        tokens: committed, the end included.
        steps: taken, that of the prompt not counted.
        answers: token ids.
    """

    tokens: list[int]
    steps: list[int]
    answers: list[list[int]]


@dataclass(slots=True)
class _Prompt:
    """Where one prompt's decoding stands; `tokens` are those from the committed edge on."""

    committed: list[int]
    cached: int
    draft: list[int]  # -1 is a mask
    steps: int = 0
    done: bool = False


class _Cache:
    """Keys and values of S prompts."""

    def __init__(self, streams: Streams, slots: int, length: int) -> None:
        config, table = streams.config, streams.table
        shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=table.device, dtype=table.dtype)
        self.values = torch.zeros(shape, device=table.device, dtype=table.dtype)


def decode_verified(
    streams: Streams,
    adapters: list[AdapterLayer] | None,
    mask_embedding: Tensor,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    max_new: int,
    end_id: int,
) -> Tally:
    """Decode all prompts; returns when the last one has ended.

    Args:
        streams: base, and draft where there are no adapters.
        adapters: of the draft rows.
        mask_embedding: [D].
        prompts: token ids.
        decoding: how.
        max_new: tokens of an answer at most.
        end_id: ends an answer.
    """
    block, span = decoding.block_size, decoding.block_size * (decoding.active + 1)
    longest = max(map(len, prompts))
    cache = _Cache(streams, len(prompts), longest + max_new + 2 * span + 8)
    states = [_Prompt(list(prompt), 0, []) for prompt in prompts]
    step = _Step(streams, adapters, mask_embedding, cache, block)
    while live := [number for number, state in enumerate(states) if not state.done]:
        for number in live:
            _extend(states[number], decoding)
        rows = [_rows(states[number], block) for number in live]
        tokens, sure = step(live, rows, [states[number].cached for number in live])
        for index, number in enumerate(live):
            state, (causal, draft) = states[number], rows[index]
            state.steps += 1
            _advance(state, len(causal), len(draft), tokens[index], sure[index], decoding)
            size = len(prompts[number])
            answer = state.committed[size : size + max_new]
            stop = answer.index(end_id) + 1 if end_id in answer else max_new
            if len(answer) >= stop:
                del state.committed[size + stop :]
                state.done = True
    answers = [s.committed[len(p) :] for s, p in zip(states, prompts, strict=True)]
    return Tally([len(answer) for answer in answers], [s.steps for s in states], answers)


def _extend(state: _Prompt, decoding: Decoding) -> None:
    """Let there be as many active blocks as the thresholds allow."""
    block = decoding.block_size
    if not state.draft:
        state.draft = [-1] * block
    while True:
        count = len(state.draft) // block
        waiting = all(token >= 0 for token in state.draft[:block])
        last = state.draft[-block:]
        filled = sum(token >= 0 for token in last) / block
        if count - waiting >= decoding.active or filled < ADD:
            return
        state.draft += [-1] * block


def _rows(state: _Prompt, block: int) -> tuple[list[int], list[int]]:
    """Return the tokens that run causally, and those of the draft (-1 is a mask)."""
    causal = state.committed[state.cached :]
    draft = state.draft
    if draft and all(token >= 0 for token in draft[:block]):
        return [*causal, *draft[:block]], draft[block:]
    return causal, draft


def _advance(
    state: _Prompt,
    num_causal: int,
    num_draft: int,
    tokens: list[int],
    sure: list[float],
    decoding: Decoding,
) -> None:
    """Commit what is right, accept what is sure.

    Args:
        state: changed.
        num_causal: rows that ran causally: tokens committed before, then a filled block or none.
        num_draft: rows that ran as a draft.
        tokens: each row's prediction of the position after it.
        sure: its confidence.
        decoding: how.
    """
    block = decoding.block_size
    fresh = len(state.committed) - state.cached
    state.cached += fresh
    filled = state.draft[: num_causal - fresh]
    if filled:
        # Nobody predicts the first token where nothing is fresh: it is the base's own already.
        goal = [tokens[fresh - 1] if fresh else filled[0], *tokens[fresh : num_causal - 1]]
        right = 0
        while right < len(filled) and filled[right] == goal[right]:
            right += 1
        state.cached += right
        state.committed += filled[:right]
        if right < len(filled):
            state.committed.append(goal[right])
            state.draft = []
            return
        state.draft = state.draft[block:]
    first = num_causal - 1  # -1: the first token stands there already
    proposed = [-1 if first < 0 else tokens[first], *tokens[num_causal:]]
    certain = [1.0 if first < 0 else sure[first], *sure[num_causal:]]
    if first >= 0:
        state.draft[0] = proposed[0]
    _accept(state.draft, proposed, certain, decoding)


def _accept(draft: list[int], tokens: list[int], sure: list[float], decoding: Decoding) -> None:
    """Fill masks: all above the threshold, and the best of a block that must move.

    `tokens[i]` is proposed for `draft[i]`; the first one is the base's own, so it is always right.
    """
    block = decoding.block_size
    before = 1.0
    for first in range(0, len(draft), block):
        places = [i for i in range(first, first + block) if draft[i] < 0]
        share = 1 - len(places) / block
        if places:
            chosen = [i for i in places if sure[i] > decoding.confidence]
            if not chosen and before >= ACTIVATE:
                chosen = [max(places, key=lambda i: sure[i])]
            for i in chosen:
                draft[i] = tokens[i]
        before = share


class _Step:
    """One forward of many windows, each with rows of the base and rows of the draft."""

    def __init__(
        self,
        streams: Streams,
        adapters: list[AdapterLayer] | None,
        mask_embedding: Tensor,
        cache: _Cache,
        block: int,
    ) -> None:
        self._block = block
        self._streams, self._adapters, self._cache = streams, adapters, cache
        self._mask = mask_embedding

    @torch.no_grad()
    def __call__(
        self, slots: list[int], rows: list[tuple[list[int], list[int]]], starts: list[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return each row's prediction of the next position, and its confidence.

        Caches the causal rows; the draft's are not kept.
        """
        streams, device = self._streams, self._streams.table.device
        width = -(-max(len(causal) + len(draft) for causal, draft in rows) // 8) * 8
        count = len(slots)
        ids = torch.zeros(count, width, dtype=torch.int64)
        kind = torch.full((count, width), 2, dtype=torch.int64)  # causal 0, draft 1, padding 2
        for i, (causal, draft) in enumerate(rows):
            ids[i, : len(causal) + len(draft)] = torch.tensor([*causal, *draft])
            kind[i, : len(causal)] = 0
            kind[i, len(causal) : len(causal) + len(draft)] = 1
        ids, kind = ids.to(device), kind.to(device)
        start = torch.tensor(starts, device=device)
        slot = torch.tensor(slots, device=device)
        places = torch.tensor([len(causal) for causal, _ in rows], device=device)
        states = self._forward(ids, kind, start, slot, places, max(starts))
        flat = states.flatten(0, 1)
        tokens, sure, head = [], [], streams.head.float()
        for first in range(0, len(flat), ROWS):
            # In bf16 many tokens have the same logit, and which is the first one is an accident.
            logits = flat[first : first + ROWS].float() @ head.T
            best = logits.softmax(dim=-1).max(dim=-1)
            tokens.append(best.indices)
            sure.append(best.values)
        shape = (count, width)
        return torch.cat(tokens).view(shape).tolist(), torch.cat(sure).view(shape).tolist()

    def _forward(
        self,
        ids: Tensor,
        kind: Tensor,
        start: Tensor,
        slot: Tensor,
        num_causal: Tensor,
        longest: int,
    ) -> Tensor:
        streams, config = self._streams, self._streams.config
        width = ids.shape[1]
        is_draft = kind == 1
        x = F.embedding(ids.clamp(min=0), streams.table)
        x = torch.where((ids < 0)[..., None], self._mask.to(x.dtype), x)
        place = torch.arange(width, device=ids.device)
        cos, sin, _ = rotary(start[:, None] + place, config)
        # A draft row sees up to the end of its own block, a causal one up to itself.
        offset = place[None, :] - num_causal[:, None]
        block_end = num_causal[:, None] + (offset // self._block + 1) * self._block
        until = torch.where(is_draft, block_end, place[None, :] + 1)  # [S, W]
        near = (place[None, None, :] < until[:, :, None]) & (kind != 2)[:, None, :]
        near |= torch.eye(width, dtype=torch.bool, device=ids.device)
        past = torch.arange(longest, device=ids.device)[None, None, :] < start[:, None, None]
        mask = torch.cat([past.expand(-1, width, -1), near], dim=2)[:, None]
        kept = kind == 0
        keep_row, keep_place = kept.nonzero(as_tuple=True)
        keep_slot, keep_at = slot[keep_row], start[keep_row] + keep_place
        for index, weights in enumerate(streams.layers):
            adapter = None if self._adapters is None else self._adapters[index]
            keys, values = self._cache.keys[index], self._cache.values[index]
            old = keys[slot, :, :longest], values[slot, :, :longest]
            x, k, v = _mixed_layer(x, cos, sin, old, mask, weights, adapter, is_draft, config)
            keys[keep_slot, :, keep_at] = k.transpose(1, 2)[keep_row, keep_place]
            values[keep_slot, :, keep_at] = v.transpose(1, 2)[keep_row, keep_place]
        return F.rms_norm(x, (x.shape[-1],), streams.norm, config.norm_eps)


def _mixed_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: tuple[Tensor, Tensor],
    mask: Tensor,
    weights: Any,
    adapter: AdapterLayer | None,
    is_draft: Tensor,
    config: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer where the adapter counts in the draft's rows alone."""
    rows, length, size = x.shape
    head, queries, keys = config.head_dim, config.num_heads, config.num_kv_heads
    gate = is_draft[..., None].to(x.dtype)

    def low(h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(h, a) * gate, b)

    h = F.rms_norm(x, (size,), weights.first_norm, config.norm_eps)
    joined = F.linear(h, weights.qkv, weights.qkv_bias)
    q, k, v = torch.split(joined, [queries * head, keys * head, keys * head], dim=-1)
    if adapter is not None:
        a_q, a_k, a_v = adapter.qkv_a.chunk(3)
        q, k = q + low(h, a_q, adapter.q_b), k + low(h, a_k, adapter.k_b)
        v = v + low(h, a_v, adapter.v_b)
    q, k = q.view(rows, length, queries, head), k.view(rows, length, keys, head)
    if weights.q_norm is not None:
        q = F.rms_norm(q, (head,), weights.q_norm, config.norm_eps)
    if weights.k_norm is not None:
        k = F.rms_norm(k, (head,), weights.k_norm, config.norm_eps)
    q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
    v = v.view(rows, length, keys, head).transpose(1, 2)
    all_k, all_v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    group = queries // keys
    mixed = F.scaled_dot_product_attention(
        q, all_k.repeat_interleave(group, dim=1), all_v.repeat_interleave(group, dim=1),
        attn_mask=mask,
    )  # fmt: skip
    mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
    y = F.linear(mixed, weights.out)
    if adapter is not None:
        y = y + low(mixed, adapter.out_a, adapter.out_b)
    x = x + y
    h = F.rms_norm(x, (size,), weights.second_norm, config.norm_eps)
    g, u = F.linear(h, weights.gate_up).chunk(2, dim=-1)
    if adapter is not None:
        a_g, a_u = adapter.gate_up_a.chunk(2)
        g, u = g + low(h, a_g, adapter.gate_b), u + low(h, a_u, adapter.up_b)
    h = F.silu(g) * u
    y = F.linear(h, weights.down)
    if adapter is not None:
        y = y + low(h, adapter.down_a, adapter.down_b)
    return x + y, k, v
