import json
from pathlib import Path
from typing import Any

import pytest

from d2f_runtime.text.folder_tokens import read_tokens
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.errors import InvalidPrompt, MissingExtra, ModelDamaged, ModelNotFound

TEMPLATE = """\
{{ bos_token }}
{% for message in messages %}
    {% if message.role not in ("user", "assistant") %}
        {{ raise_exception("no role " + message.role) }}
    {% endif %}
<{{ message.role }}>{{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{%- endif %}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<mask>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
    tokens.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokens.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.mark.parametrize("text", ["the cat", "naïve 🙂\n", "  spaces  ", ""])
def test_text_survives(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_added_and_special_tokens_are_read(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert 0 not in tokenizer.encode("the cat")
    assert tokenizer.encode("<bos>the cat")[0] == 0


def test_special_tokens_are_left_out_of_the_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode((0, *tokenizer.encode("the cat"), 1)) == "the cat"


def test_incomplete_utf8_becomes_replacement_characters(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode("a🙂")[:-1]).rstrip("�") == "a"


def test_chat_template_file_wins_and_is_rendered_as_transformers_does(folder: Path) -> None:
    messages = [{"role": "user", "content": 'hi <b> & "q"'}, {"role": "assistant", "content": "ho"}]
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chats
    assert tokenizer.render(messages) == ('<bos>\n<user>hi <b> & "q"\n<assistant>ho\n<assistant>')


def test_template_may_stand_in_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(folder).render([{"role": "user", "content": "hi"}]) == "old"


def test_template_that_refuses_is_an_invalid_prompt(folder: Path) -> None:
    with pytest.raises(InvalidPrompt, match="no role system"):
        Tokenizer.from_folder(folder).render([{"role": "system", "content": "hi"}])


@pytest.mark.parametrize(
    "template", ["{{ 1 + messages }}", "{{ nothing.at.all }}", "{{ 1 // 0 }}", "{{ [][9].x }}"]
)
def test_template_that_fails_is_an_invalid_prompt(folder: Path, template: str) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json", chat_template=template)
    with pytest.raises(InvalidPrompt, match="chat template"):
        tokenizer.render([{"role": "user", "content": "hi"}])


def test_model_without_a_template_says_so(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert not tokenizer.chats
    with pytest.raises(InvalidPrompt, match="no chat template; pass the prompt as one string"):
        tokenizer.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "<é>"\n}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for m in messages %}{% break %}{% endfor %}done", "done"),
    ],
)
def test_template_helpers(folder: Path, template: str, text: str) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json", chat_template=template)
    assert tokenizer.render([{"role": "user", "content": "<é>"}]) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
    ],
)
def test_template_cannot_leave_its_sandbox(folder: Path, template: str) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.json", chat_template=template)
    with pytest.raises(InvalidPrompt):
        tokenizer.render([{"role": "user", "content": "hi"}])


def test_broken_template_is_damage(folder: Path) -> None:
    with pytest.raises(ModelDamaged, match="chat template"):
        Tokenizer(folder / "tokenizer.json", chat_template="{% for %}")


def test_missing_and_broken_files_are_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelDamaged, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelDamaged, match=r"tokenizer\.json"):
        Tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        Tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("library", ["tokenizers", "jinja2"])
def test_missing_library_names_its_extra(
    folder: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: dict[str, Any] = {library: None, f"{library}.sandbox": None}
    for name, module in modules.items():
        monkeypatch.setitem(__import__("sys").modules, name, module)
    with pytest.raises(MissingExtra, match=rf"needs {library}.*d2f-stream\[edge\]"):
        Tokenizer.from_folder(folder)


def test_file_at_which_the_library_panics_is_told_as_damaged(tmp_path: Path) -> None:
    model = {
        "type": "BPE",
        "continuing_subword_prefix": "longer than any token",
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": ["a b"],
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ModelDamaged, match="out of range"):
        read_tokens(path)
