"""Draft adapters: clean rows are the base's bit for bit, draft rows as an fp64 oracle has them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from triton_mode import CAN_RUN, DEVICE  # isort: skip  # before the kernels

from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.fast_runner import FastRunner
from d2f_runtime.backends.torch_backend import TorchBackend, load
from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.kernels.language import HAS_TRITON
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_runtime.models.draft_facts import DraftFacts
from d2f_runtime.models.fast_transformer import KERNELS, REFERENCES, FastTransformer, StepTensors
from d2f_runtime.models.masks import block_causal_mask
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from d2f_stream.core.params import GenerationParams
from tiny_drafts import PRODUCTS, draft_adapter, write_draft_adapter
from tiny_models import CONFIGS, NUM_TOKENS, tiny_folder, tiny_model

pytestmark = pytest.mark.torch

BASE = CONFIGS["llama"]
MASK = 155  # a padded row: no answer names it


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_draft_adapter(tmp_path / "adapter", BASE, mask_id=MASK)
    return tmp_path / "adapter"


def canvas(num_prompt: int, block: int, num_blocks: int) -> tuple[list[int], list[int], list[bool]]:
    """Tokens, what each row sees, and which rows are drafts: causal ones, then blocks."""
    generator = torch.Generator().manual_seed(3)
    length = num_prompt + block * num_blocks
    tokens = torch.randint(4, NUM_TOKENS, (length,), generator=generator).tolist()
    visible = list(range(1, num_prompt + 1))
    for index in range(num_blocks):
        visible += [num_prompt + (index + 1) * block] * block
        for at in range(1, block, 2):
            tokens[num_prompt + index * block + at] = MASK
    return tokens, visible, [at >= num_prompt for at in range(length)]


def oracle(
    weights: dict[str, Tensor],
    factors: dict[str, Tensor],
    scale: float,
    tokens: list[int],
    visible: list[int],
    is_draft: list[bool],
) -> Tensor:
    """[W, V] logits in fp64, row by row as the words say: a draft row's weight is W + s B A."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    f = {name: tensor.double() for name, tensor in factors.items()}
    head_dim, eps = BASE.head_dim, BASE.norm_eps

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + eps).sqrt() * w[name]

    def product(row: int, layer: int, part: str, x: Tensor) -> Tensor:
        name = f"layers.{layer}.{PRODUCTS[part]}"
        matrix: Tensor = w[f"{name}.weight"]
        if is_draft[row]:
            path = f"base_model.model.model.{name}"
            up, down = f[f"{path}.lora_B.weight"], f[f"{path}.lora_A.weight"]
            matrix = matrix + scale * up @ down
        out: Tensor = matrix @ x
        return out

    def turn(x: Tensor, position: int) -> Tensor:
        half = head_dim // 2
        angle = position * BASE.rope_theta ** (-torch.arange(half).double() / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    states = [
        f["mask_embedding"] if token == MASK else w["embed_tokens.weight"][token]
        for token in tokens
    ]
    for layer in range(BASE.num_layers):
        path, queries, keys, values = f"layers.{layer}", [], [], []
        for row, state in enumerate(states):
            x = norm(state, f"{path}.input_layernorm.weight")
            queries.append(turn(product(row, layer, "q", x).view(-1, head_dim), row))
            keys.append(turn(product(row, layer, "k", x).view(-1, head_dim), row))
            values.append(product(row, layer, "v", x).view(-1, head_dim))
        group = BASE.num_heads // BASE.num_kv_heads
        for row, state in enumerate(list(states)):
            heads = []
            for head in range(BASE.num_heads):
                seen_keys = torch.stack([keys[i][head // group] for i in range(visible[row])])
                seen = torch.stack([values[i][head // group] for i in range(visible[row])])
                scores = seen_keys @ queries[row][head] / head_dim**0.5
                heads.append(scores.softmax(0) @ seen)
            state = state + product(row, layer, "o", torch.cat(heads))
            x = norm(state, f"{path}.post_attention_layernorm.weight")
            wide = F.silu(product(row, layer, "gate", x)) * product(row, layer, "up", x)
            states[row] = state + product(row, layer, "down", wide)
    return torch.stack([w["embed_tokens.weight"] @ norm(x, "norm.weight") for x in states])


def forward(model: Transformer, tokens: list[int], visible: list[int], rows: Tensor) -> Tensor:
    mask = block_causal_mask(torch.zeros(1, dtype=torch.long), torch.tensor([visible]), 0)
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad():
        hidden, _ = model(torch.tensor([tokens]), positions, mask, draft_rows=rows)
    states: Tensor = hidden[0]
    return states


def test_draft_rows_go_through_base_and_adapter_and_see_clean_rows_of_the_base(
    adapter: Path,
) -> None:
    model = load_checkpoint(tiny_folder("llama", "torch"), adapter=adapter)
    tokens, visible, is_draft = canvas(5, 4, 2)
    rows = torch.tensor([at for at, draft in enumerate(is_draft) if draft])
    factors = load_file(adapter / "adapter_model.safetensors")
    wanted = oracle(model.state_dict(), factors, 2.0, tokens, visible, is_draft)
    found = model.logits(forward(model, tokens, visible, rows))
    assert torch.allclose(found.double(), wanted, atol=2e-4, rtol=1e-4)
    plain = oracle(model.state_dict(), factors, 0.0, tokens, visible, is_draft)
    assert not torch.allclose(wanted[5:], plain[5:], atol=1e-2), "the adapter does something"


def test_clean_rows_are_the_bases_bit_for_bit(adapter: Path) -> None:
    folder = tiny_folder("llama", "torch")
    drafting, base = load_checkpoint(folder, adapter=adapter), load_checkpoint(folder)
    tokens, visible, is_draft = canvas(9, 8, 2)
    rows = torch.tensor([at for at, draft in enumerate(is_draft) if draft])
    known = [4 if token == MASK else token for token in tokens]
    found = forward(drafting, tokens, visible, rows)
    wanted = forward(base, known, visible, rows)
    assert torch.equal(found[:9], wanted[:9])
    assert not torch.equal(found[9:], wanted[9:])


def test_the_cache_of_a_drafting_model_is_the_bases(adapter: Path) -> None:
    """Prompt and committed rows beside drafts write the K/V that the base alone writes."""
    folder = tiny_folder("llama", "torch")
    stores = []
    for backend in (load(folder, device="cpu", adapter=adapter), load(folder, device="cpu")):
        slot = backend.open_slot(24)
        tokens = tuple(range(10, 20))
        masks = (backend.info.mask_id,) * 6
        stops = (*range(1, 11), 16)
        backend.step([StepRow(slot, Window(0, tokens + masks, 10, stops))])
        stores.append(backend._pool.store[:, :10].clone())
    assert torch.equal(*stores)


@pytest.mark.parametrize("quantization", ["fp32", "bf16", "int8", "nf4"])
def test_every_quantisation_of_the_base_drafts(adapter: Path, quantization: str) -> None:
    backend = load(
        tiny_folder("llama", "torch"), device="cpu", quantization=quantization, adapter=adapter
    )
    assert (backend.info.mask_id, backend.info.commit_attention) == (MASK, "causal")
    assert backend.info.max_block_size == 32
    slot = backend.open_slot(16)
    window = Window(0, (10, 11, *[MASK] * 4), 2, (1, 2, 6))
    (found,) = backend.step([StepRow(slot, window)])
    assert all(0 <= token < NUM_TOKENS for token in found.tokens[2:])


def windows(mask_id: int) -> list[Window]:
    """A prompt with drafts, drafts beside filled ones that wait, and a step without any draft."""
    prompt, masks = tuple(range(10, 17)), (mask_id,) * 8
    return [
        Window(0, prompt + masks, 7, (*range(1, 8), 11, 15)),
        Window(7, (20, 21, 22, *masks[:5], 30, mask_id), 3, (8, 9, 10, 11, 15, 17), 2),
        Window(9, (22, 23, mask_id), 2, (10, 11, 12), 1),
    ]


def steps_of(backend: TorchBackend, mask_id: int) -> list[Proposals]:
    slot = backend.open_slot(40)
    return [backend.step([StepRow(slot, window)])[0] for window in windows(mask_id)]


@pytest.mark.parametrize("products", [tuple(PRODUCTS), ("o",), ("q", "v"), ("up", "down")])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_the_fast_step_drafts_as_the_plain_one(
    tmp_path: Path, products: tuple[str, ...], family: str
) -> None:
    config = BASE
    if family == "qwen":  # with what llama lacks
        config = replace(BASE, qkv_bias=True, qk_norm=True, head_dim=32)
    save_checkpoint(tmp_path / "base", tiny_model(config))
    write_draft_adapter(tmp_path / "adapter", config, mask_id=MASK, products=products)
    found = []
    for runner in ("plain", "fast"):
        model = load_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
        backend = TorchBackend(model, name=runner, runner=runner, graphs="off")
        found.append(steps_of(backend, MASK))
    for plain, fast in zip(*found, strict=True):
        assert list(plain.tokens) == list(fast.tokens)
        assert list(plain.confidence) == pytest.approx(list(fast.confidence), abs=1e-5)


@pytest.mark.skipif(
    not HAS_TRITON or not CAN_RUN or DEVICE == "cuda", reason="for Triton's interpreter"
)
def test_interpreted_kernels_draft_as_the_plain_step(adapter: Path) -> None:
    folder, found = tiny_folder("llama", "torch"), []
    for runner in ("plain", "fast"):
        model = load_checkpoint(folder, adapter=adapter)
        backend = TorchBackend(model, name=runner, runner=runner, graphs="off")
        if isinstance(backend._runner, FastRunner):
            backend._runner._model.ops = KERNELS
        found.append(steps_of(backend, MASK))
    for plain, fast in zip(*found, strict=True):
        assert list(plain.tokens) == list(fast.tokens)
        assert list(plain.confidence) == pytest.approx(list(fast.confidence), abs=1e-4)


@pytest.mark.parametrize("quantization", ["fp8", "int8", "nf4"])
def test_quantised_rows_reach_the_adapter_in_the_fast_step(
    adapter: Path, quantization: str
) -> None:
    """The same base in few bits with and without the adapter differs in draft rows alone."""
    states = []
    for given in (adapter, None):
        model = load_checkpoint(tiny_folder("llama", "torch"), adapter=given)
        packed = FastTransformer(model, quantization=quantization, ops=REFERENCES)
        store = torch.zeros(2 * BASE.num_layers, 12, BASE.num_kv_heads, BASE.head_dim)
        rows = torch.arange(12, dtype=torch.int32)
        visible = torch.tensor([*range(1, 7), *[12] * 6], dtype=torch.int32)
        drafts = (rows >= 6).int()
        tiles = torch.tensor([[0, 12, 0, 2**31 - 1, 0]], dtype=torch.int32)
        step = StepTensors(rows + 20, rows, rows, visible, tiles, drafts)
        with torch.inference_mode():
            states.append(packed.forward(step, store))
    assert torch.equal(states[0][:6], states[1][:6])
    assert not torch.isclose(states[0][6:], states[1][6:], atol=1e-2).all(dim=1).any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["off", "lazy"])
def test_graphs_draft_as_the_plain_step(adapter: Path, graphs: str) -> None:
    folder, found = tiny_folder("llama", "torch"), []
    for runner in ("plain", "fast"):
        model = load_checkpoint(folder, adapter=adapter)
        backend = TorchBackend(
            model,
            name=runner,
            device="cuda",
            runner=runner,
            graphs=graphs,  # type: ignore[arg-type]
        )
        found.append(steps_of(backend, MASK))
    for plain, fast in zip(*found, strict=True):
        assert list(plain.tokens) == list(fast.tokens)


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "base_model.model.", "model.", ""])
def test_names_may_be_those_of_the_model_or_of_the_causal_lm(prefix: str, tmp_path: Path) -> None:
    write_draft_adapter(tmp_path, BASE, mask_id=MASK, prefix=prefix)
    found = draft_adapter(tmp_path, BASE).state_dict(keep_vars=True)
    assert found == {}, "no part of the model's weights"
    layer = draft_adapter(tmp_path, BASE).layer(1, torch.tensor([0]))
    assert sorted(layer.factors) == sorted(name.rpartition(".")[2] for name in PRODUCTS.values())


def test_an_adapter_without_the_block_is_merged(tmp_path: Path) -> None:
    write_draft_adapter(tmp_path, BASE, mask_id=MASK)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["d2f"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert DraftFacts.read(tmp_path) is None


@pytest.mark.parametrize(
    ("about", "error", "message"),
    [
        ({"kind": "target"}, UnsupportedModel, "'target'"),
        ({"mask_id": None}, ModelDamaged, "one mask_id"),
        ({"mask_id": "x"}, ModelDamaged, "token ids"),
        ({"block_sizes": []}, ModelDamaged, "block_sizes"),
        ({"block_sizes": [0]}, ModelDamaged, "block_sizes"),
    ],
)
def test_a_wrong_block_is_one_clear_error(
    adapter: Path, about: dict[str, object], error: type[Exception], message: str
) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["d2f"] |= about
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        load_checkpoint(tiny_folder("llama", "torch"), adapter=adapter)


def test_a_missing_or_foreign_mask_embedding_is_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"mask_embedding": torch.zeros(7)}, weights)
    with pytest.raises(UnsupportedModel, match="mask_embedding of shape"):
        load_checkpoint(tiny_folder("llama", "torch"), adapter=adapter)
    del tensors["mask_embedding"]
    save_file(tensors, weights)
    with pytest.raises(ModelDamaged, match="lacks mask_embedding"):
        load_checkpoint(tiny_folder("llama", "torch"), adapter=adapter)


def test_an_adapter_that_replaces_a_weight_is_refused(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    whole = torch.zeros(BASE.ffn_size, BASE.hidden_size)
    tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = whole
    save_file(tensors, weights)
    with pytest.raises(UnsupportedModel, match="leaves the base as it is"):
        load_checkpoint(tiny_folder("llama", "torch"), adapter=adapter)


def test_a_bidirectional_base_is_refused(adapter: Path) -> None:
    with pytest.raises(UnsupportedModel, match="autoregressive"):
        load_checkpoint(tiny_folder("dream", "torch"), adapter=adapter)


def test_defaults_verify_in_blocks_that_the_adapter_knows(adapter: Path) -> None:
    facts = DraftFacts.read(adapter)
    assert facts is not None
    base = GenerationParams(block_size=1, max_new_tokens=77, temperature=0.5)
    found = facts.defaults(base)
    assert (found.commit, found.block_size) == ("verify", 8)
    assert (found.max_new_tokens, found.temperature) == (77, 0.5)
    small = replace(facts, block_sizes=(16, 32)).defaults(base)
    assert small.block_size == 16


def test_the_backend_opens_by_name_with_a_draft_adapter(adapter: Path) -> None:
    backend = open_backend(
        "torch", tiny_folder("llama", "torch"), device="cpu", quantization="auto", adapter=adapter
    )
    assert backend.info.commit_attention == "causal"
    backend.close()
