"""Fast-dLLM v2's published decoding loop, naively: the oracle of its sub-blocks.

`FastDllmLoop` is written from reading `generate` in the modeling.py of
Efficient-Large-Model/Fast_dLLM_v2_7B, as it is called without a block cache; it shares nothing with
d2f_runtime. One forward after the other:

- the prompt's whole blocks, whose last row names the next token where no part of a block is left;
- in a block, sub-block by sub-block, until it holds no mask: what is above the threshold is taken,
  and always the most confident one;
- a full block once more, to cache it; its last row names the next block's first token.

The answer ends at the first stop token before which all is filled. Where that code differs: it
loses a prompt of exactly one block (it asks for more than one), and it names one token beyond the
last block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from d2f_runtime.decoding.decoder import Accepted, BlockDecoder
from d2f_runtime.decoding.window import Proposals, Window

Trace = list[list[tuple[int, int]]]
"""By step what was filled: (canvas position, token)."""

# (visible tokens, position) -> (token, confidence)
Propose = Callable[[tuple[int, ...], int], tuple[int, float]]


@dataclass
class FastDllmLoop:
    """One run.

    Attributes:
        steps: what each forward filled.
        x: the canvas, behind the last stop token whatever is there.
    """

    propose: Propose
    mask: int
    stop_tokens: Sequence[int]
    block_size: int
    small_block_size: int
    threshold: float
    x: list[int] = field(default_factory=list)
    steps: Trace = field(default_factory=list)

    def run(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        self.x = list(prompt)
        num_prompt = len(prompt)
        if num_prompt >= self.block_size:
            self.steps.append([])
            if num_prompt % self.block_size == 0:
                self.name_next()
        for _ in range(max_new_tokens // self.block_size):
            if self.is_over(num_prompt):
                break
            missing = self.block_size - len(self.x) % self.block_size
            self.x += [self.mask] * missing
            self.fill_block(num_prompt)
            if self.is_over(num_prompt):
                break
            self.steps.append([])
            self.name_next()

    def is_over(self, num_prompt: int) -> bool:
        stops = [at for at in range(num_prompt, len(self.x)) if self.x[at] in self.stop_tokens]
        return bool(stops) and self.mask not in self.x[num_prompt : stops[0]]

    def name_next(self) -> None:
        token, _ = self.propose((*self.x, self.mask), len(self.x))
        self.steps[-1].append((len(self.x), token))
        self.x.append(token)

    def fill_block(self, num_prompt: int) -> None:
        begin = len(self.x) - self.block_size
        for first in range(begin, len(self.x), self.small_block_size):
            small = range(first, min(first + self.small_block_size, len(self.x)))
            while any(self.x[p] == self.mask for p in small) and not self.is_over(num_prompt):
                found = [
                    (p, *self.propose(tuple(self.x), p)) for p in small if self.x[p] == self.mask
                ]
                best = max(confidence for _, _, confidence in found)
                forced = next(p for p, _, confidence in found if confidence == best)
                taken = [(p, t) for p, t, c in found if c > self.threshold or p == forced]
                for position, token in taken:
                    self.x[position] = token
                self.steps.append(taken)


def filling(steps: Trace, end: int) -> Trace:
    """The published steps as the decoder takes them, to the end of the answer.

    A forward that only caches goes together with the one that comes next, and the token that the
    last block's names lies beyond the end.
    """
    within = [[(position, token) for position, token in step if position < end] for step in steps]
    return [step for step in within if step]


def steps_of(
    decoder: BlockDecoder, num_prompt: int, answer: Callable[[Window], Proposals]
) -> Trace:
    """Run a decoder to its end."""
    trace: Trace = []
    while window := decoder.next_window():
        events = decoder.apply(answer(window))
        trace.append(
            [(e.position + num_prompt, e.token) for e in events if isinstance(e, Accepted)]
        )
    return trace
