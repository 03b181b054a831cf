"""Nemotron-Labs-Diffusion: causal rows shifted, block rows in place, one set of weights."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import d2f_stream
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.published import read_published
from d2f_runtime.models.rope_scaling import YarnRope
from d2f_stream.core.errors import UnsupportedModel
from tiny_checkpoints import (
    additive,
    config_of,
    oracle,
    write_checkpoint,
    write_model,
)
from tiny_nemotron import (
    END,
    KIND,
    MASK,
    PROMPT,
    SIZE,
    TINY,
    answered,
    forward,
    replace_params,
    seen,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch
LARGE: dict[str, Any] = {
    "architectures": ["NemotronLabsDiffusionModel"], "model_type": KIND, "vocab_size": 131072,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": False, "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0,
        "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
    "block_size": 32, "mask_token_id": 100, "bos_token_id": 1, "eos_token_id": 11,
    "dlm_paradigm": "bidirectional", "ar_loss_weight": 1.0, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_config_as_published(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    published = read_published(tmp_path)
    config, defaults = published.config, published.defaults(adapted=False)
    assert (config.family, config.mask_id, config.eos_ids) == ("nemotron", 100, (11,))
    assert (config.prompt_attention, config.commit_attention) == ("causal", "causal")
    assert (config.shift_logits, config.drafts_in_place) == (True, True)
    assert (config.native_block_size, config.max_len, config.norm_eps) == (32, 262144, 1e-5)
    assert config.rope_scaling == YarnRope(16.0, 16384, query_beta=0.1)
    assert (defaults.block_size, defaults.commit) == (32, "filled")
    assert math.nextafter(defaults.confidence_threshold, 1) == 0.9


def test_config_of_14b(tmp_path: Path) -> None:
    rope = LARGE["rope_parameters"] | {"rope_theta": 1e9}
    sizes = {"hidden_size": 5120, "intermediate_size": 16384, "num_hidden_layers": 40}
    values = LARGE | sizes | {"rope_parameters": rope, "rope_scaling": rope, "rope_theta": 1e9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_published(tmp_path).config
    assert (config.hidden_size, config.num_heads * config.head_dim) == (5120, 4096)
    assert (config.rope_theta, config.rope_scaling) == (1e9, YarnRope(16.0, 16384, query_beta=0.1))


def test_what_is_left_out_has_the_codes_defaults(tmp_path: Path) -> None:
    rope = {key: value for key, value in LARGE["rope_parameters"].items() if key != "rope_theta"}
    gone = ("head_dim", "rms_norm_eps", "block_size", "mask_token_id", "dlm_paradigm")
    values = {key: value for key, value in LARGE.items() if key not in gone}
    for place, content in (("a", LARGE), ("b", values | {"rope_parameters": rope})):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps(content))
    assert read_published(tmp_path / "a").config == read_published(tmp_path / "b").config


@pytest.mark.parametrize("size", [32, 64])
def test_all_of_a_block_is_open_once_its_first_token_is_there(tmp_path: Path, size: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE | {"block_size": size}))
    params = read_published(tmp_path).defaults(adapted=False)
    decoder = BlockDecoder(
        prompt_tokens=[7, 8], params=params, mask_id=100, eos_ids=[11], shift_logits=True,
        prompt_attention="causal", commit_attention="causal",
    )  # fmt: skip
    for masks in (1, size - 1):
        window = decoder.next_window()
        assert window is not None
        assert len(window.asked(100)) == masks
        number = len(window.tokens)
        decoder.apply(Proposals([9] * number, [0.99] * number))
    assert decoder.num_useful_tokens == size


def test_factors_below_one_are_read(tmp_path: Path) -> None:
    rope = LARGE["rope_parameters"] | {"factor": 0.25}
    values = LARGE | {"max_position_embeddings": 4096, "eos_token_id": 2, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_published(tmp_path).config
    assert (config.rope_scaling, config.eos_ids) == (YarnRope(0.25, 16384, query_beta=0.1), (2,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dlm_paradigm": "autoregressive"}, "dlm_paradigm 'autoregressive'"),
        ({"sliding_window": 1024}, "sliding_window 1024"),
        (
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "llama_4_scaling_beta with positions of the rope_type 'default'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
    ],
)
def test_what_is_not_done_is_refused_by_name(tmp_path: Path, changes: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE | changes))
    with pytest.raises(UnsupportedModel, match=message):
        read_published(tmp_path)


def test_training_a_draft_of_it_is_refused(tmp_path: Path) -> None:
    from d2f_export.distill.base import open_base
    from d2f_export.distill.from_ar.base import open_ar_base

    write_model(tmp_path, KIND)
    with pytest.raises(UnsupportedModel, match="nemotron model, which denoises blocks already"):
        open_ar_base(str(tmp_path))
    with pytest.raises(UnsupportedModel, match="nemotron model, but a teacher must see"):
        open_base(str(tmp_path))


@pytest.mark.parametrize("block", [20, 28])
@torch.no_grad()
def test_logits_are_those_of_ministral_3(tmp_path: Path, block: int) -> None:
    theirs = write_model(tmp_path, KIND)
    ours = load_checkpoint(tmp_path)
    tokens = torch.randint(0, 280, (1, 28), generator=torch.Generator().manual_seed(1))
    tokens[0, 22:] = MASK
    visible = seen(28, block)
    wanted = theirs(tokens, attention_mask=additive(visible), use_cache=False).logits
    hidden, _ = ours(tokens, torch.arange(28)[None], visible[None, None])
    assert (ours.logits(hidden) - wanted).abs().max() <= 1e-4


def published_loop(
    model: Any, number: int, threshold: float | None, ends: Sequence[int]
) -> tuple[list[int], int]:
    """`generate` of the published file, naively: the answer, and how many forwards it took."""
    canvas, num_prompt, steps = list(PROMPT), len(PROMPT), 0
    while len(canvas) < num_prompt + number:
        steps += 1  # prefill, or commit
        start = len(canvas)
        canvas.append(int(forward(model, canvas, start)[-1].argmax()))
        canvas += [MASK] * (SIZE - 1)
        while MASK in canvas:
            answer = canvas[start:]
            first_end = next((at for at, token in enumerate(answer) if token in ends), None)
            if first_end is not None and MASK not in answer[:first_end]:
                break
            steps += 1
            p = forward(model, canvas, start).double().softmax(-1).max(-1)
            masked = [at for at in range(start, len(canvas)) if canvas[at] == MASK]
            best = max(masked, key=lambda at: (float(p.values[at]), -at))
            for at in masked:
                if at == best or (threshold is not None and float(p.values[at]) >= threshold):
                    canvas[at] = int(p.indices[at])
        if set(canvas[num_prompt:]) & set(ends):
            break
    answer = canvas[num_prompt : num_prompt + number]
    for at, token in enumerate(answer):
        if token in ends:
            return answer[: at + 1], steps
    return answer, steps


@pytest.mark.parametrize("threshold", [0.3, 0.9, None])
async def test_answers_are_those_of_the_published_loop(
    tmp_path: Path, threshold: float | None
) -> None:
    theirs = write_model(tmp_path, KIND, seed=5)
    wanted, steps = published_loop(theirs.double(), 3 * SIZE, threshold, [END])
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        overrides: Any = {"num_per_step": 1}
        if threshold is not None:
            overrides = {"confidence_threshold": math.nextafter(threshold, 0)}
        result = await engine.generate(PROMPT, max_new_tokens=3 * SIZE, **overrides).result()
    assert list(result.token_ids) == wanted
    assert result.usage.steps == steps


async def test_an_end_is_an_end_in_both(tmp_path: Path) -> None:
    theirs = write_model(tmp_path, KIND, seed=5)
    without, _ = published_loop(theirs.double(), 3 * SIZE, 0.3, [])
    ends = sorted({without[SIZE + 3], without[0]})
    for end in ends:
        wanted, _ = published_loop(theirs.double(), 3 * SIZE, 0.3, [end])
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": [END, end]}))
        async with d2f_stream.load(tmp_path, device="cpu") as engine:
            result = await engine.generate(
                PROMPT, max_new_tokens=3 * SIZE, confidence_threshold=math.nextafter(0.3, 0)
            ).result()
        assert list(result.token_ids) == wanted


async def test_verified_answers_are_the_autoregressive_ones(tmp_path: Path) -> None:
    theirs = write_model(tmp_path, KIND, seed=2)
    canvas = list(PROMPT)
    while len(canvas) < len(PROMPT) + 30 and canvas[-1] != END:
        canvas.append(int(forward(theirs, canvas, len(canvas))[-1].argmax()))
    wanted = canvas[len(PROMPT) :]
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        for changes in (
            {"block_size": 1},
            {"commit": "verify", "sub_block_size": 0, "confidence_threshold": 0.01},
            {"commit": "verify", "sub_block_size": 0, "block_size": 4, "confidence_threshold": 0.2},
        ):
            overrides: Any = {"max_new_tokens": 30, **changes}
            result = await engine.generate(PROMPT, **overrides).result()
            assert list(result.token_ids) == wanted, changes
            assert result.usage.steps <= len(wanted) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_active_blocks": 3, "add_threshold": 0.1, "sub_block_size": 0},
        {"commit": "verify", "sub_block_size": 0},
        {"block_size": 1},
    ],
)
def test_every_step_predicts_alike(tmp_path: Path, changes: Any) -> None:
    from d2f_export.onnx.artefact import Description, write_artefact

    theirs = oracle(TINY, seed=5)
    write_checkpoint(tmp_path / "base", TINY, theirs)
    model = load_checkpoint(tmp_path / "base")
    about = Description(name="x", defaults={"cpu": {}})
    write_artefact(
        tmp_path / "base", tmp_path / "onnx", about,
        target="cpu", quantization="fp32", window=24, capacity=96,
    )  # fmt: skip
    params = replace_params(
        {"max_new_tokens": 21, "block_size": SIZE, "confidence_threshold": 0.4} | changes
    )
    plain = TorchBackend(model, name="x", runner="plain")
    wanted, sure = answered(plain, params)
    for backend in (
        TorchBackend(model, name="x", runner="fast"),
        open_backend("onnx", tmp_path / "onnx", device="cpu", quantization="auto"),
    ):
        assert backend.info.drafts_in_place
        tokens, confidence = answered(backend, params)
        assert tokens == wanted
        assert confidence == pytest.approx(sure, abs=1e-5)
        backend.close()


def test_a_last_mask_is_a_placeholder_only_where_a_cached_row_predicts_it() -> None:
    after_cached = Window(4, (5, 6, MASK), 2, (5, 6, 7))
    after_draft = Window(4, (5, MASK, MASK), 1, (5, 6, 7))
    for window, in_place in ((after_cached, 2), (after_draft, 3)):
        assert window.num_forwarded(MASK, shift_logits=True) == 2
        found = window.num_forwarded(MASK, shift_logits=True, drafts_in_place=True)
        assert found == in_place


def test_its_config_survives(tmp_path: Path) -> None:
    write_model(tmp_path, KIND)
    config = read_published(tmp_path).config
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert "drafts_in_place" not in replace(config, drafts_in_place=False).to_dict()
    assert config_of(TINY)["mask_token_id"] == MASK
