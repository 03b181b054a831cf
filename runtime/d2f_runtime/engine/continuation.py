"""Continuation: the blocks of an answer that another engine began, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass

from d2f_runtime.decoding.blocks import Committed
from d2f_stream.core.errors import InvalidRequest
from d2f_stream.core.events import Block, StreamFinished, Timings, Usage

__all__ = ["NEW", "Continuation"]


@dataclass(frozen=True, slots=True)
class Continuation:
    """The blocks of one answer so far, from its first on; none of a new one."""

    blocks: Sequence[Block] = ()

    @property
    def committed(self) -> list[Committed]:
        """The same as the decoder's values."""
        return [Committed(b.index, b.start, b.stop, b.token_ids) for b in self.blocks]

    @property
    def next_seq(self) -> int:
        """Of the event to come."""
        return len(self.blocks) + 1 if self.blocks else 0

    @property
    def num_steps(self) -> int:
        """Steps that the answer took so far."""
        return self.blocks[-1].steps if self.blocks else 0

    @property
    def num_tokens(self) -> int:
        """Committed tokens."""
        return sum(len(block.token_ids) for block in self.blocks)

    @property
    def text_length(self) -> int:
        """Characters so far."""
        return sum(len(block.text) for block in self.blocks)

    @property
    def elapsed_ms(self) -> float:
        """When the last block was committed."""
        return self.blocks[-1].elapsed_ms if self.blocks else 0.0

    @property
    def first_block_ms(self) -> float | None:
        """When the first one was."""
        return self.blocks[0].elapsed_ms if self.blocks else None

    def cancelled(self, stream_id: str) -> StreamFinished:
        """Return the event that ends it where nothing was done of it here."""
        return StreamFinished(
            stream=stream_id,
            seq=self.next_seq,
            reason="cancelled",
            text_length=self.text_length,
            usage=Usage(prompt_tokens=0, completion_tokens=self.num_tokens, steps=self.num_steps),
            timings=Timings(first_block_ms=self.first_block_ms, total_ms=self.elapsed_ms),
        )

    def check(self, num_tokens: int) -> None:
        """Refuse what no engine with such a vocabulary has told.

        Args:
            num_tokens: ids that the model may produce.

        Raises:
            InvalidRequest: numbers of events are missing, or an id is none of the model's.
        """
        for number, block in enumerate(self.blocks):
            if block.seq != number + 1:
                raise InvalidRequest(
                    f"committed block {number} has seq {block.seq} but must have {number + 1}; "
                    "give all blocks from the first one on"
                )
            if beyond := [token for token in block.token_ids if not 0 <= token < num_tokens]:
                raise InvalidRequest(
                    f"committed block {number} holds the id {beyond[0]} but the model has "
                    f"{num_tokens}; continue an answer with the model that began it"
                )


NEW = Continuation()
