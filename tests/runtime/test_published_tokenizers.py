"""Tokenizers and chat templates of published folders against transformers' own."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel
from tiny_families import LLADA_TEMPLATE, QWEN_TEMPLATE

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CORPUS = [
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? I'll say: they've won.",
    "def add(a, b):\n\treturn a + b  # sum\r\n\r\n    print(add(1, 2))",
    "Größe, naïve café, e\u0301 (decomposed), Straße; 中文字符与 русский текст и العربية ",
    "🙂🙃 👩‍👩‍👧 $1,000.50 = 1e3 <tag attr='x'> </tag> \u00a0\u3000 ½ Ⅷ ² ｆｕｌｌ ﬁ",
]
ADDED = {
    "<|endoftext|>": {"special": True},
    "<|im_start|>": {"special": True},
    "<|im_end|>": {"special": True},
    "<tool>": {"lstrip": True},
    "</tool>": {"rstrip": True},
    "<both>": {"lstrip": True, "rstrip": True, "special": True},
    "word": {"single_word": True},
    "<|mask|>": {"special": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of Dream: vocab.json, merges.txt, added tokens in tokenizer_config.json."""
    path = tmp_path_factory.mktemp("dream")
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokens.train_from_iterator(CORPUS * 2, trainer)
    model = json.loads(tokens.to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    first = len(model["vocab"])
    added = {text: first + index for index, text in enumerate(ADDED)}
    (path / "added_tokens.json").write_text(json.dumps(added))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    config = {
        "added_tokens_decoder": {
            str(added[text]): {"content": text, **flags, **facts} for text, facts in ADDED.items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.Qwen2Tokenizer.from_pretrained(folder)


def random_text(rng: random.Random) -> str:
    pieces = []
    for _ in range(rng.randrange(1, 12)):
        match rng.randrange(6):
            case 0 | 1:
                line = rng.choice(CORPUS)
                start = rng.randrange(len(line))
                pieces.append(line[start : start + rng.randrange(1, 12)])
            case 2:
                pieces.append(rng.choice(list(ADDED)))
            case 3:
                pieces.append(
                    rng.choice([" ", "  ", "\n", " \n\n ", "\t", "\r\n", "'s", "'LL", "007"])
                )
            case 4:
                code = rng.choice([range(32, 127), range(0xA0, 0x250), range(0x300, 0x370)])
                pieces.append(chr(rng.choice(code)))
            case _:
                pieces.append(chr(rng.choice([*range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640)])))
    return "".join(pieces)


def test_ids_of_10000_texts_are_those_of_transformers(folder: Path, theirs: Any) -> None:
    ours = Tokenizer.from_folder(folder)
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(10_000)]
    wanted = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, wanted, strict=True):
        assert ours.encode(text) == ids, text
    for ids in wanted[:500]:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_added_tokens_without_flags_come_from_their_own_file(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    special = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_end|>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = Tokenizer.from_folder(tmp_path)
    added = json.loads((folder / "added_tokens.json").read_text())
    assert [tokenizer.encode(text) for text in added] == [[token] for token in added.values()]
    assert tokenizer.decode([added["<|im_end|>"], added["<tool>"]]) == "<tool>"
    assert tokenizer.special_names == {"eos_token": "<|endoftext|>"}


def test_added_tokens_beside_a_tokenizer_json_join_it(folder: Path, tmp_path: Path) -> None:
    whole = transformers.Qwen2Tokenizer.from_pretrained(folder)
    whole.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(len(whole)): {"content": "<|MASK|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<|MASK|>")[-1] == len(whole)
    assert (
        tokenizer.encode("it's  naïve 🙂<tool> x") == whole("it's  naïve 🙂<tool> x")["input_ids"]
    )
    config["added_tokens_decoder"] = {"5000": {"content": "<|far|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelDamaged, match=r"'<\|far\|>' .* should have the id 5000, but .* gives"):
        Tokenizer.from_folder(tmp_path)


def test_vocabularies_of_other_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(UnsupportedModel, match=r"'GPT2Tokenizer', but without a tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "merges.txt").write_text("no merge at all\n")
    with pytest.raises(ModelDamaged, match=r"merges\.txt are not a BPE vocabulary"):
        Tokenizer.from_folder(tmp_path)


QWEN3_LIKE = (
    "{%- if tools %}{{- '<tools>' }}{%- endif %}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if message.role == 'user' and ns.last == messages|length - 1 %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n"
    "        {%- generation %}{{- '<|im_start|>' + message.content | trim }}{%- endgeneration %}\n"
    "    {%- else %}\n        {{- message.role + ':' + message | tojson }}\n    {%- endif %}\n"
    "{%- endfor %}{{ ns.last }}{{ eos_token }}{{ mask_token }}"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}x{%- endif %}{%- endif %}"
)
LLAMA_LIKE = (
    "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message.role) }}{% endif %}"
    "{{ message.content | trim }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{{ documents is none }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}"
)
CHATS = [
    [{"role": "user", "content": " How many? \n"}],
    [
        {"role": "system", "content": "Answer <b>briefly</b> & well."},
        {"role": "user", "content": 'naïve "quoted" 🙂'},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Why?"},
    ],
]


@pytest.mark.parametrize("template", [QWEN_TEMPLATE, LLADA_TEMPLATE, QWEN3_LIKE, LLAMA_LIKE])
@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_rendered_as_by_transformers(
    folder: Path, tmp_path: Path, template: str, chat: list[dict[str, str]]
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|im_start|>"}
    config["chat_template"] = [{"name": "default", "template": template}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert Tokenizer.from_folder(tmp_path).render(chat) == wanted
