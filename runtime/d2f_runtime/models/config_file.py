"""ConfigFile: typed reading of a JSON file, with errors that name the file and the key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2f_stream.core.errors import ModelDamaged

__all__ = ["ConfigFile"]


class ConfigFile:
    """A JSON object of a model folder. A key that is null counts as absent.

    Args:
        path: for errors.
        values: what the file holds.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path) -> "ConfigFile | None":
        """Return the file's content, None where there is no such file.

        Raises:
            ModelDamaged: it holds no JSON object.
        """
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ModelDamaged(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelDamaged(f"{path} holds no JSON object")
        return cls(path, values)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; without a default it must be there."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelDamaged(f"{self.path}: {key} is {value!r} but must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number; without a default it must be there."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ModelDamaged(f"{self.path}: {key} is {value!r} but must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelDamaged(f"{self.path}: {key} is {value!r} but must be true or false")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Return token ids: those of a list, a single one, or none where the key is absent."""
        value = self.values.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        for token in listed:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ModelDamaged(f"{self.path}: {key} is {value!r} but must name token ids")
        return tuple(listed)

    def section(self, key: str) -> "ConfigFile":
        """Return a nested object, empty where the key is absent."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ModelDamaged(f"{self.path}: {key} is {value!r} but must be an object")
        return ConfigFile(self.path, value)

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelDamaged(f"{self.path} lacks {key}")
        return value
