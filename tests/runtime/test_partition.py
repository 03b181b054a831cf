import pytest

from d2f_runtime.decoding.decoder import Accepted, BlockDecoder, BlockView, Committed
from d2f_runtime.decoding.partition import Partition
from d2f_runtime.decoding.window import Window
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams
from stepping import EOS, PROMPT, M, step

SMALL = GenerationParams(max_new_tokens=8, block_size=4)


def on_grid(num_prompt: int, *, max_new_tokens: int = 8) -> BlockDecoder:
    """Return a decoder of blocks on multiples of four."""
    return BlockDecoder(
        prompt_tokens=range(10, 10 + num_prompt),
        params=GenerationParams(max_new_tokens=max_new_tokens, add_threshold=1.0),
        mask_id=M,
        eos_ids=(EOS,),
        prompt_attention="grid",
        native_block_size=4,
    )


def test_full_prompt_is_one_attention_block() -> None:
    partition = Partition.of(3, SMALL, "full", None)
    assert partition.stops(0, 11) == (3, 7, 11)
    assert partition.stops(7, 11) == (11,)
    assert [partition.block_at(at) for at in (3, 6, 7)] == [(0, 3, 7), (0, 3, 7), (1, 7, 11)]


def test_causal_prompt_is_one_attention_block_per_position() -> None:
    partition = Partition.of(3, SMALL, "causal", None)
    assert partition.stops(1, 11) == (2, 3, 7, 11)


def test_prompt_grid_ends_with_the_prompt() -> None:
    assert Partition.of(10, SMALL, "prompt_grid", 4).stops(0, 18) == (2, 6, 10, 14, 18)
    assert Partition.of(8, SMALL, "prompt_grid", 4).stops(0, 16) == (4, 8, 12, 16)
    assert Partition.of(3, SMALL, "prompt_grid", 4).stops(0, 11) == (3, 7, 11)


def test_grid_blocks_lie_on_absolute_multiples() -> None:
    partition = Partition.of(10, SMALL, "grid", 4)
    assert partition.stops(0, 16) == (4, 8, 12, 16)
    assert partition.stops(8, 18) == (12, 16, 18)
    assert [partition.block_at(at) for at in (10, 12, 16)] == [(0, 8, 12), (1, 12, 16), (2, 16, 18)]


def test_autoregression_runs_one_new_token_and_a_placeholder() -> None:
    decoder = BlockDecoder(
        prompt_tokens=PROMPT,
        params=GenerationParams(max_new_tokens=5, block_size=1),
        mask_id=M,
        eos_ids=(EOS,),
        shift_logits=True,
        prompt_attention="causal",
    )
    assert decoder.next_window() == Window(0, (*PROMPT, M), 3, (1, 2, 3, 4))
    assert step(decoder, {0: 20}) == [Accepted(0, 20), Committed(0, 0, 1, (20,))]
    assert decoder.next_window() == Window(3, (20, M), 1, (4, 5))


def test_grid_keeps_the_prompts_last_tokens_in_the_first_answer_block() -> None:
    decoder = on_grid(6)
    window = Window(0, (10, 11, 12, 13, 14, 15, M, M), 4, (4, 8))
    assert decoder.next_window() == window
    assert decoder.active_blocks == (BlockView(0, 0, 2, (M, M)),)
    events = step(decoder, {0: 20, 1: 21}, num_prompt=6)
    assert events[-1] == Committed(0, 0, 2, (20, 21))
    assert decoder.next_window() == Window(4, (14, 15, 20, 21, M, M, M, M), 4, (8, 12))


def test_grid_counts_prompt_tokens_as_progress() -> None:
    decoder = BlockDecoder(
        prompt_tokens=range(10, 13),
        params=GenerationParams(max_new_tokens=9, add_threshold=0.75),
        mask_id=M,
        eos_ids=(EOS,),
        prompt_attention="grid",
        native_block_size=4,
    )
    decoder.next_window()
    assert decoder.active_blocks == (BlockView(0, 0, 1, (M,)),)
    step(decoder, {})
    assert decoder.next_window() == Window(0, (10, 11, 12, 50, M, M, M, M), 4, (4, 8))


def test_grid_ends_at_max_new_tokens() -> None:
    decoder = on_grid(4, max_new_tokens=5)
    step(decoder, {0: 20, 1: 21, 2: 22, 3: 23}, num_prompt=4)
    assert decoder.next_window() == Window(4, (20, 21, 22, 23, M), 4, (8, 9))


def test_grid_without_a_whole_block_is_refused_when_the_tail_is_dropped() -> None:
    with pytest.raises(InvalidParams, match="max_new_tokens is 2 but must be at least 3"):
        BlockDecoder(
            prompt_tokens=range(10, 15),
            params=GenerationParams(max_new_tokens=2, block_size=2, tail="drop"),
            mask_id=M,
            eos_ids=(EOS,),
            prompt_attention="grid",
            native_block_size=4,
        )


def test_grid_needs_a_block_size() -> None:
    with pytest.raises(ValueError, match="native_block_size"):
        BlockDecoder(
            prompt_tokens=PROMPT, params=SMALL, mask_id=M, eos_ids=(), prompt_attention="grid"
        )
