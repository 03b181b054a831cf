"""ConfigFile: typed reading of a JSON file, with errors that name the file and the key."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from d2f_runtime.text.files import read_object
from d2f_stream.core.errors import ModelDamaged

__all__ = ["ConfigFile"]

MAX_INTEGER: Final = 2**31 - 1  # of sizes and ids; what is larger is no model's


class ConfigFile:
    """A JSON object of a model folder. A key that is null counts as absent.

    Args:
        path: for errors.
        values: what the file holds; the attribute has no key that is null.

    Attributes:
        nulls: the keys that are null, for the few that then do not mean their default.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = {key: value for key, value in values.items() if value is not None}
        self.nulls = values.keys() - self.values.keys()

    @classmethod
    def read(cls, path: Path) -> "ConfigFile | None":
        """Return the file's content, None where there is no such file.

        Raises:
            ModelDamaged: it holds no JSON object, or cannot be read.
        """
        values = read_object(path)
        return None if values is None else cls(path, values)

    @property
    def model(self) -> Path:
        """The model that it describes: its folder, or the file that holds all of it."""
        return self.path.parent if self.path.suffix == ".json" else self.path

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; without a default it must be there."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_INTEGER:
            allowed = f"a positive integer of at most {MAX_INTEGER}"
            raise ModelDamaged(f"{self.path}: {key} is {_shown(value)} but must be {allowed}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """Return a finite number, which must be positive; without a default it must be there."""
        value = self._value(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = _float(value)
            if math.isfinite(number) and (number > 0 or not positive):
                return number
        allowed = "a positive number" if positive else "a number"
        raise ModelDamaged(f"{self.path}: {key} is {_shown(value)} but must be {allowed}")

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelDamaged(f"{self.path}: {key} is {_shown(value)} but must be true or false")
        return value

    def text(self, key: str) -> str | None:
        """Return a string; None where the key is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise ModelDamaged(f"{self.path}: {key} is {_shown(value)} but must be a string")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Return token ids: those of a list, a single one, or none where the key is absent."""
        value = self.values.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        for token in listed:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ModelDamaged(f"{self.path}: {key} is {_shown(value)} but must name token ids")
        return tuple(listed)

    def section(self, key: str) -> "ConfigFile":
        """Return a nested object, empty where the key is absent."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise ModelDamaged(f"{self.path}: {key} is {_shown(value)} but must be an object")
        return ConfigFile(self.path, value)

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key, default)
        if value is None:
            raise ModelDamaged(f"{self.path} lacks {key}")
        return value


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _shown(value: object) -> str:
    """Return a value for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
