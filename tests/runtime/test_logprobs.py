"""Log-probabilities are those of the step that decided on a token; oracles are transformers' own.

Real weights in fp32: a tolerance of 1e-4 is what other orders of summation make of 64 features.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends import open_backend
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.decoding.decoder import Accepted, Committed
from d2f_runtime.decoding.logprobs import LEAST, TokenLogprobs
from d2f_runtime.decoding.width import OWN
from d2f_runtime.engine.denoiser import Denoiser
from d2f_stream.core.events import Block
from d2f_stream.core.params import GenerationParams
from decoding import Case, propose, random_case
from fakes import engine_over
from tiny_models import CONFIGS, MASK, tiny_folder, tiny_model
from transformers_oracle import Oracle, oracle_model


@given(st.randoms(use_true_random=False).map(random_case))
@settings(max_examples=200)
def test_a_token_has_the_probability_of_the_step_that_accepted_it(case: Case) -> None:
    decoder, logprobs = case.decoder(), TokenLogprobs(len(case.prompt))
    cache: list[int] = []
    expected: dict[int, float] = {}
    while (window := decoder.next_window()) is not None:
        canvas, step = (*cache, *window.tokens), decoder.num_steps + 1
        events = decoder.apply(propose(case, cache, window, step))
        accepted = [event for event in events if isinstance(event, Accepted)]
        for position, token in accepted:
            at = len(case.prompt) + position
            visible = window.visible_until()[at - window.start]
            proposed, confidence, _ = case.model(canvas[:visible], at, step)
            assert proposed == token
            expected[position] = math.log(confidence) if confidence else LEAST
        logprobs.note(window, propose(case, cache, window, step), accepted)
        cache += window.tokens[: window.num_to_cache]
        for block in (event for event in events if isinstance(event, Committed)):
            told = logprobs.take(block.start, block.stop)
            assert told == tuple(expected[at] for at in range(block.start, block.stop))


def decode(
    family: str, prompt: Sequence[int], params: GenerationParams, oracle: Oracle | None = None
) -> tuple[list[int], list[float]]:
    """Return tokens and log-probabilities; with an oracle, hold each step against it."""
    backend = open_backend("torch", tiny_folder(family, "torch"), device="cpu", quantization="auto")
    denoiser = Denoiser(prompt_tokens=prompt, params=params, info=backend.info)
    slot = backend.open_slot(len(prompt) + params.max_new_tokens)
    tokens: list[int] = []
    logprobs: list[float] = []
    cache: list[int] = []
    expected: dict[int, float] = {}
    while True:
        row = denoiser.row(slot, OWN)
        window = row.window
        canvas, num_cached = (*cache, *window.tokens), len(cache)
        (proposals,) = backend.step([row])
        progress = denoiser.apply(proposals)
        cache += window.tokens[: window.num_to_cache]
        if oracle is not None:
            stops = (*range(1, num_cached + 1), *window.block_stops)
            if oracle.config.prompt_attention == "full":
                edges = range(len(prompt), num_cached + 1, params.block_size)
                stops = (*edges, *window.block_stops)
            for found in oracle.proposals(canvas, stops):
                expected[found.position - len(prompt)] = math.log(found.confidence)
        for block, values in zip(progress.committed, progress.logprobs, strict=True):
            tokens += block.tokens
            logprobs += values
            if oracle is not None:
                own = [expected[at] for at in range(block.start, block.stop)]
                assert values == pytest.approx(own, abs=1e-4)
        if progress.reason is not None:
            backend.close_slot(slot)
            backend.close()
            return tokens, logprobs


PROMPTS = [[5, 9, 12], [70, 71, 72, 73, 74], [100, 20, 21, 22, 23, 24, 25, 26, 27]]


@pytest.mark.torch
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_drafted_blocks_have_the_probabilities_of_one_forward_over_the_canvas(
    family: str, prompt: list[int]
) -> None:
    config = CONFIGS[family]
    oracle = Oracle(oracle_model(config, tiny_model(config).state_dict()), config)
    params = GenerationParams(
        max_new_tokens=24, block_size=8, confidence_threshold=0.02, logprobs=True
    )
    tokens, logprobs = decode(family, prompt, params, oracle)
    assert len(tokens) == len(logprobs) > 0
    assert max(logprobs) < 0


@pytest.mark.torch
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_verified_tokens_have_the_model_s_own_next_token_probabilities(
    prompt: list[int], temperature: float
) -> None:
    config = CONFIGS["a2d"]
    params = GenerationParams(
        commit="verify",
        max_new_tokens=32,
        block_size=8,
        confidence_threshold=0.02,
        add_threshold=0.2,
        temperature=temperature,
        seed=7,
        logprobs=True,
    )
    tokens, logprobs = decode("a2d", prompt, params)
    twin = oracle_model(config, tiny_model(config).state_dict())
    with torch.no_grad():
        logits = twin(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0].double()
    logits[:, MASK] = -torch.inf
    logits[:, config.num_tokens :] = -torch.inf
    logits /= temperature or 1.0
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    own = [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
    assert logprobs == pytest.approx(own, abs=1e-4)


async def test_blocks_tell_them_where_they_are_asked_for() -> None:
    def sure(position: int, step: int) -> float:
        return 1 / (position + 1) if position != 5 else 0.0

    backend = ScriptedBackend("smile 😀 ok", confidence=sure)
    async with engine_over(backend) as engine:
        plain = [block async for block in engine.generate("hi")]
        blocks = [block async for block in engine.generate("hi", logprobs=True)]
    assert all((block.logprobs, block.texts) == ((), ()) for block in plain)
    assert [block.token_ids for block in blocks] == [block.token_ids for block in plain]
    told = [value for block in blocks for value in block.logprobs]
    assert told == [math.log(1 / (at + 1)) if at != 5 else LEAST for at in range(len(told))]
    texts = [text for block in blocks for text in block.texts]
    assert texts == [*"smile ", "", "", "", "😀", *" ok", ""]


async def test_token_texts_do_not_end_at_a_stop_string() -> None:
    async with engine_over(ScriptedBackend("one, two. Three")) as engine:
        session = engine.generate("hi", stop=". T", logprobs=True)
        blocks = [event async for event in session.events() if isinstance(event, Block)]
    assert "".join(block.text for block in blocks) == "one, two"
    assert "".join(text for block in blocks for text in block.texts).startswith("one, two. T")
    assert all(len(b.logprobs) == len(b.texts) == len(b.token_ids) for b in blocks)
