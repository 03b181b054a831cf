"""A chat template that ends: in bounded time, and with a prompt of bounded length.

Templates come with models from anywhere, and what they do may depend on the messages, which come
from anybody. jinja2's sandbox keeps them from the machine; it does not keep them from looping for
hours. So every round of a loop and every call of a macro looks at the clock, and whatever makes one
text of others looks at its length.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from d2f_stream.core.errors import InvalidPrompt

__all__ = ["bound_environment", "compile_bounded"]

MAX_RENDER_S: Final = 2.0
"""Of the thread's processor time: a busy or frozen machine is no fault of the template.

Published templates take a few milliseconds for the longest conversations.
"""
MAX_CHARACTERS: Final = 4_000_000
MAX_NUMBER: Final = 1_000_000
"""Of arguments: widths, counts and precisions."""


def bound_environment(base: type[Any]) -> type[Any]:
    """Return jinja2's environment class `base`, a sandboxed one, with bounds on what it makes."""

    class Bounded(base):  # type: ignore[misc]
        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.globals.pop("lipsum", None)
            self.bounds = _Bounds()
            for name in ("center", "indent", "batch", "slice", "round", "wordwrap"):
                self.filters[name] = _with_small_numbers(self.filters[name])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                _check_number(right)
                _check_size(abs(int(right)) * max(1, int(abs(left)).bit_length()))
            elif operator == "*":
                for text, times in ((left, right), (right, left)):
                    if isinstance(times, int) and hasattr(text, "__len__"):
                        _check_size(len(text) * max(0, times))
                _check_bits(left)
                _check_bits(right)
            elif operator == "%" and isinstance(left, str):
                _check_format(left)
            return _sized(super().call_binop(context, operator, left, right))

        def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                _check_number(value)
            if args and getattr(called, "__name__", "") in ("format", "format_map"):
                _check_format(str(getattr(called, "__self__", "")))
            return _sized(super().call(context, called, *args, **kwargs))

    return Bounded


def compile_bounded(environment: Any, source: str) -> Callable[..., str]:
    """Return what renders a template of an environment of `bound_environment`.

    It raises InvalidPrompt where the template takes too long or makes too much.

    Raises:
        jinja2.TemplateError: the source cannot be read.
    """
    from jinja2 import nodes

    tree = environment.parse(source)
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        look = nodes.Call(_bound("check_time"), [], [], None, None)
        node.body.insert(0, nodes.Output([look]).set_lineno(node.lineno))
    for parent in list(tree.find_all(nodes.Node)):
        for name, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _joined(value))
            elif isinstance(value, list):
                value[:] = [_joined(v) if isinstance(v, nodes.Concat) else v for v in value]
    tree.set_environment(environment)
    template = environment.template_class.from_code(
        environment, environment.compile(tree), environment.make_globals(None)
    )

    def render(**values: Any) -> str:
        pieces, length = [], 0
        with environment.bounds:
            for piece in template.generate(**values):
                environment.bounds.check_time()
                length += len(piece)
                _check_size(length)
                pieces.append(piece)
        return "".join(pieces)

    return render


class _Bounds:
    """When the template that this thread renders must have ended."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __enter__(self) -> None:
        self._local.until_s = time.thread_time() + MAX_RENDER_S

    def __exit__(self, *error: object) -> None:
        del self._local.until_s

    def check_time(self) -> str:
        """Return nothing to show, while there is time.

        Raises:
            InvalidPrompt: there is none.
        """
        if time.thread_time() > self._local.until_s:
            raise InvalidPrompt(
                f"the chat template takes more than {MAX_RENDER_S:g} s for these messages"
            )
        return ""

    def join(self, *values: object) -> str:
        """Return the texts of the values as one."""
        texts = [str(value) for value in values]
        _check_size(sum(map(len, texts)))
        return "".join(texts)


def _bound(method: str) -> Any:
    from jinja2 import nodes

    return nodes.Getattr(nodes.EnvironmentAttribute("bounds"), method, "load")


def _joined(concat: Any) -> Any:
    from jinja2 import nodes

    return nodes.Call(_bound("join"), concat.nodes, [], None, None).set_lineno(concat.lineno)


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    import functools

    @functools.wraps(function)  # also the marks of those that are given the environment
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args[1:], *kwargs.values()):
            _check_number(value)
        return function(*args, **kwargs)

    return bounded


def _check_number(value: object) -> None:
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise InvalidPrompt(f"the chat template calls for {value:.3g} of something")


def _check_bits(value: object) -> None:
    if isinstance(value, int):
        _check_size(value.bit_length())


def _check_format(form: str) -> None:
    digits = 0
    for sign in form:
        digits = digits + 1 if sign.isdigit() else 0
        if digits > 6:
            raise InvalidPrompt("the chat template formats a text with too large a number")


def _check_size(size: float) -> None:
    if size > MAX_CHARACTERS:
        raise InvalidPrompt(
            f"the chat template makes more than {MAX_CHARACTERS} characters of these messages"
        )


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
        _check_size(len(value))
    return value
