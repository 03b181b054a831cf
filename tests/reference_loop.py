"""The reference decoding loop, naively: the oracle of the decoder's tests.

Written from the description of the public D2F code (state, one iteration, acceptance rule, end of
sequence) and sharing nothing with d2f_runtime. Four options lie beyond that code: a bound on the
unfilled blocks, a cut last block, blocks on absolute multiples of the block size, and sub-blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MASK = 99

# (visible tokens, position, step) -> (token, confidence, rank)
Propose = Callable[[tuple[int, ...], int, int], tuple[int, float, float]]


@dataclass
class RefBlock:
    start: int
    end: int
    mask_count: int
    state: str  # "active" | "to_cache" | "in_cache"
    is_complete: bool

    def progress(self) -> float:
        total = self.end - self.start
        return (total - self.mask_count) / total if total else 1.0


@dataclass
class RefStep:
    start: int
    tokens: list[int]
    new_kv: int
    accepted: list[tuple[int, int]] = field(default_factory=list)  # (canvas position, token)


@dataclass
class RefResult:
    steps: list[RefStep]
    canvas: list[int]


@dataclass
class RefSettings:
    block_size: int
    max_new_tokens: int
    block_add_threshold: float
    decoded_token_threshold: float
    skip_threshold: float
    eos_ids: Sequence[int]
    max_active_blocks: int | None = None
    cut_tail: bool = False
    grid: bool = False
    sub_block_size: int = 0
    shifted: bool = False


def reference_loop(prompt: Sequence[int], propose: Propose, settings: RefSettings) -> RefResult:
    x = list(prompt)
    first = len(prompt) - (len(prompt) % settings.block_size if settings.grid else 0)
    limit = len(prompt) + settings.max_new_tokens
    blocks = [RefBlock(0, first, 0, "to_cache", True)]
    cache_length = 0
    eos_detected = False
    steps: list[RefStep] = []
    while True:
        if not eos_detected:
            append_block(x, blocks, limit, settings)
        for k in range(len(blocks) - 1):
            if blocks[k].progress() >= settings.decoded_token_threshold:
                blocks[k + 1].is_complete = True
        current_blocks = sum(1 for b in blocks if b.state == "active")
        if MASK not in x and current_blocks == 0:
            break
        step = choose_input(x, blocks, cache_length)
        if step is None:
            break
        steps.append(step)
        for b in blocks:
            if b.state == "to_cache":
                b.state = "in_cache"
        cache_length += step.new_kv
        seen = list(x)  # no block sees tokens accepted in the same iteration
        for b in blocks:
            if b.state == "active":
                step.accepted += denoise(x, b, seen, propose, len(steps), settings)
        if any(token in settings.eos_ids for _, token in step.accepted):
            eos_detected = True
        retire(x, blocks)
        assert len(steps) <= 10000
    return RefResult(steps, x)


def append_block(x: list[int], blocks: list[RefBlock], limit: int, settings: RefSettings) -> None:
    start = blocks[-1].end
    end = start + settings.block_size
    if end > limit:
        if not settings.cut_tail or start >= limit:
            return
        end = limit
    if blocks[-1].progress() < settings.block_add_threshold:
        return
    unfilled = sum(1 for b in blocks if b.mask_count > 0)
    if settings.max_active_blocks is not None and unfilled >= settings.max_active_blocks:
        return
    mask_count = end - len(x)  # on a grid the first block begins with prompt tokens
    x += [MASK] * mask_count
    blocks.append(RefBlock(start, end, mask_count, "active", False))


def choose_input(x: list[int], blocks: list[RefBlock], cache_length: int) -> RefStep | None:
    to_cache = [b for b in blocks if b.state == "to_cache" and b.end > b.start]
    if to_cache:
        start = min(b.start for b in to_cache)
        return RefStep(start, x[start:], max(b.end for b in to_cache) - start)
    active = [b for b in blocks if b.state == "active" and b.start >= cache_length]
    if not active:
        return None
    return RefStep(active[0].start, x[active[0].start :], 0)


def denoise(
    x: list[int],
    block: RefBlock,
    seen: list[int],
    propose: Propose,
    step: int,
    settings: RefSettings,
) -> list[tuple[int, int]]:
    visible = tuple(seen[: block.end])
    asked = [position for position in range(block.start, block.end) if seen[position] == MASK]
    if not asked:
        return []
    if settings.sub_block_size:
        if settings.shifted and asked == list(range(block.start, block.end)):
            visible = tuple(seen[: block.start + 1])  # the row before sees nothing of the rest
            asked = asked[:1]
        else:
            parts = [(position - block.start) // settings.sub_block_size for position in asked]
            asked = [p for p, part in zip(asked, parts, strict=True) if part == parts[0]]
    proposals = [(position, *propose(visible, position, step)) for position in asked]
    chosen = [p for p in proposals if p[2] > settings.skip_threshold]
    if not chosen and block.is_complete:
        best = max(p[3] for p in proposals)
        chosen = [p for p in proposals if p[3] == best][:1]
    for position, token, _, _ in chosen:
        x[position] = token
        block.mask_count -= 1
    return [(position, token) for position, token, _, _ in chosen]


def retire(x: list[int], blocks: list[RefBlock]) -> None:
    for k, block in enumerate(blocks):
        if block.state != "active" or MASK in x[block.start : block.end]:
            continue
        if all(earlier.state != "active" for earlier in blocks[:k]):
            block.state = "to_cache"
