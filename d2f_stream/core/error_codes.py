"""From the code of an error, which crosses the wire, back to the error. Pure."""

from typing import Final

from d2f_stream.core import errors
from d2f_stream.core.errors import D2FError

__all__ = ["error_from"]


def error_from(code: str, message: str) -> D2FError:
    """Return the error of a code that came over the wire; of an unknown one, a D2FError with it.

    Errors that are made of values come back as their parent, since only the sentence crosses; the
    code is kept.
    """
    kind = _BY_CODE.get(code, D2FError)
    while "__init__" in vars(kind):
        kind = next(base for base in kind.__bases__ if issubclass(base, D2FError))
    error = kind(message)
    if error.code != code:
        error.code = code  # type: ignore[misc]  # the class's stands for all others
    return error


_KINDS: Final[list[type[D2FError]]] = [getattr(errors, name) for name in errors.__all__]
_BY_CODE: Final = {kind.code: kind for kind in _KINDS}
