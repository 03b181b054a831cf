"""Chat templates that do not end, or make too much: cut off, and the message says so."""

import time
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from d2f_runtime.models import __path__ as models_path
from d2f_runtime.text import bounded_template
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.errors import InvalidPrompt

TOKENIZER = Path(models_path[0]) / "embedded" / "tokenizer.json"
MESSAGES = [{"role": "user", "content": "hi"}]
MANY = "range(99999)"
DOUBLING = (
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x OP n.x %}{% endfor %}"
)
LIMIT_S = 0.2


def render(template: str) -> str:
    return Tokenizer(TOKENIZER, chat_template=template).render(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        f"{{% for a in {MANY} %}}{{% for b in {MANY} %}}{{% endfor %}}{{% endfor %}}",
        f"{{% for a in {MANY} %}}{{% for b in {MANY} if false %}}{{% endfor %}}{{% endfor %}}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% for a in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ (10 ** 100000) * (10 ** 100000) ** 1000 }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%01000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a' | center(10 ** 10) }}",
        DOUBLING.replace("OP", "~"),
        DOUBLING.replace("OP", "+"),
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_without_an_end_is_cut_off(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "MAX_RENDER_S", LIMIT_S)
    began = time.monotonic()
    with pytest.raises(InvalidPrompt, match="chat template"):
        render(template)
    assert time.monotonic() - began < 50 * LIMIT_S  # on a machine that is busy, too


def test_template_is_not_blamed_for_a_machine_that_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_template, "MAX_RENDER_S", LIMIT_S)
    environment = bounded_template.bound_environment(ImmutableSandboxedEnvironment)()
    template = "{% for i in range(2) %}{{ stand_still(0.3) }}{% endfor %}"
    rendered = bounded_template.compile_bounded(environment, template)
    assert rendered(stand_still=time.sleep) == "NoneNone"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] }}{% endfor %}", "user: hi"),
        ("{% for m in messages %}{{ loop.index }}{{ loop.last }}{% endfor %}", "1True"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') + f('b') * 2 }}", "<a><b><b>"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ 'x' | center(5) }}{{ 7 % 4 }}", "a-007  x  3"),
        ("{% set x = 'a' ~ ('b' ~ 1) %}{{ x if x ~ '' == 'ab1' else 'no' }}", "ab1"),
        ("{{ messages | map(attribute='content') | join(',') | replace('h', 'H') }}", "Hi"),
    ],
)
def test_template_that_ends_is_rendered_as_ever(template: str, text: str) -> None:
    assert render(template) == text
