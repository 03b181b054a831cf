"""Files from other systems and other libraries: read as transformers reads them, or refused."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import d2f_stream
from d2f_runtime.models.adapter_config import ADAPTER_KEYS
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.published import read_published
from d2f_runtime.text.detokenizer import Detokenizer
from d2f_runtime.text.files import read_object, read_text
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_runtime.text.tokenizer_files import SPECIAL_NAMES
from d2f_stream.core.errors import InvalidPrompt, ModelDamaged, UnsupportedModel
from tiny_checkpoints import FAMILIES, added_tokens, config_of, write_model, write_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.torch

MARK = "\ufeff".encode()
TEXT = "How many apples has Ann? <|im_end|> Ann has 3."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a Qwen2 beside its weights."""
    tiny = FAMILIES["qwen2"]
    write_tokenizer(tmp_path, tiny)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tiny)))
    return tmp_path


def oracle_of(folder: Path) -> Any:
    """The class that takes tokenizer.json as it is; Qwen2's own leaves most of the file unread."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_stored_truncation_and_padding_are_of_a_trainers_batches(folder: Path) -> None:
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = oracle_of(folder)(TEXT)["input_ids"]
    stored.enable_truncation(max_length=3)
    stored.enable_padding(length=64)
    stored.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_folder(folder).encode(TEXT) == wanted
    assert Tokenizer(folder / "tokenizer.json").encode(TEXT) == wanted


@pytest.mark.parametrize("kind", ["qwen2", "Dream"])  # tokenizer.json; vocab.json and merges.txt
def test_byte_order_marks_and_line_ends_mean_nothing(tmp_path: Path, kind: str) -> None:
    tiny = FAMILIES[kind]
    write_tokenizer(tmp_path, tiny)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tiny)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    (tmp_path / "chat_template.jinja").write_text(tiny.template)
    chat = [{"role": "user", "content": "two\nlines"}]
    plain = Tokenizer.from_folder(tmp_path)
    wanted = plain.encode(TEXT), plain.render(chat), read_published(tmp_path).config
    for path in tmp_path.iterdir():
        path.write_bytes(MARK + path.read_bytes().replace(b"\n", b"\r\n"))
    marked, published = Tokenizer.from_folder(tmp_path), read_published(tmp_path)
    assert (marked.encode(TEXT), marked.render(chat), published.config) == wanted
    assert published.defaults(adapted=False).max_new_tokens == 7


def test_tokens_that_are_named_are_special_as_in_transformers(folder: Path) -> None:
    stored = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    token = tokenizers.AddedToken("<|tool|>", special=False, normalized=False)
    stored.add_tokens([token])
    stored.save(str(folder / "tokenizer.json"))
    plain = json.loads((folder / "tokenizer_config.json").read_text())
    extra, named = {"extra_special_tokens": ["<|tool|>"]}, {"pad_token": "<|tool|>"}
    bare = {key: value for key, value in plain.items() if key != "added_tokens_decoder"}
    for config in (plain, plain | extra, plain | named, bare, bare | extra, bare | named):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = oracle_of(folder)
        ids = theirs("a<|tool|>b")["input_ids"]
        ours = Tokenizer.from_folder(folder)
        assert ours.encode("a<|tool|>b") == ids
        wanted = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == wanted
        assert ("<|tool|>" in ours.special_tokens) == (wanted == "ab")


@pytest.mark.parametrize("kind", ["qwen2", "Dream"])
def test_name_of_the_mask_in_a_text_is_text(tmp_path: Path, kind: str) -> None:
    tiny = FAMILIES[kind]
    write_tokenizer(tmp_path, tiny)
    name = tiny.mask or "<|im_start|>"
    mask_id = added_tokens(tiny)[name]
    plain, ours = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(tmp_path, mask_id=mask_id)
    text = f"What does {name} mean, {name}? <|im_end|>"
    ids = ours.encode(text)
    assert mask_id in plain.encode(text)
    assert mask_id not in ids
    assert ours.decode(ids) == text.replace("<|im_end|>", "")
    assert added_tokens(tiny)["<|im_end|>"] in ids
    assert ours.encode(TEXT) == plain.encode(TEXT)


async def test_token_that_was_added_beyond_the_embedding(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen2")
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    size = config_of(FAMILIES["qwen2"])["vocab_size"]
    stored.add_tokens([f"<extra{i}>" for i in range(size - stored.get_vocab_size() + 3)])
    stored.save(str(tmp_path / "tokenizer.json"))
    async with d2f_stream.load(tmp_path, device="cpu") as engine:
        answer = await engine.generate("Ann has 3 <extra0>", max_new_tokens=4).result()
        assert max(answer.token_ids) < size
        last = stored.get_vocab_size() - 1
        with pytest.raises(
            InvalidPrompt, match=rf"does not embed: its ids go from 0 to {size - 1}"
        ):
            await engine.generate(f"Ann has {stored.id_to_token(last)}", max_new_tokens=4).result()


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, True),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, False),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, True),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}, True),
        ({"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}, True),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, True),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}, False),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, True),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 99.0}}, True),
        ({"rope_parameters": {"type": "default", "rope_theta": 99.0}, "rope_scaling": {}}, True),
        ({"bos_token_id": None, "pad_token_id": None}, True),
        ({"hidden_act": "swish", "pretraining_tp": 2, "torch_dtype": None}, True),
        ({"eos_token_id": [9999, 3]}, True),
    ],
)
def test_config_means_what_transformers_reads(
    tmp_path: Path, changes: dict[str, Any], runs: bool
) -> None:
    write_model(tmp_path, "qwen2")
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not runs:
        with pytest.raises(UnsupportedModel, match="sliding_attention"):
            load_checkpoint(tmp_path)
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 280, (1, 24), generator=torch.Generator().manual_seed(1))
    ours = load_checkpoint(tmp_path)
    with torch.no_grad():
        hidden, _ = ours(tokens, torch.arange(24)[None], None, causal=True)
        wanted = theirs(tokens).logits
    assert (ours.logits(hidden) - wanted).abs().max() <= 1e-4


def test_gaps_of_a_tokenizer_are_forbidden(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    gone = [text for text, token in values["model"]["vocab"].items() if token in (30, 31, 77)]
    values["model"]["vocab"] = {t: i for t, i in values["model"]["vocab"].items() if t not in gone}
    values["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(values))
    config = read_published(folder).config
    assert config.unnamed_ids == (30, 31, 77)
    assert {30, 31, 77} <= set(config.forbidden_ids)


@pytest.mark.parametrize("stop", ["<|tool|>", "y<|tool|>", "<|tool|>z", "y<|tool|>z"])
def test_stop_string_that_names_a_special_token(stop: str) -> None:
    texts = {1: "x", 2: "y", 3: "z", 4: "<|to", 5: "ol|>"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(texts.get(token, "") for token in ids)

    for answer in ([1, 2, 9, 3, 1], [1, 2, 4, 5, 3, 1]):  # the token, and the same as text
        for size in (1, 2, 5):
            detokenizer = Detokenizer(decode=decode, stop=[stop], special_tokens={"<|tool|>": 9})
            parts = [detokenizer.push(answer[i : i + size]) for i in range(0, len(answer), size)]
            text = "".join(parts) + detokenizer.flush()
            assert detokenizer.stopped
            assert text == ("x" if stop.startswith("y") else "xy")
    other = Detokenizer(decode=decode, stop=["<|tool|>q"], special_tokens={"<|tool|>": 9})
    assert other.push([1, 9]) == "x"  # what may come true yet is not shown, nor missed
    assert other.push([3, 1]) + other.flush() == "zx"
    assert not other.stopped


KEYS = re.compile(r"`([A-Za-z0-9_]+)`")


def test_table_has_every_key_that_is_read() -> None:
    text = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    listed = set(KEYS.findall(text.partition("## What of a file counts")[2].partition("\n## ")[0]))
    kinds = (transformers.LlamaConfig, transformers.Qwen2Config, transformers.Qwen3Config)
    read = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    read |= set(vars(transformers.GenerationConfig())) | {*ADAPTER_KEYS, *SPECIAL_NAMES}
    assert sorted(read - listed) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b"[1]", "holds no JSON object"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelDamaged, match=message):
        read_object(tmp_path / "x.json")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ModelDamaged, match=r"folder\.json is not a file"):
        read_object(tmp_path / "folder.json")
    with pytest.raises(ModelDamaged, match="cannot be read"):
        read_text(tmp_path / ("long" * 1000))
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ModelDamaged, match="is not UTF-8"):
        read_text(tmp_path / "latin.jinja")
