"""Logits that are no numbers end a stream with one error; ids without a token never come."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from d2f_export.onnx.artefact import Description, write_artefact
from d2f_export.onnx.quantize import Quantization
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend
from d2f_runtime.backends.rows import broken_rows
from d2f_runtime.backends.scripted import ByteCodec
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelKey, ModelParts
from d2f_runtime.models.checkpoints import save_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import ModelDamaged
from d2f_stream.core.params import GenerationParams
from tiny_models import CONFIGS, NUM_TOKENS, tiny_model

pytestmark = pytest.mark.torch

Damage = Callable[[Transformer], None]

PROMPT = [10, 40, 77, 120, 9]
SOUND = [10, 40, 78, 120, 9]  # without the token that is damaged
GREEDY = GenerationParams(max_new_tokens=16, block_size=8)
SAMPLED = GREEDY.with_overrides({"temperature": 0.8, "seed": 1, "rank": "margin"})


def with_torch(model: Transformer, runner: str) -> Backend:
    kind: Literal["fast", "plain"] = "fast" if runner == "fast" else "plain"
    return TorchBackend(model, name=runner, runner=kind, max_tokens=512)


def with_onnx(model: Transformer, folder: Path, quantization: Quantization) -> Backend:
    save_checkpoint(folder / "checkpoint", model)
    (folder / "tokenizer.json").write_text("{}")
    about = Description(name="tiny", tokenizer=folder / "tokenizer.json")
    write_artefact(folder / "checkpoint", folder / "onnx", about, quantization=quantization)
    return open_backend("onnx", folder / "onnx", device="cpu", quantization="auto")


def params_for(config: TransformerConfig, params: GenerationParams) -> GenerationParams:
    return params.with_overrides({"block_size": min(8, config.max_block_size)})


def damaged(family: str, damage: Damage) -> Transformer:
    config = replace(CONFIGS[family], tie_embeddings=False, unnamed_ids=(77,))
    model = tiny_model(config)  # whose answers do not hold what is damaged
    with torch.no_grad():
        damage(model)
    return model


def in_the_head(value: float) -> Damage:
    def damage(model: Transformer) -> None:
        model.lm_head.weight[NUM_TOKENS - 1] = value
        model.lm_head.weight[NUM_TOKENS:] = float("nan")  # padding: it does not matter

    return damage


def in_a_layer(value: float) -> Damage:
    def damage(model: Transformer) -> None:
        model.layers[0].mlp.down_proj.weight[5, 7] = value  # type: ignore[union-attr,operator]

    return damage


def overflowing(layer: int, features: slice) -> Damage:
    def damage(model: Transformer) -> None:
        model.layers[layer].mlp.up_proj.weight.mul_(1e15)  # type: ignore[union-attr,operator]
        down = model.layers[layer].mlp.down_proj.weight  # type: ignore[union-attr]
        down[features].mul_(1e30)  # type: ignore[index]

    return damage


async def refused(backend: Backend, params: GenerationParams) -> None:
    async with LocalEngine.over(backend, ByteCodec()) as engine:
        with pytest.raises(ModelDamaged, match=r"logits at canvas position .* are NaN or infinite"):
            await asyncio.wait_for(engine.generate(PROMPT, params).result(), 60)
        assert engine.usable


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [in_the_head, in_a_layer])
@pytest.mark.parametrize("runner", ["plain", "fast"])
@pytest.mark.parametrize("family", ["llada", "dream", "llama"])
async def test_torch_says_that_logits_are_no_numbers(
    family: str,
    runner: str,
    place: Callable[[float], Damage],
    value: float,
    params: GenerationParams,
) -> None:
    model = damaged(family, place(value))
    await refused(with_torch(model, runner), params_for(model.config, params))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("features", [slice(5, 6), slice(None)])  # integers can hide a single one
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("quantization", ["fp32", "int8", "int4", "int4-int8"])
@pytest.mark.parametrize("family", ["llada", "dream"])
async def test_graph_says_that_logits_are_no_numbers(
    tmp_path: Path,
    family: str,
    quantization: Quantization,
    layer: int,
    features: slice,
    params: GenerationParams,
) -> None:
    """The weights are numbers, or no graph would be written; what they make of a prompt is none."""
    model = damaged(family, overflowing(layer, features))
    await refused(with_onnx(model, tmp_path, quantization), params)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_exported(tmp_path: Path, value: float) -> None:
    with pytest.raises(ModelDamaged, match=r"layers\.0\.mlp\.down_proj\.weight holds values that"):
        with_onnx(damaged("llada", in_a_layer(value)), tmp_path, "int8")


@pytest.mark.parametrize("runner", ["plain", "fast"])
async def test_only_the_stream_that_meets_the_damage_ends(runner: str) -> None:
    """Its K/V are no numbers either, and lie where other streams' will lie."""

    def damage(model: Transformer) -> None:
        model.embed_tokens.weight[PROMPT[2]] = float("nan")

    sound = with_torch(damaged("llada", lambda model: None), runner)
    async with LocalEngine.over(sound, ByteCodec()) as engine:
        wanted = (await engine.generate(SOUND, GREEDY).result()).token_ids
    broken = with_torch(damaged("llada", damage), runner)
    async with LocalEngine.over(broken, ByteCodec()) as engine:
        for _ in range(3):
            prompts = [SOUND, PROMPT * 9, SOUND, PROMPT, SOUND]
            sessions = [engine.generate(prompt, GREEDY) for prompt in prompts]
            results = [session.result() for session in sessions]
            found = await asyncio.gather(*results, return_exceptions=True)
            assert [isinstance(answer, ModelDamaged) for answer in found] == [False, True] * 2 + [
                False
            ]
            for answer in found[::2]:
                assert not isinstance(answer, BaseException)
                assert answer.token_ids == wanted


async def test_what_is_no_number_is_no_prompts_beginning() -> None:
    def damage(model: Transformer) -> None:
        model.embed_tokens.weight[77] = float("nan")

    begin = [10 + i for i in range(20)]
    prompts = [[*begin, 50], [*begin, 77], [*begin, 60], [*begin, 77, 8], [*begin, 50, 60]]
    params = params_for(CONFIGS["llama"], GREEDY)
    alone = with_torch(damaged("llama", damage), "plain")
    async with LocalEngine.over(alone, ByteCodec()) as engine:
        sessions = [engine.generate(prompt, params) for prompt in prompts[::2]]
        wanted = [(await session.result()).token_ids for session in sessions]
    for order in (prompts, prompts[1:] + prompts[:1]):
        parts = ModelParts(with_torch(damaged("llama", damage), "plain"), ByteCodec(), params)
        key = ModelKey(Path("/broken") / str(len(order[0])), "torch", "cpu", "fp32")
        engine = LocalEngine(MODELS.lease(key, "broken", partial(lambda made: made, parts)))
        async with engine:
            for prompt in order:
                if 77 in prompt:
                    with pytest.raises(ModelDamaged):
                        await engine.generate(prompt, params).result()
                else:
                    answer = await engine.generate(prompt, params).result()
                    assert answer.token_ids == wanted[prompts.index(prompt) // 2]
            assert engine.current_load.reused_tokens > 0


def test_rows_with_a_confidence_that_is_none() -> None:
    answers = np.ones((4, 6), np.float32)
    masks = [[0], [], [1, 2, 3], [], [0, 1]]
    assert broken_rows(masks, answers) == []
    answers[1, [1, 3, 5]] = np.nan
    assert broken_rows(masks, answers) == [2, 4]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 100.0])
@pytest.mark.parametrize("backend", ["plain", "onnx"])
async def test_extreme_temperatures_are_no_damage(
    tmp_path: Path, backend: str, temperature: float
) -> None:
    model = tiny_model(CONFIGS["llada"])
    made = with_onnx(model, tmp_path, "fp32") if backend == "onnx" else with_torch(model, backend)
    async with LocalEngine.over(made, ByteCodec()) as engine:
        greedy = await engine.generate(PROMPT, GREEDY).result()
        changed = GREEDY.with_overrides({"temperature": temperature, "seed": 1})
        answer = await engine.generate(PROMPT, changed).result()
        if temperature < 1e-3:
            assert answer.token_ids[:1] == greedy.token_ids[:1]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backend", ["plain", "fast", "fp32", "int8"])
@pytest.mark.parametrize("family", ["llada", "dream"])
async def test_ids_without_a_token_are_never_produced(
    tmp_path: Path, family: str, backend: Any, params: GenerationParams
) -> None:
    unnamed = tuple(range(20, 130, 2))
    model = tiny_model(replace(CONFIGS[family], unnamed_ids=unnamed))
    with torch.no_grad():
        model.lm_head.weight[list(unnamed)] *= 3  # they would win
    if backend in ("plain", "fast"):
        made = with_torch(model, backend)
    else:
        made = with_onnx(model, tmp_path, backend)
    async with LocalEngine.over(made, ByteCodec()) as engine:
        answers = [engine.generate([9 + i, 40], params).result() for i in range(4)]
        found = {token for answer in await asyncio.gather(*answers) for token in answer.token_ids}
    assert len(found) > 3
    assert not found & {*unnamed, model.config.mask_id, *range(NUM_TOKENS, 160)}
