"""Transcript: the messages of one chat, and what a person does to them. Pure; knows no engine."""

import json
from dataclasses import dataclass, field

from d2f_stream.core.errors import InvalidRequest

__all__ = ["Message", "Transcript"]

Message = dict[str, str]


@dataclass(slots=True)
class Transcript:
    """A system prompt and the turns after it.

    Attributes:
        system: the system prompt; empty is none, which leaves the model's template its own.
        turns: questions and answers in order; a question without an answer only at the end.
        num_forgotten: messages left out from the beginning, since the context was full.
        withdrawn: the last question, where it got no answer.
    """

    system: str = ""
    turns: list[Message] = field(default_factory=list)
    num_forgotten: int = 0
    withdrawn: str = ""

    @property
    def messages(self) -> list[Message]:
        """What the model is asked: the system prompt and all turns that are not forgotten."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns[self.num_forgotten :]

    def ask(self, question: str) -> None:
        """Add a question."""
        self.turns.append({"role": "user", "content": question})
        self.withdrawn = ""

    def answer(self, text: str) -> None:
        """Add the answer to the last question."""
        self.turns.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """Take a question back that got no answer; `retry` has it."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.withdrawn = self.turns.pop()["content"]

    def retry(self) -> str:
        """Return the last question, dropped with its answer if it has one.

        Raises:
            InvalidRequest: nothing was asked yet.
        """
        if self.withdrawn:
            return self.withdrawn
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise InvalidRequest("nothing was asked yet, so nothing can be asked again")
        self.num_forgotten = min(self.num_forgotten, len(self.turns) - 1)
        return self.turns.pop()["content"]

    def forget(self) -> bool:
        """Leave out the oldest turn that is still told; False where only the question is left."""
        told = len(self.turns) - self.num_forgotten
        if told <= 1:
            return False
        self.num_forgotten += min(2, told - 1)
        return True

    def clear(self) -> None:
        """Begin anew; the system prompt stays."""
        self.turns.clear()
        self.num_forgotten = 0
        self.withdrawn = ""

    def to_json(self) -> str:
        """Return all messages, forgotten ones too, as a JSON list that other tools read."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return json.dumps(system + self.turns, ensure_ascii=False, indent=2) + "\n"
