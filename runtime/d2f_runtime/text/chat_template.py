"""A chat template, compiled: it comes with a model from anywhere.

So it runs in jinja2's immutable sandbox and in bounded time, with the settings and helpers that
transformers gives it.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from d2f_runtime.text.bounded_template import bound_environment, compile_bounded
from d2f_stream.core.errors import MissingExtra, ModelDamaged

__all__ = ["compile_template"]


def compile_template(source: str, where: Path) -> Callable[..., str]:
    """Return what renders a template.

    Args:
        source: the template.
        where: it came from, for errors.

    Raises:
        ModelDamaged: it cannot be read.
        MissingExtra: jinja2 is not installed.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtra("a chat template", "jinja2", "edge") from error

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def tojson(  # jinja2's own escapes HTML
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    class Generation(Extension):
        """Marks what the model wrote, for training; here its content is all that matters."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = bound_environment(ImmutableSandboxedEnvironment)(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return compile_bounded(environment, source)
    except TemplateError as error:
        raise ModelDamaged(f"the chat template of {where} cannot be read: {error}") from error
