"""Single steps of a decoder with hand-written proposals."""

from collections.abc import Mapping

from d2f_runtime.decoding.decoder import Accepted, BlockDecoder, Committed, Edited
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window

M = 99  # the mask
EOS = 1
EOT = 2
PROMPT = (10, 11, 12)


def proposals(
    window: Window, sure: Mapping[int, int], *, num_prompt: int = 3, default: int = 50
) -> Proposals:
    """Propose `sure` (answer position: token) confidently, the default weakly at other masks."""
    tokens = [default if token == M else NO_TOKEN for token in window.tokens]
    confidence = [0.5 if token == M else 0.0 for token in window.tokens]
    for position, token in sure.items():
        tokens[position + num_prompt - window.start] = token
        confidence[position + num_prompt - window.start] = 0.95
    return Proposals(tokens, confidence)


def step(
    decoder: BlockDecoder, sure: Mapping[int, int], *, num_prompt: int = 3
) -> list[Accepted | Edited | Committed]:
    """Run one step."""
    window = pending(decoder)
    return decoder.apply(proposals(window, sure, num_prompt=num_prompt))


def pending(decoder: BlockDecoder) -> Window:
    """Return the window of the next step, which there must be."""
    window = decoder.next_window()
    assert window is not None
    return window
