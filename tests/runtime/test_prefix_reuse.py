"""Stored K/V serve later prompts: the answers are those of an engine that computes everything."""

import random
from collections.abc import Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from d2f_runtime.backends.onnx_backend import load
from d2f_runtime.backends.scripted import ByteCodec
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.engine import LocalEngine
from d2f_runtime.engine.answer_params import default_params
from d2f_runtime.loaded_model import LoadedModel, ModelParts
from d2f_stream import GenerationParams, StreamNames
from d2f_stream.core.limits import Limits
from tiny_models import CONFIGS, Stored, tiny_folder, tiny_model

pytestmark = pytest.mark.torch

PARAMS = GenerationParams(max_new_tokens=13, block_size=4, max_active_blocks=2, tail="cut")


def parts_of(family: str, *, max_tokens: int = 4096) -> ModelParts:
    model = tiny_model(CONFIGS[family])
    backend = TorchBackend(model, name=family, device="cpu", max_tokens=max_tokens)
    size = backend.info.native_block_size if family in ("llama", "sdar") else PARAMS.block_size
    return ModelParts(backend, ByteCodec(), PARAMS.with_overrides({"block_size": size}))


@asynccontextmanager
async def engine_of(family: str, *, keeps: bool, **options: Any) -> Any:
    parts = parts_of(family, **options)
    model = LoadedModel(family, lambda: parts, keeps_prefixes=keeps)
    async with LocalEngine(model) as engine:
        yield engine, model
    model.device.stop(last=model.do_close)
    model.device.join(10.0)


def text(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, 40) for _ in range(length)]


async def converse(engine: LocalEngine, opening: Sequence[int], turns: int) -> list[list[int]]:
    """Ask, and ask again with all that was said before; return the answers."""
    prompt, answers = list(opening), []
    for turn in range(turns):
        result = await engine.generate(prompt).result()
        answers.append(list(result.token_ids))
        prompt += [*result.token_ids, *text(turn, 5)]
    return answers


@pytest.mark.parametrize("family", ["llama", "a2d", "sdar", "llada", "dream", "fast_dllm_v2"])
async def test_conversation_is_the_same_with_and_without(family: str) -> None:
    opening = text(7, 17)
    async with engine_of(family, keeps=False) as (engine, _):
        wanted = await converse(engine, opening, turns=4)
    async with engine_of(family, keeps=True) as (engine, model):
        assert await converse(engine, opening, turns=4) == wanted
        again = await converse(engine, opening, turns=1)
        assert again == wanted[:1]
        reused = model.prefixes.num_tokens_reused if model.prefixes else 0
    # Bidirectional prompts depend on all of themselves: only the same one again is served, and
    # with shifted logits not even that.
    assert reused > 3 * 17 if family in ("llama", "a2d", "sdar", "fast_dllm_v2") else True
    assert reused == {"llada": 17, "dream": 0}.get(family, reused)


@pytest.mark.parametrize("family", ["llada", "sdar", "llama"])
@pytest.mark.parametrize("stored", ["fp32", "int8", "int4"])
async def test_graph_answers_the_same_whatever_was_asked_before(
    family: str, stored: Stored
) -> None:
    backend = load(tiny_folder(family, stored), device="cpu")
    parts = ModelParts(backend, ByteCodec(), default_params(backend.info))
    model = LoadedModel(family, lambda: parts, keeps_prefixes=True)
    async with LocalEngine(model) as engine:
        for seed in range(12):
            prompt = text(seed, 24)
            ask = partial(engine.generate, max_new_tokens=16, confidence_threshold=0.05)
            first, again = [await ask(prompt).result() for _ in range(2)]
            assert (again.token_ids, again.usage) == (first.token_ids, first.usage)
    # int8 graphs scale what a window holds by all of it, the prompt too.
    assert (model.prefixes is None) is (stored == "int8")
    model.device.stop(last=model.do_close)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("family", ["llama", "a2d", "sdar", "fast_dllm_v2", "llada", "dream"])
async def test_prompt_in_pieces_is_answered_as_in_one(family: str, keeps: bool) -> None:
    prompts = [text(seed, 60 + seed) for seed in range(3)]
    prompts.append([*prompts[0], *text(9, 20)])
    found: list[list[tuple[int, ...]]] = []
    for most in (1 << 20, 24):
        model = LoadedModel(family, partial(parts_of, family), keeps_prefixes=keeps)
        async with LocalEngine(model, limits=Limits(max_step_tokens=most)) as engine:
            sessions = [engine.generate(prompt) for prompt in prompts]
            found.append([(await session.result()).token_ids for session in sessions])
            late = await engine.generate(prompts[0]).result()
            assert late.token_ids == found[-1][0]
        model.device.stop(last=model.do_close)
        model.device.join(10.0)
    assert found[0] == found[1]


async def test_next_turn_computes_only_what_is_new() -> None:
    async with engine_of("a2d", keeps=True) as (engine, model):
        prompt = text(3, 40)
        first = await engine.generate(prompt).result()
        following = [*prompt, *first.token_ids, *text(4, 6)]
        await engine.generate(following).result()
        assert model.prefixes is not None
        # All but the last token of what was committed; the new question is what is left.
        assert model.prefixes.num_tokens_reused >= len(prompt) + len(first.token_ids) - 1


async def test_running_session_serves_samples_of_its_prompt() -> None:
    prompt = text(5, 30)
    async with engine_of("llada", keeps=True) as (engine, model):
        first = engine.generate(prompt)
        await anext(first)
        others = [engine.generate(prompt) for _ in range(3)]
        results = [await session.result() for session in (first, *others)]
        assert len({result.token_ids for result in results}) == 1
        assert model.prefixes is not None
        assert model.prefixes.num_tokens_reused == 3 * len(prompt)


async def test_nobody_is_served_from_what_another_asked() -> None:
    prompt = text(6, 30)
    async with engine_of("a2d", keeps=True) as (engine, model):
        assert model.prefixes is not None
        for name, (asker, is_served) in enumerate((("alice", 0), ("bob", 0), ("alice", 1))):
            names = StreamNames(f"s{name}", f"r{name}", asker)
            await engine.generate(prompt, names=names).result()
            assert (model.prefixes.num_tokens_reused > 0) == is_served


async def test_kept_slots_give_way_to_requests() -> None:
    async with engine_of("a2d", keeps=True, max_tokens=128) as (engine, model):
        for seed in range(6):  # each takes 63 of 128
            await engine.generate(text(seed, 50)).result()
        assert model.prefixes is not None
        assert 1 <= model.prefixes.num_kept <= 2
        assert model.prefixes.kept_tokens <= 128
