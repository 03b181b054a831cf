"""The commands export and verify, over checkpoints of every published layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import d2f_stream
from d2f_export.onnx.verify import compare_backends, compare_logits
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.onnx_backend import load
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.installed import embedded_folder
from d2f_runtime.models.manifest import read_manifest
from d2f_runtime.quantization.int8 import Int8Weight
from d2f_runtime.quantization.stored import quantise
from d2f_stream import cli
from d2f_stream.core.errors import OutOfCapacity
from d2f_stream.core.params import GenerationParams
from lab.embedded_model.__main__ import main as make_embedded_model
from tiny_checkpoints import FAMILIES, oracle, write_adapter, write_checkpoint, write_model
from tiny_families import Tiny
from tiny_models import tiny_folder

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_core")]

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "export/checkpoints/word-problems"


def export(model: Path, output: Path, *more: str) -> int:
    return cli.main(["export", "--model", str(model), "--output", str(output), *more])


def verify(artefact: Path, *more: str) -> int:
    return cli.main(["verify", str(artefact), *more])


def write_short(folder: Path, model_type: str, *, seed: int = 0, num_shards: int = 1) -> Any:
    """Write a checkpoint whose answers are short by default."""
    model = write_model(folder, model_type, seed=seed, num_shards=num_shards)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 12}))
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_published_checkpoint_is_exported_exactly(model_type: str, tmp_path: Path) -> None:
    write_short(tmp_path / "model", model_type, num_shards=2)
    assert export(tmp_path / "model", tmp_path / "onnx", "--quantize", "fp32") == 0
    params = read_manifest(tmp_path / "onnx").params_for("cpu")
    params = params.with_overrides({"temperature": 0.0})
    reference = open_backend("torch", tmp_path / "model", device="cpu", quantization="fp32")
    candidate = load(tmp_path / "onnx", device="cpu")
    prompts = [[5, 6, 7], list(range(10, 33))]
    found = compare_backends(reference, candidate, prompts, params)
    assert (found.token_agreement, found.same_answers) == (1.0, 1.0)
    assert found.max_confidence_error <= 1e-4
    logits = compare_logits(load_checkpoint(tmp_path / "model"), candidate, prompts, params)
    assert logits.max_error <= 1e-4


async def test_a_gguf_file_is_exported_with_its_tokenizer(tmp_path: Path) -> None:
    import tiny_gguf

    path = tmp_path / "tiny.gguf"
    model = tiny_gguf.oracle("llama", tied=True)
    tiny_gguf.write_gguf(path, "llama", model, stored="Q4_K", pre="smollm")
    assert export(path, tmp_path / "onnx", "--quantize", "fp32") == 0
    params = read_manifest(tmp_path / "onnx").params_for("cpu")
    candidate = load(tmp_path / "onnx", device="cpu")
    logits = compare_logits(load_checkpoint(path), candidate, [[5, 6, 7]], params)
    assert logits.max_error <= 1e-4
    chat = [{"role": "user", "content": "Say 1234, please.  <think>"}]
    answers = []
    for folder in (path, tmp_path / "onnx"):
        async with d2f_stream.load(folder, device="cpu") as engine:
            answers.append(await engine.generate(chat, max_new_tokens=12).result())
    assert answers[0].text == answers[1].text
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


def test_a_verified_artefact_holds_its_bounds(tmp_path: Path) -> None:
    write_short(tmp_path / "model", "qwen3")
    assert export(tmp_path / "model", tmp_path / "onnx", "--quantize", "fp32") == 0
    report = tmp_path / "report"
    more = ["--model", str(tmp_path / "model"), "--compared", "2", "--output", str(report)]
    assert verify(tmp_path / "onnx", *more) == 0
    found = json.loads((report / "report.json").read_text())
    bounds = {"logits within 2e-05 of their size": True, "identical tokens": True}
    assert found["bounds"] == bounds
    assert found["decoding"]["num_prompts"] == 2


async def test_an_artefact_with_an_adapter_is_loaded_by_its_folder(tmp_path: Path) -> None:
    tiny: Tiny = FAMILIES["Dream"]
    model = write_model(tmp_path / "model", "Dream")
    state = model.state_dict()
    write_adapter(tmp_path / "adapter", tiny, state)
    model.load_state_dict(state)
    write_checkpoint(tmp_path / "merged", tiny, model)
    given = ["--adapter", str(tmp_path / "adapter"), "--quantize", "fp32"]
    assert export(tmp_path / "model", tmp_path / "onnx", *given) == 0
    candidate = load(tmp_path / "onnx", device="cpu")
    params = GenerationParams(max_new_tokens=8, block_size=8)
    merged = load_checkpoint(tmp_path / "merged")
    assert compare_logits(merged, candidate, [[5, 6, 7]], params).max_error <= 1e-4
    async with d2f_stream.load(str(tmp_path / "onnx"), backend="onnx") as engine:
        assert engine.info.family == "dream"
        chat = [{"role": "user", "content": "How many?"}]
        result = await engine.generate(chat, max_new_tokens=8, temperature=0.0).result()
    assert result.usage.steps > 0


def test_a_checkpoint_that_is_quantised_is_exported_as_what_it_means(tmp_path: Path) -> None:
    tiny = FAMILIES["qwen2"]
    model = oracle(tiny)
    write_checkpoint(tmp_path / "model", tiny, model)
    weights, scales = dict(load_file(tmp_path / "model" / "model.safetensors")), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        stored = quantise(weights[name], "int8")
        assert isinstance(stored, Int8Weight)
        weights[name] = stored.values
        scales[name.removesuffix("weight") + "SCB"] = stored.absmax
        scales[name + "_format"] = torch.tensor(0, dtype=torch.uint8)
    save_file(weights | scales, tmp_path / "model" / "model.safetensors")
    assert export(tmp_path / "model", tmp_path / "onnx", "--quantize", "fp32") == 0
    candidate = load(tmp_path / "onnx", device="cpu")
    params = GenerationParams(max_new_tokens=4, block_size=1)
    meant = load_checkpoint(tmp_path / "model", dtype=torch.float32)
    assert compare_logits(meant, candidate, [[5, 6, 7]], params).max_error <= 1e-4


def test_logits_are_held_to_their_own_size(tmp_path: Path) -> None:
    """fp32 has seven digits, be the logits 4 or 400."""
    write_short(tmp_path / "model", "qwen2")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    head = "model.embed_tokens.weight" if "lm_head.weight" not in weights else "lm_head.weight"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": False})
    )
    save_file(weights | {"lm_head.weight": weights[head] * 100}, path)
    assert export(tmp_path / "model", tmp_path / "onnx", "--quantize", "fp32") == 0
    more = ["--model", str(tmp_path / "model"), "--compared", "2", "--output", str(tmp_path)]
    assert verify(tmp_path / "onnx", *more) == 0
    found = json.loads((tmp_path / "report.json").read_text())["logits"]
    assert found["max_error"] > 1e-4 > 2e-5 > found["max_relative"]


def test_a_timing_process_that_fails_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_short(tmp_path / "model", "qwen2")
    assert export(tmp_path / "model", tmp_path / "onnx", "--quantize", "fp32") == 0
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    manifest["defaults"]["cpu"]["temperature"] = 1.0
    manifest["defaults"]["cpu"]["top_p"] = 0.5  # which the graph does not have
    (tmp_path / "onnx" / "manifest.json").write_text(json.dumps(manifest))
    assert verify(tmp_path / "onnx") == 1
    assert "a new process could not answer with" in capfd.readouterr().err


async def test_a_static_graph_has_defaults_that_fit_and_refuses_more(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "Dream")
    (tmp_path / "model" / "generation_config.json").unlink()
    more = ["--target", "device", "--window", "16", "--capacity", "48", "--quantize", "fp32"]
    assert export(tmp_path / "model", tmp_path / "onnx", *more) == 0
    manifest = read_manifest(tmp_path / "onnx")
    assert (manifest.max_len, manifest.params_for("cpu").max_new_tokens) == (48, 24)
    assert verify(tmp_path / "onnx", "--model", str(tmp_path / "model"), "--compared", "2") == 0
    async with d2f_stream.load(tmp_path / "onnx") as engine:
        assert engine.info.max_len == 48
        assert (await engine.generate([5] * 24).result()).usage.completion_tokens <= 24
        with pytest.raises(d2f_stream.PromptTooLong, match="holds 48 in all"):
            await engine.generate([5] * 30, max_new_tokens=19).result()
    backend = load(tmp_path / "onnx", device="cpu")
    with pytest.raises(OutOfCapacity, match="holds 48; export it with a larger --capacity"):
        backend.open_slot(49)


def test_questions_that_do_not_fit_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_short(tmp_path / "model", "qwen2")
    assert export(tmp_path / "model", tmp_path / "onnx", "--quantize", "fp32") == 0
    line = json.dumps({"prompt": "apples " * 500})
    (tmp_path / "questions.jsonl").write_text(f"\ufeff{line}\n", encoding="utf-8")
    assert verify(tmp_path / "onnx", "--questions", str(tmp_path / "questions.jsonl")) == 2
    assert "the model holds 512 in all" in capfd.readouterr().err


def test_defaults_are_the_published_ones_without_a_nucleus(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "qwen2")
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "max_new_tokens": 20}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    assert export(tmp_path / "model", tmp_path / "onnx") == 0
    params = read_manifest(tmp_path / "onnx").params_for("cpu")
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.7, 1.0, 20)
    assert params.block_size == 1


@pytest.mark.parametrize(
    ("target", "given", "quantization"),
    [
        ("cpu", [], "int8"),
        ("cuda", [], "fp16"),
        ("cuda", ["--quantize", "int4-fp16"], "int4-fp16"),
        ("device", ["--window", "16", "--capacity", "64"], "int8"),
    ],
)
def test_targets_choose_their_weights(
    target: str, given: list[str], quantization: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", "llada")
    assert export(tmp_path / "model", tmp_path / "onnx", "--target", target, *given) == 0
    info = read_manifest(tmp_path / "onnx").onnx
    assert info is not None
    assert (info.target, info.quantization) == (target, quantization)
    files = {path.name for path in (tmp_path / "onnx").glob("*.onnx*")}
    if target == "device":
        assert [(w.width, w.capacity) for w in info.windows] == [(16, 64), (64, 64)]
        assert files == {"model.onnx", "model-64.onnx", "model.onnx.data"}
    else:
        assert files == {"model.onnx"}


def test_the_embedded_model_keeps_its_accuracy_in_int8(tmp_path: Path) -> None:
    output, problems = tmp_path / "report", tmp_path / "problems.jsonl"
    make_embedded_model(["problems", "--number", "12", "--output", str(problems)])
    given = ["--model", str(CHECKPOINT), "--questions", str(problems), "--compared", "3"]
    assert verify(embedded_folder(), *given, "--output", str(output)) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["accuracy"]["questions"] == 12
    assert report["accuracy"]["artefact"] >= 0.9
    assert report["decoding"]["token_agreement"] > 0.98
    assert report["startup_s"]["loaded"] <= report["startup_s"]["block"]
    text = (output / "report.md").read_text()
    assert text.startswith("# Verification of word-problems\n")
    assert "| model.onnx | " in text


def test_a_missed_bound_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_short(tmp_path / "model", "llada")
    write_short(tmp_path / "other", "llada", seed=1)
    assert export(tmp_path / "model", tmp_path / "onnx", "--quantize", "fp32") == 0
    other = ["--model", str(tmp_path / "other"), "--compared", "1", "--record"]
    assert verify(tmp_path / "onnx", *other) == 1
    assert "identical tokens: MISSED" in capsys.readouterr().out
    recorded = read_manifest(tmp_path / "onnx").verification
    assert recorded is not None
    assert not recorded.passed
    assert recorded.figures["logits.max_error"] > 1e-4  # type: ignore[operator]


def test_questions_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "questions.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "Ben has 12 apples. He buys 3 more.", "ending": "no such end"},
        {"messages": [{"role": "user", "content": "Ben has 2 apples. He buys 3 more."}]},
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--model", str(CHECKPOINT), "--questions", str(questions)]
    assert verify(embedded_folder(), *given) == 0  # as bad as the checkpoint
    assert "| questions | 1 |" in capsys.readouterr().out
    questions.write_text('{"prompt": "x"}\n{"text": "x"}\n')
    assert verify(embedded_folder(), *given) == 2
    assert "questions.jsonl, line 2: each line must" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--quantize", "int3"], 2, "quantize is 'int3' but must be one of fp32, fp16, int8, int4"),
        (["--target", "device", "--window", "600"], 2, "window is 600 but must be between 1 and"),
        (["--adapter", "/nowhere"], 2, "no adapter folder at /nowhere"),
    ],
)
def test_bad_settings_are_one_line(
    given: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", "llada")
    assert export(tmp_path / "model", tmp_path / "onnx", *given) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "onnx").exists()


def test_only_an_exported_model_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", "llada")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    for output in (tmp_path / "papers", tmp_path / "papers/thesis.txt", tmp_path / "model"):
        before = sorted(tmp_path.rglob("*"))
        assert export(tmp_path / "model", output) == 2
        assert "must be a new folder, or an exported model" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert export(tmp_path / "model", tmp_path / "empty") == 0


def test_what_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path / "none", tmp_path / "onnx") == 2
    assert "no model folder at" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert export(tmp_path / "empty", tmp_path / "onnx") == 2
    assert "has no config.json; is it a model folder?" in capsys.readouterr().err
    write_model(tmp_path / "model", "llada")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert export(tmp_path / "model", tmp_path / "onnx") == 1
    assert "model_type 'mamba', but this build runs" in capsys.readouterr().err
    assert verify(tiny_folder("dream", "torch")) == 2
    assert "no manifest.json in" in capsys.readouterr().err
