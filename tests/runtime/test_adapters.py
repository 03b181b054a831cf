"""LoRA adapters: what PEFT writes is merged as PEFT merges it, anything else is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_runtime.backends import open_backend
from d2f_runtime.models import patterns
from d2f_runtime.models.adapter_config import ADAPTER_KEYS
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel
from tiny_checkpoints import FAMILIES, Tiny, oracle, write_adapter, write_checkpoint, write_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

WEIGHTS = "adapter_model.safetensors"
SLOW = r"((\w+)*\.?)*!"  # its matches are tried in as many ways as the name can be cut
FIRST = "base_model.model.model.layers.0.self_attn.k_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", "Dream")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", FAMILIES["Dream"], oracle(FAMILIES["Dream"]).state_dict())
    return tmp_path / "adapter"


def change_config(folder: Path, *, name: str = "adapter_config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PEFT_CASES: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 3}},
    {"r": 2, "lora_alpha": 6, "alpha_pattern": {"k_proj": 1, "1.self_attn.o_proj": 9}},
    {"r": 3, "lora_alpha": 5, "target_modules": ["up_proj", "down_proj"]},
    {"r": 3, "lora_alpha": -5, "target_modules": "all-linear"},
    {"r": 3, "lora_alpha": 0, "target_modules": r".*\.(?:q|v)_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.mlp.up_proj"]},
    {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 3}},
    {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    {"r": 4, "target_modules": ["q_proj"], "fan_in_fan_out": True},
    {"r": 4, "rank_pattern": {"(q|k)_proj": 2, r"^model.layers.0.*v_proj": 3}},
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and transformers of different ages
@pytest.mark.filterwarnings("ignore:(Setting|fan_in|Could not find|Unable to fetch):UserWarning")
@pytest.mark.parametrize("settings", PEFT_CASES)
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_merged_weights_equal_those_of_peft(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    compare_with_peft(tmp_path, FAMILIES[kind], settings, tie_word_embeddings=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:(Could not find|Unable to fetch):UserWarning")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_stand_for_the_bases(tmp_path: Path, bias: str) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "bias": bias}
    compare_with_peft(tmp_path, FAMILIES["qwen2"], settings)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings(
    "ignore:(Could not find|Unable to fetch|Model has|You are|Input and):UserWarning"
)
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_tied_head_that_is_held_whole_is_tied_no_more(tmp_path: Path, saved: list[str]) -> None:
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": saved}
    ours = compare_with_peft(tmp_path, FAMILIES["qwen2"], settings, tie_word_embeddings=True)
    assert not torch.equal(ours["lm_head.weight"], ours["embed_tokens.weight"])


def compare_with_peft(
    folder: Path, tiny: Tiny, settings: dict[str, Any], **changes: Any
) -> dict[str, torch.Tensor]:
    """Return our merged weights, which were compared with PEFT's own, loaded from its files."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": targets} | settings)
    theirs = oracle(tiny, **changes)
    write_checkpoint(folder / "base", tiny, theirs)
    change_config(folder / "base", name="config.json", **changes)
    wrapped = peft.get_peft_model(oracle(tiny, **changes), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(noise)
    wrapped.save_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, folder / "adapter")
    wanted = loaded.merge_and_unload().state_dict()
    ours = load_checkpoint(folder / "base", adapter=folder / "adapter").state_dict()
    for name, tensor in ours.items():
        key = name if name.startswith("lm_head") else f"model.{name}"
        assert (tensor - wanted[key]).abs().max() <= 1e-6, name  # one sum in another order
    plain = load_checkpoint(folder / "base").state_dict()
    moved = settings.get("lora_alpha") != 0 or any(
        k in settings for k in ("bias", "modules_to_save")
    )
    assert moved == any(not torch.equal(plain[name], ours[name]) for name in ours)
    return ours


def test_older_names_with_the_adapters_own_are_read(base: Path, adapter: Path) -> None:
    wanted = load_checkpoint(base, adapter=adapter).state_dict()
    weights = load_file(adapter / WEIGHTS)
    renamed = {name.replace(".weight", ".default.weight"): t for name, t in weights.items()}
    save_file(renamed, adapter / WEIGHTS)
    found = load_checkpoint(base, adapter=adapter).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_low_precision_weights_are_merged_in_fp32(tmp_path: Path) -> None:
    theirs = oracle(FAMILIES["llada"]).to(torch.bfloat16)
    write_checkpoint(tmp_path / "base", FAMILIES["llada"], theirs)
    theirs.float()
    write_adapter(tmp_path / "adapter", FAMILIES["llada"], theirs.state_dict())
    ours = load_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
    wanted = theirs.state_dict()["model.layers.1.self_attn.o_proj.weight"]
    found = ours.state_dict()["layers.1.self_attn.o_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.to(torch.bfloat16))


def test_adapter_for_another_base_is_refused(tmp_path: Path, adapter: Path) -> None:
    write_model(tmp_path / "llada", "llada")
    with pytest.raises(
        UnsupportedModel, match=r"another model, made for org/base: it adapts model"
    ):
        load_checkpoint(tmp_path / "llada", adapter=adapter)
    write_model(tmp_path / "qwen3", "qwen3")  # same names, other head sizes
    with pytest.raises(
        UnsupportedModel, match=r"k_proj\.weight of shape \(32, 64\), which is \(64, 64\) here"
    ):
        load_checkpoint(tmp_path / "qwen3", adapter=adapter)


@pytest.mark.parametrize(("base_name", "warns"), [("org/base", False), ("org/other", True)])
def test_adapter_of_a_sibling_is_merged_with_a_warning(
    base: Path, adapter: Path, base_name: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": base_name}
    (base / "config.json").write_text(json.dumps(config))
    load_checkpoint(base, adapter=adapter)
    assert ("was made for org/base, but is merged into other" in caplog.text) == warns


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    base: Path, adapter: Path, key: str, value: Any
) -> None:
    change_config(adapter, **{key: value})
    with pytest.raises(UnsupportedModel, match=rf"asks for {key} .*only plain LoRA"):
        load_checkpoint(base, adapter=adapter)


def test_adapter_tensors_are_checked(base: Path, adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    save_file(
        {n: t for n, t in weights.items() if n != f"{FIRST}.lora_B.weight"}, adapter / WEIGHTS
    )
    with pytest.raises(ModelDamaged, match=r"lacks lora_B of model\.layers\.0\.self_attn\.k_proj"):
        load_checkpoint(base, adapter=adapter)
    magnitude = {f"{FIRST}.lora_magnitude_vector": torch.ones(3)}
    save_file(weights | magnitude, adapter / WEIGHTS)
    with pytest.raises(UnsupportedModel, match=r"lora_magnitude_vector, which is no LoRA factor"):
        load_checkpoint(base, adapter=adapter)
    save_file(weights, adapter / WEIGHTS)
    change_config(adapter, rank_pattern={"k_proj": 8})
    with pytest.raises(ModelDamaged, match=r"k_proj the rank 8, but its factors have 4"):
        load_checkpoint(base, adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, ModelDamaged, "lacks lm_head, one of modules_to_save"),
        ({"lora_alpha": 1e308}, ModelDamaged, r"alpha 1e\+308, beyond any float"),
        ({"lora_alpha": 10**400}, ModelDamaged, "lora_alpha is 1000+.* but must be a number"),
        ({"lora_alpha": float("nan")}, ModelDamaged, "lora_alpha is nan"),
        ({"r": 2**70}, ModelDamaged, "r is 1180591620717411303424"),
        ({"target_modules": ["q_proj"]}, UnsupportedModel, "does not adapt .*k_proj"),
        ({"layers_to_transform": [1]}, UnsupportedModel, r"does not adapt .*layers\.0"),
        ({"rank_pattern": {"(": 4}}, ModelDamaged, "rank_pattern is no regular expression"),
        ({"rank_pattern": {SLOW: 4}}, UnsupportedModel, "more than 0.5 s to match"),
        ({"alpha_pattern": {SLOW: 4}}, UnsupportedModel, "more than 0.5 s to match"),
        ({"target_modules": SLOW}, UnsupportedModel, "more than 0.5 s to match"),
    ],
)
def test_config_of_an_adapter_from_elsewhere(
    base: Path,
    adapter: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "0.5 s" in message:
        monkeypatch.setattr(patterns, "TIMEOUT_S", 0.5)
    change_config(adapter, **changes)
    with pytest.raises(error, match=message):
        load_checkpoint(base, adapter=adapter)


def test_every_key_of_peft_is_known() -> None:
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= ADAPTER_KEYS


def test_missing_adapter_files_are_named(tmp_path: Path, base: Path, adapter: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no adapter folder at .*nowhere"):
        load_checkpoint(base, adapter=tmp_path / "nowhere")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pickled weights only \(adapter_model\.bin\)"):
        load_checkpoint(base, adapter=adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no adapter_config\.json"):
        load_checkpoint(base, adapter=adapter)


def test_backends_that_cannot_merge_say_so(base: Path, adapter: Path) -> None:
    with pytest.raises(UnsupportedModel, match="onnx backend cannot merge the adapter"):
        open_backend("onnx", base, device="cpu", quantization="auto", adapter=adapter)
