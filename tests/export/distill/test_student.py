"""Adapters: what is trained is what this runtime and PEFT load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2f_export.distill.base import open_base
from d2f_export.distill.student import TARGETS, adapters_off, add_lora, save_adapter, trainable
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_runtime.models.transformer import Transformer
from tiny_checkpoints import FAMILIES, oracle, write_model
from tiny_models import CONFIGS, tiny_model

pytest.importorskip("transformers")
peft: Any = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft and transformers of several ages
]

TOKENS = torch.arange(3, 40)[None]


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        hidden, _ = model(TOKENS, torch.arange(TOKENS.shape[1])[None], None)
        return model.logits(hidden)


def trained(model: Transformer) -> Transformer:
    add_lora(model, rank=4, alpha=6.0, dropout=0.1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in trainable(model).values():
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
    return model.eval()


def write(folder: Path, model: Transformer, layout: Any) -> None:
    factors = trainable(model)
    save_adapter(folder, factors, layout=layout, base="org/base", alpha=6.0, dropout=0.1)


def test_fresh_adapters_change_nothing_and_train_nothing_else() -> None:
    model = tiny_model(CONFIGS["dream"])
    before = logits(model)
    add_lora(model, rank=4, alpha=4.0, dropout=0.1)
    assert torch.equal(logits(model.eval()), before)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(model)} == set(TARGETS)
    assert all(".lora_" in name for name in trainable(model))


def test_student_without_its_adapters_is_the_teacher() -> None:
    teacher = logits(tiny_model(CONFIGS["dream"]))
    model = trained(tiny_model(CONFIGS["dream"]))
    with adapters_off(model):
        assert torch.equal(logits(model), teacher)
    assert not torch.allclose(logits(model), teacher)
    assert trainable(model)


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_runtime_merges_what_was_trained(tmp_path: Path, family: str) -> None:
    write_model(tmp_path / "base", family)
    model = trained(load_checkpoint(tmp_path / "base"))
    write(tmp_path / "adapter", model, open_base(str(tmp_path / "base")).layout)
    merged = load_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
    assert (logits(merged) - logits(model)).abs().max() < 1e-4


def test_adapter_of_a_model_in_our_own_layout_is_merged_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", tiny_model(CONFIGS["dream"]))
    model = trained(load_checkpoint(tmp_path / "base"))
    write(tmp_path / "adapter", model, None)
    merged = load_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
    assert (logits(merged) - logits(model)).abs().max() < 1e-3


def test_peft_loads_it_over_the_published_class(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "Dream")
    model = trained(load_checkpoint(tmp_path / "base"))
    write(tmp_path / "adapter", model, "llama")
    theirs = peft.PeftModel.from_pretrained(oracle(FAMILIES["Dream"]), tmp_path / "adapter").eval()
    full = torch.zeros(1, 1, TOKENS.shape[1], TOKENS.shape[1])
    with torch.no_grad():
        found = theirs(input_ids=TOKENS, attention_mask=full).logits
    assert (found - logits(model)).abs().max() < 1e-4


class LLaDABlock(nn.Module):
    """The published names of what is adapted."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_out"):
            setattr(self, name, nn.Linear(64, 64, bias=False))


class LLaDAModelLM(nn.Module):
    """Named as the published class; no more than its tree of modules."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList([LLaDABlock(), LLaDABlock()])
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict({"blocks": blocks})})


def test_peft_finds_all_modules_of_llada(tmp_path: Path) -> None:
    write_model(tmp_path / "base", "llada")
    model = trained(load_checkpoint(tmp_path / "base"))
    write(tmp_path / "adapter", model, "llada")
    theirs = peft.PeftModel.from_pretrained(LLaDAModelLM(), tmp_path / "adapter").state_dict()
    for name, factor in trainable(model).items():
        layer, side = name.split(".")[1], name.rpartition(".lora_")[2][0]
        module = name.split(".")[3].replace("o_proj", "attn_out")
        key = (
            f"base_model.model.model.transformer.blocks.{layer}.{module}.lora_{side}.default.weight"
        )
        assert torch.equal(theirs[key], factor)
    assert sum(".lora_" in name for name in theirs) == len(trainable(model))
