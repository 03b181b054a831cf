"""Where the blocks of one canvas lie: the prompt's attention blocks, the answer's decoding blocks.

Pure arithmetic on lengths; knows no tokens and no state. Answer blocks are attention blocks too.
"""

from dataclasses import dataclass
from typing import Literal

from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams

__all__ = ["Partition", "PromptAttention"]

PromptAttention = Literal["full", "causal", "grid", "prompt_grid"]


@dataclass(frozen=True, slots=True)
class Partition:
    """Block edges as canvas positions.

    Attributes:
        num_prompt: length of the prompt; the answer begins there.
        origin: where the first answer block begins: at `num_prompt`, or before it on a grid whose
            last block the prompt does not fill.
        block_size: of the answer blocks; the last one may be shorter.
        end: where the last block ends.
        limit: where the longest allowed answer ends: before `end` where that block is denoised
            whole.
        prompt_stops: stops of the attention blocks before `origin`.
    """

    num_prompt: int
    origin: int
    block_size: int
    end: int
    limit: int
    prompt_stops: range

    @classmethod
    def of(
        cls,
        num_prompt: int,
        params: GenerationParams,
        prompt_attention: PromptAttention,
        native_block_size: int | None,
    ) -> "Partition":
        """Lay out a prompt and the answer that `params` allow.

        Args:
            num_prompt: its length, P.
            params: of the request.
            prompt_attention: how the prompt is cut into attention blocks: "full" is one block,
                "causal" one per position; answer blocks of `params.block_size` follow from P on.
                With "grid" all blocks, of attention and of decoding, lie on multiples of
                `native_block_size` (`params.block_size` plays no part): the prompt's whole blocks
                are cached, the rest stands filled at the head of the first answer block.
                "prompt_grid" is a grid that ends with the prompt, whose first block may be shorter.
            native_block_size: of the grid; unused otherwise.

        Raises:
            InvalidParams: no whole block fits and `tail` is "drop".
        """
        origin, block_size = num_prompt, params.block_size
        if prompt_attention in ("grid", "prompt_grid"):
            if native_block_size is None or native_block_size < 1:
                raise ValueError(f"a grid needs a native_block_size, not {native_block_size!r}")
            block_size = native_block_size
            rest = num_prompt % block_size
            if prompt_attention == "grid":
                origin -= rest
                rest = 0
            prompt_stops = range(rest or block_size, origin + 1, block_size)
        elif prompt_attention == "causal":
            prompt_stops = range(1, num_prompt + 1)
        else:
            prompt_stops = range(num_prompt, num_prompt + 1)
        end = num_prompt + params.max_new_tokens
        if params.tail == "drop":
            end -= (end - origin) % block_size
        if end <= num_prompt:
            allowed = f"at least {origin + block_size - num_prompt} here when tail is 'drop'"
            raise InvalidParams("max_new_tokens", params.max_new_tokens, allowed)
        limit = end
        if params.tail == "whole":
            end += (origin - end) % block_size
        return cls(num_prompt, origin, block_size, end, limit, prompt_stops)

    def block_at(self, position: int) -> tuple[int, int, int]:
        """Return index, start and stop of the answer block that holds the position."""
        index = (position - self.origin) // self.block_size
        start = self.origin + index * self.block_size
        return index, start, min(start + self.block_size, self.end)

    def stops(self, start: int, stop: int, *, causal_until: int = 0) -> tuple[int, ...]:
        """Return the attention block stops in start:stop, both on edges, stop in the answer.

        Args:
            start: canvas position; one before `causal_until` is an edge there.
            stop: canvas position.
            causal_until: answer positions before it are attention blocks by themselves.
        """
        begin = max(start, self.origin)
        clean = max(begin, causal_until)
        first = clean - (clean - self.origin) % self.block_size + self.block_size
        answer_stops = (*range(begin + 1, clean + 1), *range(first, stop, self.block_size))
        if clean < stop:
            answer_stops += (stop,)
        if start >= self.origin:
            return answer_stops
        return (*(edge for edge in self.prompt_stops if edge > start), *answer_stops)
