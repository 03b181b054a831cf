"""How much K/V a pool takes, and what a request longer than that is told."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import d2f_stream
from d2f_runtime.backends import torch_backend
from d2f_runtime.backends.kv_pool import free_bytes, pool_tokens
from d2f_runtime.backends.scripted import ByteCodec
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.errors import InvalidParams, InvalidRequest, PromptTooLong, UnsupportedModel
from tiny_checkpoints import write_model
from tiny_models import CONFIGS, tiny_model

pytestmark = pytest.mark.torch

KIB, GIB = 1 << 10, 1 << 30
DREAM, LLADA = 56 * KIB, 512 * KIB  # bytes of one token, bf16


@pytest.mark.parametrize(
    ("max_positions", "bytes_per_token", "free", "wanted"),
    [
        pytest.param(4096, LLADA, 60 * GIB, 4096, id="a request of full length"),
        pytest.param(131_072, DREAM, 60 * GIB, 131_072, id="however long it is"),
        pytest.param(131_072, DREAM, 8 * GIB, 4 * GIB // DREAM, id="but half of what is free"),
        pytest.param(131_072, DREAM, GIB, GIB // DREAM, id="and at least 1 GiB"),
        pytest.param(4096, 2 * KIB, 60 * GIB, GIB // (2 * KIB), id="1 GiB of many short ones"),
        pytest.param(131_072, DREAM, None, 131_072, id="nothing known of the memory"),
    ],
)
def test_pool_has_room_for(
    max_positions: int, bytes_per_token: int, free: int | None, wanted: int
) -> None:
    assert pool_tokens(max_positions, bytes_per_token, free) == wanted


def test_pool_has_room_for_a_crowd_where_memory_is_plenty() -> None:
    assert pool_tokens(4096, LLADA, 60 * GIB, crowd=10_000) == 10_000
    assert pool_tokens(4096, LLADA, 40 * GIB, crowd=65_536) == 5 * GIB // LLADA, "an eighth"
    assert pool_tokens(4096, LLADA, GIB, crowd=65_536) == pool_tokens(4096, LLADA, GIB)


def test_free_memory_of_a_cpu_is_a_number_or_unknown() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 1 << 20


async def test_memory_bounds_the_length_of_a_request_and_loading_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # 512 bytes a token: the 10 million positions would take 5 GiB
    config = replace(CONFIGS["llama"], max_len=10_000_000)
    monkeypatch.setattr(torch_backend, "free_bytes", lambda _: 3 * GIB)
    with caplog.at_level(logging.WARNING):
        backend = TorchBackend(tiny_model(config), name="long")
    held = 3 * GIB // 2 // 512
    assert backend.info.max_len == held
    assert f"long holds K/V of {held} tokens, not of its 10000000 positions" in caplog.text
    assert "the 3.0 GiB of memory" in caplog.text
    async with LocalEngine.over(backend, ByteCodec()) as engine:
        with pytest.raises(PromptTooLong, match=f"the model holds {held} in all; shorten"):
            engine.generate([5, 6], max_new_tokens=held - 1)


async def test_a_pool_that_was_chosen_bounds_it_too() -> None:
    backend = TorchBackend(tiny_model(CONFIGS["llama"]), name="small", max_tokens=20)
    async with LocalEngine.over(backend, ByteCodec()) as engine:
        with pytest.raises(PromptTooLong, match="the model holds 20 in all"):
            engine.generate([5, 6, 7], max_new_tokens=18)
        result = await engine.generate([5, 6, 7], max_new_tokens=17).result()
    assert result.usage.prompt_tokens == 3


def test_positions_of_the_model_bound_it_where_there_is_memory() -> None:
    backend = TorchBackend(tiny_model(CONFIGS["llama"]), name="tiny")
    assert backend.info.max_len == CONFIGS["llama"].max_len


async def test_room_can_be_chosen_when_a_model_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_model(tmp_path, "qwen2")
    async with d2f_stream.load(tmp_path, device="cpu", kv_tokens=40) as engine:
        assert engine.info.max_len == 40
        assert (await engine.generate([5, 6], max_new_tokens=38).result()).usage.prompt_tokens == 2
        with pytest.raises(PromptTooLong, match="the model holds 40 in all"):
            engine.generate([5, 6], max_new_tokens=39)


async def test_room_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text(json.dumps({"answers": "hi"}))
    with pytest.raises(InvalidParams, match="kv_tokens is 0 but must be an integer of at least 1"):
        async with d2f_stream.load(tmp_path, kv_tokens=0):
            pass
    with pytest.raises(UnsupportedModel, match="the scripted backend takes memory for K/V as"):
        async with d2f_stream.load(tmp_path, kv_tokens=5):
            pass
    with pytest.raises(InvalidRequest, match=r"kv_tokens, .* are the server's own choice"):
        async with d2f_stream.load("ws://127.0.0.1:1", kv_tokens=5):
            pass
