"""Mixtures of experts: published layouts, what routers choose, how the experts are held."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.choice import (
    DeviceFacts,
    choose_quantization,
    choose_runner,
    weight_bytes,
)
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import Window
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_runtime.models.fast_mixture import FastMixture
from d2f_runtime.models.fast_transformer import REFERENCES
from d2f_runtime.models.mixture import Mixture
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.models.published import read_published
from d2f_runtime.quantization.stored import QuantizedLinear
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from tiny_checkpoints import (
    FAMILIES,
    additive,
    block_causal,
    config_of,
    oracle,
    published_weights,
    stack_experts,
    write_checkpoint,
    write_model,
    write_weights,
)
from tiny_models import MASK, MIXTURES, recompute, tiny_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch
LENGTH = 28
MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "vocab_size": 157184,
    "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 20,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 32768, "rope_theta": 600000, "rope_scaling": None,
    "partial_rotary_factor": 0.5, "rotary_dim": 64, "rms_norm_eps": 1e-6, "use_qk_norm": True,
    "use_qkv_bias": False, "use_bias": False, "tie_word_embeddings": False, "norm_head": False,
    "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1,
    "moe_intermediate_size": 512, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "score_function": "sigmoid",
    "router_dtype": "fp32", "moe_router_enable_expert_bias": True, "pad_token_id": 156892,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


def read(folder: Path, **changes: Any) -> Any:
    values = {key: value for key, value in (MINI | changes).items() if value is not ...}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return read_published(folder)


def test_llada2_as_published(tmp_path: Path) -> None:
    published = read(tmp_path)
    config, defaults = published.config, published.defaults(adapted=False)
    assert (config.family, config.mask_id) == ("llada2", 156895)
    assert config.eos_ids == (156892, 156900)
    assert (config.prompt_attention, config.native_block_size) == ("grid", 32)
    assert (config.qk_norm, config.rotary_dim, config.max_len) == (True, 64, 32768)
    assert config.mixture == MixtureConfig(
        num_experts=256, num_chosen=8, ffn_size=512, scoring="sigmoid", has_bias=True,
        num_groups=8, num_kept_groups=4, scale=2.5, shared_size=512, dense_layers=(0,),
    )  # fmt: skip
    assert (defaults.confidence_threshold, defaults.edit_threshold) == (0.95, None)
    assert (defaults.tail, defaults.block_size) == ("whole", 32)


def test_what_is_left_out_has_the_codes_defaults(tmp_path: Path) -> None:
    left_out = dict.fromkeys(
        ("rotary_dim", "use_qk_norm", "n_group", "topk_group", "first_k_dense_replace",
         "num_shared_experts", "routed_scaling_factor", "moe_router_enable_expert_bias",
         "score_function", "router_dtype", "norm_head"), ...,
    )  # fmt: skip
    assert read(tmp_path / "a", **left_out).config == read(tmp_path / "b").config
    assert read(tmp_path / "c", rotary_dim=128).config.rotary_dim == 64, "the factor wins"
    neither = {"partial_rotary_factor": ..., "rotary_dim": ...}
    assert read(tmp_path / "n", **neither).config.rotary_dim == 64, "half of a head"
    assert read(tmp_path / "d", partial_rotary_factor=..., rotary_dim=32).config.rotary_dim == 32
    for name, share in (("rope_parameters", 0.25), ("rope_scaling", 0.75)):
        rope = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": share}
        nested = read(tmp_path / name, **neither, rope_theta=..., **{name: rope}).config
        assert (nested.rotary_dim, nested.rope_theta) == (int(128 * share), 5e5)
    assert read(tmp_path / "e", partial_rotary_factor=1.0).config.rotary_dim == 0


@pytest.mark.parametrize(
    ("folder", "changes", "edits"),
    [
        ("LLaDA2.0-mini", {}, False),
        ("LLaDA2.1-mini", {}, True),
        ("x", {"_name_or_path": "inclusionAI/LLaDA2.1-flash"}, True),
        ("x", {"model_type": "llada21_moe"}, True),
        ("x", {"model_type": "llada2_moe_veomni"}, False),
    ],
)
def test_models_that_edit_are_told_by_their_name(
    tmp_path: Path, folder: str, changes: Any, edits: bool
) -> None:
    defaults = read(tmp_path / folder, **changes).defaults(adapted=False)
    assert defaults.edit_threshold == (0.5 if edits else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_function": "softmax"}, "score_function 'softmax'"),
        ({"norm_head": True}, "norm_head True"),
        ({"router_dtype": "bf16"}, "router_dtype 'bf16'"),
        ({"use_bias": True}, "use_bias True"),
        ({"use_qkv_bias": True}, "use_qkv_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"_name_or_path": "inclusionAI/LLaDA2.2-flash"}, "does not run llada2.2: it deletes"),
    ],
)
def test_other_mixtures_are_refused_by_name(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": ...}, "lacks num_experts"),
        ({"rope_theta": ...}, "lacks rope_theta"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps"),
        ({"num_experts_per_tok": ...}, "lacks num_experts_per_tok"),
        ({"moe_intermediate_size": "512"}, "moe_intermediate_size is '512'"),
        ({"n_group": 7}, "256 experts make no 7 equal groups"),
        ({"n_group": 256}, "a group of one expert"),
        ({"topk_group": 9}, "9 of 8 groups"),
        ({"num_experts_per_tok": 129}, "129 experts cannot be chosen from 4 groups of 32"),
        ({"partial_rotary_factor": 1.5}, "192 dimensions of a head of 128"),
    ],
)
def test_mixtures_that_make_no_sense(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ModelDamaged, match=message):
        read(tmp_path, **changes)


def canvas() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 280, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    return tokens, block_causal(LENGTH, [8, 16, 24, LENGTH])


@torch.no_grad()
def logits(model: Any, tokens: Tensor, visible: Tensor) -> Tensor:
    hidden, _ = model(tokens, torch.arange(LENGTH)[None], visible[None, None])
    out: Tensor = model.logits(hidden)
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0]},
        {"num_experts_per_tok": 1},
    ],
)
@torch.no_grad()
def test_sdar_moe_is_transformers_qwen3_moe(tmp_path: Path, changes: Any) -> None:
    tiny = FAMILIES["sdar_moe"]
    theirs = oracle(tiny, **changes)
    write_checkpoint(tmp_path, tiny, theirs, **changes)
    tokens, visible = canvas()
    wanted = theirs(tokens, attention_mask=additive(visible), use_cache=False).logits
    assert (logits(load_checkpoint(tmp_path), tokens, visible) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1},
        {"n_group": 1, "topk_group": 1},
        {"partial_rotary_factor": 1.0},
        {"partial_rotary_factor": 0.25},
        {"num_shared_experts": 2},
        {"first_k_dense_replace": 2, "routed_scaling_factor": 1.0},
    ],
)
@torch.no_grad()
def test_llada2_is_its_definition_in_fp64(tmp_path: Path, changes: Any) -> None:
    tiny = FAMILIES["llada2_moe"]
    theirs = oracle(tiny, **changes)
    write_checkpoint(tmp_path, tiny, theirs, **changes)
    tokens, visible = canvas()
    mask = additive(visible).double()
    wanted = theirs.double()(tokens, attention_mask=mask, use_cache=False).logits
    assert (logits(load_checkpoint(tmp_path), tokens, visible) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("model_type", ["llada2_moe", "llada2_moe_veomni"])
def test_stacked_experts_are_the_same_model(tmp_path: Path, model_type: str) -> None:
    tiny = FAMILIES["llada2_moe"]
    theirs = oracle(tiny)
    write_checkpoint(tmp_path / "apart", tiny, theirs, model_type=model_type)
    write_checkpoint(tmp_path / "stacked", tiny, theirs, model_type=model_type)
    (tmp_path / "stacked" / "model.safetensors").unlink()
    write_weights(
        tmp_path / "stacked", stack_experts(published_weights(tiny, theirs)), num_shards=3
    )
    first, second = (load_checkpoint(tmp_path / name).state_dict() for name in ("apart", "stacked"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model_type", ["llada2_moe", "sdar_moe"])
def test_numbers_are_held_against_the_tensors_first(tmp_path: Path, model_type: str) -> None:
    tiny = FAMILIES[model_type]
    theirs = oracle(tiny)
    write_checkpoint(tmp_path, tiny, theirs, num_experts=2**30, n_group=2)
    with pytest.raises(ModelDamaged, match=r"asks for 1073741824 experts, but .* tensors"):
        load_checkpoint(tmp_path)
    if model_type == "llada2_moe":
        (tmp_path / "model.safetensors").unlink()
        write_weights(tmp_path, stack_experts(published_weights(tiny, theirs)))
        with pytest.raises(ModelDamaged, match=r"experts, but .* has 16 in a layer"):
            load_checkpoint(tmp_path)


def test_routers_stay_exact(tmp_path: Path) -> None:
    write_model(tmp_path, "llada2_moe")
    exact = load_checkpoint(tmp_path).state_dict()
    loaded = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    moved = load_checkpoint(tmp_path).to(torch.bfloat16)
    save_checkpoint(tmp_path / "saved", loaded, dtype=torch.bfloat16)
    again = load_checkpoint(tmp_path / "saved")
    for model in (loaded, moved, copy.deepcopy(moved), again):
        for name, tensor in model.state_dict().items():
            is_router = ".router." in name
            assert tensor.dtype == (torch.float32 if is_router else torch.bfloat16), name
            assert not is_router or torch.equal(tensor, exact[name])


def test_ties_and_groups_are_decided_as_published() -> None:
    model = tiny_model(MIXTURES["llada2"])
    mixture = model.layers[1].mlp
    assert isinstance(mixture, Mixture)
    with torch.no_grad():
        assert mixture.router.bias is not None
        mixture.router.weight.zero_()
        mixture.router.bias.copy_(torch.tensor([0.0, 0.9, 0.5, 0.5, 0.8, 0.3, 0.0, 0.2]))
        chosen, weights = mixture.router(torch.randn(2, 64))
    assert chosen.sort(dim=1).values.tolist() == [[2, 3, 4], [2, 3, 4]], "0.9 is in no kept group"
    assert weights.flatten().tolist() == pytest.approx([2.5 / 3] * 6)


@pytest.mark.parametrize("name", list(MIXTURES))
@torch.no_grad()
def test_one_product_over_all_experts_is_the_same(name: str) -> None:
    model = tiny_model(MIXTURES[name])
    mixture = model.layers[2 if name == "llada2" else 1].mlp
    assert isinstance(mixture, Mixture)
    for num_rows in (1, 2, 33, 256):
        rows = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(num_rows))
        parts = FastMixture(mixture, "none", torch.float32).parts(
            rows,
            torch.ones(num_rows, dtype=torch.int32),
            route=REFERENCES.route,
            through_experts=REFERENCES.through_experts,
        )
        assert torch.allclose(parts.sum(dim=0), mixture(rows), atol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_experts_stay_quantised(quantization: Any) -> None:
    config = replace(MIXTURES["llada2"], ffn_size=128, hidden_size=128)
    model = tiny_model(config)
    backend = TorchBackend(copy.deepcopy(model), name="x", quantization=quantization)
    dense = copy.deepcopy(model)
    runner: Any = backend._runner
    kinds = {
        name: isinstance(module, QuantizedLinear)
        for name, module in runner._model.named_modules()
        if name.endswith("_proj")
    }
    assert all(held == (".experts." in name) for name, held in kinds.items())
    for name, module in runner._model.named_modules():
        if name.endswith("_proj"):
            weight = (
                module.stored.dequantised(torch.float32)
                if isinstance(module, QuantizedLinear)
                else module.weight
            )
            target: Any = dense.get_submodule(name)
            target.weight.data = weight.detach().clone()
    slot = backend.open_slot(16)
    window = Window(0, (5, 6, 7, 8, MASK, MASK, MASK, MASK), 4, (4, 8))
    (found,) = backend.step([StepRow(slot, window)])
    backend.close()
    wanted = recompute(dense, window, (), ())
    assert list(found.tokens) == list(wanted.tokens)
    assert list(found.confidence) == pytest.approx(list(wanted.confidence), abs=1e-4)


def test_checkpoint_is_quantised_expert_by_expert(tmp_path: Path) -> None:
    write_model(tmp_path, "sdar_moe")
    model = load_checkpoint(tmp_path, quantization="nf4")
    held = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(held) == 2 * (4 + 8 * 3)


def test_mini_fits_16_gb_in_nf4(tmp_path: Path) -> None:
    config = read(tmp_path).config
    assert weight_bytes(config, "bf16") == pytest.approx(32.5e9, rel=0.01)
    assert weight_bytes(config, "nf4") < 9.7e9
    gpu = DeviceFacts((9, 0), has_triton=True, free=15 * 2**30)
    assert choose_quantization(config, gpu, stored="bf16").name == "nf4"
    for free, name in ((24, "nf4"), (31, "nf4"), (31.5, "fp8")):  # fp8 comes in 16 bits
        facts = replace(gpu, free=int(free * 2**30))
        assert choose_quantization(config, facts, stored="bf16").name == name
    large = DeviceFacts((9, 0), has_triton=True, free=80 * 2**30)
    assert choose_quantization(config, large, stored="bf16").name == "bf16"
    for quantization in ("bf16", "fp8", "nf4"):
        assert choose_runner(gpu, quantization=quantization, has_experts=True).name == "fast"
    without = replace(gpu, has_triton=False)
    choice = choose_runner(without, quantization="nf4", has_experts=True)
    assert choice.name == "plain"
    assert "nf4 experts as they are chosen" in choice.reason
    assert choose_runner(gpu, quantization="int8", has_experts=True).name == "plain"
    with pytest.raises(UnsupportedModel, match="holds no experts in int8"):
        choose_runner(gpu, quantization="int8", has_experts=True, wanted="fast")
    with pytest.raises(UnsupportedModel, match="fp8 needs the fast step"):
        choose_runner(without, quantization="fp8", has_experts=True)


def test_configs_keep_their_experts() -> None:
    for config in MIXTURES.values():
        again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
    assert "mixture" not in replace(MIXTURES["llada2"], mixture=None).to_dict()
    assert config_of(FAMILIES["llada2_moe"])["num_experts"] == 16
