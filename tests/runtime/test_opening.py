from pathlib import Path
from typing import Any

import pytest

import d2f_runtime.models
from d2f_runtime.engine.opening import _key, open_engine, shared_engine
from d2f_runtime.models.installed import embedded_folder
from d2f_stream.core.errors import ModelDamaged, ModelNotFound
from scripted_folder import SCRIPT, write_model


def open_(model: Path | None) -> Any:
    return open_engine(model, backend="auto", quantization="auto", device="auto")


async def test_manifest_gives_the_defaults(tmp_path: Path) -> None:
    async with open_(write_model(tmp_path)) as engine:
        assert (engine.defaults.max_new_tokens, engine.defaults.block_size) == (40, 8)
        assert (await engine.generate("hi").result()).text == "abc"


async def test_damaged_file_is_noticed_before_it_is_used(tmp_path: Path) -> None:
    (write_model(tmp_path) / "script.json").write_bytes(SCRIPT.replace(b"abc", b"xyz"))
    with pytest.raises(ModelDamaged, match=r"script\.json has SHA-256"):
        async with open_(tmp_path):
            pass


async def test_installation_without_the_embedded_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d2f_runtime.models, "__path__", [str(tmp_path)])
    with pytest.raises(ModelNotFound, match="embedded model is not part of this installation"):
        open_(None)


async def test_embedded_model_is_found_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d2f_runtime.models, "__path__", [str(tmp_path)])
    (tmp_path / "embedded").mkdir()
    folder = write_model(tmp_path / "embedded")
    assert embedded_folder() == folder
    assert (await shared_engine(None).generate("hi").result()).text == "abc"


async def test_event_loop_has_one_engine_per_model(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_model(folder)
    assert shared_engine(first) is shared_engine(str(first))
    assert shared_engine(first) is not shared_engine(second)


async def test_shared_engine_that_was_closed_is_replaced(tmp_path: Path) -> None:
    closed = shared_engine(write_model(tmp_path))
    await closed.close()
    assert (await shared_engine(tmp_path).generate("hi").result()).text == "abc"


async def test_embedded_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d2f_runtime.models, "__path__", [str(tmp_path)])
    (tmp_path / "embedded").mkdir()
    write_model(tmp_path / "embedded")
    assert (await shared_engine("word-problems").generate("hi").result()).text == "abc"


def test_name_stands_for_a_repository_and_its_adapter() -> None:
    key = _key("d2f-llada:8b", backend="auto", quantization="auto", device="auto")
    assert str(key.path) == "GSAI-ML/LLaDA-8B-Instruct"
    assert str(key.adapter) == "SJTU-Deng-Lab/D2F_LLaDA_Instruct_8B_Lora"
    plain = _key("GSAI-ML/LLaDA-8B-Instruct", backend="auto", quantization="auto", device="auto")
    assert plain.adapter is None
    with pytest.raises(ModelNotFound, match="did you mean d2f-llada:8b"):
        _key("d2f-lada:8b", backend="auto", quantization="auto", device="auto")
