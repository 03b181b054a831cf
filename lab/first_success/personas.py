"""Personas: who comes, and which commands of which page they run. The pages hold the words."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["PERSONAS", "Persona", "commands", "program"]

ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Persona:
    """Somebody who follows the documentation.

    Attributes:
        name: what is recorded.
        install: the page whose first commands that begin with `pip install` are run.
        num_installs: how many of them.
        answer: the page that leads to an answer.
        begins: what its command begins with; empty: the page's first program in Python.
        note: what the run leaves out, for people.
    """

    name: str
    install: str
    num_installs: int
    answer: str
    begins: str = ""
    note: str = ""


PERSONAS: Final = (
    Persona("app developer", "README.md", 2, "README.md"),
    Persona(
        "chat UI",
        "docs/tutorial/first-ten-minutes.md",
        2,
        "docs/how-to/chat-ui.md",
        "d2f-stream serve",
    ),
    Persona(
        "GPU workstation",
        "docs/how-to/gpu-workstation.md",
        1,
        "README.md",
        "d2f-stream models recommend",
        "without a GPU and a hub: what fits this machine, in place of an answer of LLaDA-8B",
    ),
    Persona(
        "edge device", "docs/how-to/edge-device.md", 1, "docs/how-to/edge-device.md",
        "d2f-stream generate",
    ),
)  # fmt: skip


def commands(page: str, begins: str) -> list[str]:
    """Return the indented commands of a page that begin so, without their comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^    ({re.escape(begins)}(?: .*)?)$", text, re.MULTILINE)
    return [re.sub(r" {2,}#.*", "", line).strip() for line in found]


def program(page: str) -> str:
    """Return the first Python program of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0]
