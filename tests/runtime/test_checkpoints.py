import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_runtime.backends.torch_backend import load
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, UnsupportedModel
from tiny_models import CONFIGS, tiny_model

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, tiny_model(CONFIGS["dream"]))
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(CONFIGS[family])
    save_checkpoint(tmp_path, model, dtype=dtype)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor.to(dtype))
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == model.config.tie_embeddings


def test_missing_folder_and_files_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no model folder at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"has no model\.safetensors"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_truncated_file_is_damaged(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelDamaged, match=r"model\.safetensors cannot be read .* again"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_a_broken_config_is_damaged(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelDamaged, match=r"config\.json"):
        load_checkpoint(folder)


def test_config_of_another_build_is_unsupported(folder: Path) -> None:
    change_config(folder, sliding_window=128)
    with pytest.raises(UnsupportedModel, match="unknown key 'sliding_window'"):
        load_checkpoint(folder)


def test_tensors_are_checked_by_name_and_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "layers.1.mlp.up_proj.weight"
    tensor = weights.pop(name)
    save_file(weights, path)
    with pytest.raises(ModelDamaged, match=rf"lacks the tensor {name} \(1 in all\)"):
        load_checkpoint(folder)
    save_file(weights | {name: tensor[:50].clone()}, path)
    with pytest.raises(ModelDamaged, match=rf"{name} has shape \(50, 64\) .* asks for \(96, 64\)"):
        load_checkpoint(folder)
    save_file(weights | {name: tensor, "extra": tensor.clone()}, path)
    with pytest.raises(ModelDamaged, match="unknown tensor extra"):
        load_checkpoint(folder)


def test_the_backend_takes_known_quantizations_only(folder: Path) -> None:
    assert load(folder, device="cpu").info.quantization == "fp32"
    backend = load(folder, device="cpu", quantization="bf16")
    assert backend.info.quantization == "bf16"
    assert backend.info.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    with pytest.raises(UnsupportedModel, match="'int3' but torch offers auto, none, fp32"):
        load(folder, device="cpu", quantization="int3")


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny_model(CONFIGS["llada"]))
    code = (
        "import sys; from pathlib import Path\n"
        "from d2f_runtime.models.checkpoints import load_checkpoint\n"
        "load_checkpoint(Path(sys.argv[1]))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
