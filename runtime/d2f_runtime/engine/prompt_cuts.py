"""PromptCuts: where a prompt may be cut, so that its K/V are computed in pieces. Pure arithmetic.

A position of a prompt sees its own attention block and all before it. Cut between two of these
blocks, pieces that run one after the other therefore store what the whole prompt would: a causal
prompt may be cut anywhere, one on a grid at the grid's edges, and one that is a single block
nowhere. The last attention block always stays for the first window of the answer, which is
predicted from it.
"""

from dataclasses import dataclass

from d2f_runtime.models.facts import ModelInfo

__all__ = ["Piece", "PromptCuts"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a prompt that a step stores.

    Attributes:
        num_tokens: how many, from the first one that is not stored yet.
        is_last: whether these are all that is left, so that the answer's first window is in the
            same step; else the step runs nothing besides for this session.
    """

    num_tokens: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class PromptCuts:
    """The edges at which one prompt may be cut.

    Attributes:
        num_tokens: of the prompt, 0 where none of it is ever stored.
        spacing: positions from one edge to the next; 0 has no edges.
        offset: the edges leave this when they are divided by the spacing.
    """

    num_tokens: int
    spacing: int = 0
    offset: int = 0

    @classmethod
    def of(cls, num_tokens: int, info: ModelInfo) -> "PromptCuts":
        """Return the edges of a prompt of a model."""
        size = info.native_block_size
        if info.window_scaled:  # what is computed depends on what else the window holds
            return cls(num_tokens)
        match info.prompt_attention:
            case "causal":
                return cls(num_tokens, 1)
            case "grid":
                return cls(num_tokens, size)
            case "prompt_grid":
                return cls(num_tokens, size, num_tokens % size)
            case "full":
                return cls(num_tokens)

    def piece(self, start: int, max_tokens: int) -> Piece:
        """Return the piece that begins at a position, where an edge is, or the prompt's begin.

        The longest one of at most `max_tokens`; longer, where there is no edge so near.
        """
        left = self.num_tokens - start
        if left <= max_tokens or not self.spacing:
            return Piece(left, is_last=True)
        stop = start + max_tokens
        stop -= (stop - self.offset) % self.spacing
        if stop <= start:
            stop += self.spacing
        if stop >= self.num_tokens:
            return Piece(left, is_last=True)
        return Piece(stop - start, is_last=False)

    def piece_within(self, start: int, max_tokens: int, *, window: float, room: float) -> Piece:
        """Return the piece that begins at a position, with what runs beside it in the room.

        The last piece brings the first window of the answer with it. Where both do not fit, the
        piece ends before the prompt does, if there is an edge.

        Args:
            start: of the piece.
            max_tokens: of it, see `piece`.
            window: rows of the answer's first window.
            room: rows that the piece and what it brings may have.
        """
        piece = self.piece(start, max_tokens)
        if piece.is_last and piece.num_tokens + window > room and piece.num_tokens > 1:
            return self.piece(start, piece.num_tokens - 1)
        return piece

    def stops(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the edges behind `start` up to `stop`, which is one."""
        first = start + 1
        first += (self.offset - first) % self.spacing
        return tuple(range(first, stop + 1, self.spacing))
