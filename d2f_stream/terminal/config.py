"""Config: what a person sets once for the command line, in a TOML file of their own.

Lies in $XDG_CONFIG_HOME/d2f-stream/config.toml. Flags win over the environment, which wins over it.
"""

import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from d2f_stream.core.errors import InvalidParams, InvalidRequest
from d2f_stream.core.nearest import one_of
from d2f_stream.terminal.system_errors import sentence_of
from d2f_stream.terminal.table import wrapped

__all__ = ["KEYS", "Config", "config_path", "data_folder"]

KEYS: Final = {
    "model": "what runs where --model is not given: a name, a folder, a hub id or a file",
    "server": "address of a server that answers instead of a local model",
    "token": "of that server; D2F_TOKEN wins over it",
}


def config_path(environment: Mapping[str, str]) -> Path:
    """Return where the file lies, whether it exists or not."""
    base = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "d2f-stream" / "config.toml"


def data_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder of what the command line keeps by itself, such as its history."""
    base = environment.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "d2f-stream"


class Config:
    """The values of one file; a missing file has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = _read(path)

    def get(self, key: str) -> str | None:
        """Return a value; None where it is not set."""
        return self._values.get(key)

    def set(self, key: str, value: str | None) -> None:
        """Write a value, or take it out; the file is replaced whole, readable by its owner only.

        Raises:
            InvalidParams: there is no such key, the server is no address, or the file cannot be
                written.
        """
        if key not in KEYS:
            raise InvalidParams("key", key, one_of(key, KEYS))
        if key == "server" and value is not None and "://" not in value:
            raise InvalidParams(key, value, f"a whole address, such as http://{value}")
        values = {**self._values, key: value}
        kept = {name: text for name, text in values.items() if text is not None}
        lines = "".join(f"{name} = {json.dumps(kept[name])}\n" for name in sorted(kept))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(  # made for its owner alone: a token is a secret
                "w", dir=self.path.parent, delete=False, encoding="utf-8"
            ) as file:
                file.write(lines)
            os.replace(file.name, self.path)
        except OSError as error:
            raise InvalidParams(
                "config file", str(self.path), f"writable ({sentence_of(error)})"
            ) from error
        self._values = kept

    def describe(self, *, width: int | None = None) -> str:
        """Return each key with its value, secrets hidden, and what it is for."""
        lines = [f"# {self.path}" + ("" if self.path.exists() else " (not written yet)")]
        for key, about in KEYS.items():
            value = self.get(key)
            told = "(not set)" if value is None else "(set)" if key == "token" else value
            lines += [f"{key:7} {told}", wrapped(f"{'':8}{about}", width=width, indent=" " * 8)]
        return "\n".join(lines)


def _read(path: Path) -> dict[str, str]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"the config file {path} cannot be read: {error}") from error
    for key, value in values.items():
        if key not in KEYS:
            raise InvalidRequest(f"{path} has the key {key!r}, but it must be {one_of(key, KEYS)}")
        if not isinstance(value, str):
            raise InvalidRequest(f"{key} is {value!r} in {path} but must be a string")
    return values
