"""Checkpoints that bitsandbytes quantised, and dense ones that are quantised while they load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import triton_mode  # noqa: F401  # isort: skip  # before the kernels

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.torch_backend import TorchBackend, load
from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint, stored_as
from d2f_runtime.models.fast_transformer import REFERENCES, FastTransformer
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.quantization.int8 import Int8Weight
from d2f_runtime.quantization.nf4 import Nf4Weight
from d2f_runtime.quantization.stored import LOW_BIT, QuantizedLinear, quantise
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from tiny_checkpoints import FAMILIES, oracle, write_adapter, write_checkpoint, write_model
from tiny_models import CONFIGS, MASK, tiny_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def beside(name: str, weight: Tensor, quantization: str) -> dict[str, Tensor]:
    """Return the tensors that bitsandbytes keeps of a weight."""
    stored = quantise(weight, quantization)
    if isinstance(stored, Int8Weight):
        layer = name.removesuffix(".weight")
        row = torch.tensor(0, dtype=torch.uint8)
        return {name: stored.values, f"{layer}.SCB": stored.absmax, f"{layer}.weight_format": row}
    from d2f_runtime.kernels.fragments import NF4_VALUES

    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": weight.shape}
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: stored.codes[:, None],
        f"{name}.absmax": stored.absmax,
        f"{name}.quant_map": torch.tensor(NF4_VALUES),
        f"{name}.quant_state.bitsandbytes__nf4": packed,
    }


def write_quantized(folder: Path, quantization: str, family: str = "qwen2") -> dict[str, Tensor]:
    """Quantise a family's tiny checkpoint; return its projections as they were."""
    write_model(folder, family)
    weights = load_file(folder / "model.safetensors")
    dense = {name: w for name, w in weights.items() if name.endswith("_proj.weight")}
    for name, weight in dense.items():
        del weights[name]
        weights |= beside(name, weight, quantization)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def our_name(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("quantization", LOW_BIT)
def test_quantised_checkpoints_become_dense_where_nothing_else_is_asked(
    tmp_path: Path, quantization: str
) -> None:
    dense = write_quantized(tmp_path, quantization)
    assert stored_as(tmp_path).quantization == quantization
    state = load_checkpoint(tmp_path, dtype=torch.float32).state_dict()
    for name, weight in dense.items():
        wanted = quantise(weight, quantization).dequantised(torch.float32)
        assert torch.equal(state[our_name(name)], wanted)


@pytest.mark.parametrize("quantization", LOW_BIT)
def test_quantised_checkpoints_keep_their_codes(tmp_path: Path, quantization: str) -> None:
    dense = write_quantized(tmp_path, quantization)
    model = load_checkpoint(tmp_path, dtype=torch.float32, quantization=quantization)
    kinds = {"nf4": Nf4Weight, "int8": Int8Weight}
    for name, weight in dense.items():
        layer = model.get_submodule(our_name(name).removesuffix(".weight"))
        assert isinstance(layer, QuantizedLinear)
        assert isinstance(layer.stored, kinds[quantization])
        wanted = quantise(weight, quantization).dequantised(torch.float32)
        assert torch.equal(layer.stored.dequantised(torch.float32), wanted)


def test_the_backend_takes_a_checkpoints_own_quantisation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_quantized(tmp_path, "nf4", "llada")
    with caplog.at_level("INFO", logger="d2f_stream.torch_backend"):
        backend = load(tmp_path, device="cpu")
    assert backend.info.quantization == "nf4"
    assert "takes its weights as nf4: the checkpoint's own, dequantised" in caplog.text
    assert "dequantised" in backend.choice.reason


def test_a_checkpoint_is_not_made_of_another_quantisation(tmp_path: Path) -> None:
    write_quantized(tmp_path, "int8")
    with pytest.raises(UnsupportedModel, match="holds int8 weights, which are not made nf4"):
        load(tmp_path, device="cpu", quantization="nf4")


def test_other_quantisations_are_refused_by_their_headers(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen2")
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight is stored as I8; of quantized"):
        load_checkpoint(tmp_path)
    fp4 = {f"{name}.quant_state.bitsandbytes__fp4": torch.zeros(4, dtype=torch.uint8)}
    save_file(weights | fp4, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="up_proj is quantised as fp4"):
        load_checkpoint(tmp_path)


def test_a_lost_tensor_beside_a_weight_is_named(tmp_path: Path) -> None:
    write_quantized(tmp_path, "nf4")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight.absmax"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelDamaged, match=r"layers.1.mlp.down_proj.weight lacks its absmax"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("quantization", LOW_BIT)
def test_dense_weights_are_quantised_after_the_adapter_is_merged(
    tmp_path: Path, quantization: str
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny = FAMILIES["llada"]
    model = oracle(tiny)
    write_checkpoint(base, tiny, model)
    state = model.state_dict()
    write_adapter(adapter, tiny, state)
    found = load_checkpoint(base, adapter=adapter, quantization=quantization)
    layer = found.get_submodule("layers.0.self_attn.q_proj")
    assert isinstance(layer, QuantizedLinear)
    merged = state["model.layers.0.self_attn.q_proj.weight"]
    wanted = quantise(merged, quantization).dequantised(torch.float32)
    # the sum is made in another order, so that a weight between two codes may fall elsewhere
    same = torch.isclose(layer.stored.dequantised(torch.float32), wanted, rtol=1e-4)
    assert same.float().mean() > 0.99


def rounded(family: str) -> Transformer:
    """Return a tiny model of bf16 weights, so that no scale has to be rounded."""
    model = tiny_model(CONFIGS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def answers(backend: TorchBackend) -> list[Proposals]:
    """Run a prompt and three windows behind it."""
    slot = backend.open_slot(64)
    stops = (11,) if backend.info.prompt_attention != "causal" else tuple(range(1, 12))
    backend.step([StepRow(slot, Window(0, tuple(range(10, 21)), 11, stops))])
    found: list[Proposals] = []
    for filled in range(3):
        tokens = (*range(30, 30 + filled), *[MASK] * (8 - filled))
        found += backend.step([StepRow(slot, Window(11, tokens, 0, (19,)))])
    return found


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
@pytest.mark.parametrize("quantization", LOW_BIT)
def test_the_fast_step_answers_as_the_plain_one(family: str, quantization: Any) -> None:
    backends = [
        TorchBackend(
            rounded(family), name=runner, runner=runner, quantization=quantization, max_tokens=256
        )
        for runner in ("fast", "plain")
    ]
    assert [backend.info.quantization for backend in backends] == [quantization] * 2
    fast, plain = (answers(backend) for backend in backends)
    assert [list(p.tokens) for p in fast] == [list(p.tokens) for p in plain]
    for a, b in zip(fast, plain, strict=True):
        assert list(a.confidence) == pytest.approx(list(b.confidence), abs=1e-4)


def test_the_plain_step_leaves_the_callers_model_alone() -> None:
    model = tiny_model(CONFIGS["llada"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    TorchBackend(model, name="plain", quantization="nf4", max_tokens=256)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("quantization", LOW_BIT)
def test_a_checkpoint_can_be_quantised_on_a_cpu(tmp_path: Path, quantization: str) -> None:
    save_checkpoint(tmp_path, rounded("dream"))
    backend = load(tmp_path, device="cpu", quantization=quantization)
    assert backend.info.quantization == quantization
    direct = TorchBackend(
        rounded("dream"),
        name="direct",
        quantization="nf4" if quantization == "nf4" else "int8",
        max_tokens=256,
    )
    assert answers(backend) == answers(direct)


def test_quantised_weights_take_less() -> None:
    model = tiny_model(CONFIGS["llada"])
    sizes = {
        q: FastTransformer(model, quantization=q, ops=REFERENCES).weight_bytes
        for q in ("fp32", "int8", "nf4")
    }
    assert sizes["nf4"] < sizes["fp32"]
    assert sizes["int8"] < sizes["fp32"]


@pytest.mark.parametrize("quantization", LOW_BIT)
def test_what_transformers_saved_is_read(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = FAMILIES["qwen2"]
    write_checkpoint(tmp_path / "dense", tiny, oracle(tiny))
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=quantization == "nf4",
        load_in_8bit=quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "dense").glob("tokenizer*"):
        (tmp_path / "saved" / path.name).write_bytes(path.read_bytes())
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    found = load_checkpoint(tmp_path / "saved", dtype=torch.float32).state_dict()
    quantised = [name for name in found if name.endswith("_proj.weight")]
    assert quantised
    for name in quantised:
        module = theirs.get_submodule(f"model.{name}".removesuffix(".weight"))
        state = module.state if quantization == "int8" else None
        wanted = dequantize_bnb_weight(module.weight, state)
        if quantization == "int8" or wanted.shape[1] % 64 == 0:  # else see test_quantized_formats
            assert torch.equal(found[name], wanted.float()), name
