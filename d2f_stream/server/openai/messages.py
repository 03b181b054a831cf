"""A message of a chat as OpenAI's API writes it, and what a template gets of it. Pure values."""

from msgspec import Struct

from d2f_stream.server.openai.fields import UnsupportedParameter
from d2f_stream.server.openai.history import FunctionCall, ToolCall, result_text, with_calls

__all__ = ["ChatMessage", "TextPart"]


class TextPart(Struct, frozen=True, kw_only=True):
    """A part of a message; only those of type "text" are understood."""

    type: str
    text: str | None = None


class ChatMessage(Struct, frozen=True, kw_only=True):
    """A message of the conversation; an assistant's may be of calls, or a refusal, alone."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None

    @property
    def is_result(self) -> bool:
        """Whether it says what a tool gave."""
        return self.role in ("tool", "function")

    def wire(self, place: str) -> dict[str, str]:
        """Return the message as a template takes it.

        Args:
            place: of the message in the request, for errors.

        Raises:
            UnsupportedParameter: it is not plain text of a known role.
        """
        if self.is_result:
            return {"role": "user", "content": result_text(self._text(place))}
        roles = {"system": "system", "developer": "system", "user": "user"}
        role = (roles | {"assistant": "assistant"}).get(self.role)
        if role is None:
            known = "system, developer, user, assistant or tool"
            sentence = f"{place}.role is {self.role[:40]!r} but must be {known}"
            raise UnsupportedParameter(f"{place}.role", sentence)
        calls = self._calls
        if calls and role != "assistant":
            where = f"{place}.tool_calls" if self.tool_calls else f"{place}.function_call"
            raise UnsupportedParameter(where, f"{where} is of an assistant's messages only")
        more = {"name": self.name, "reasoning_content": self.reasoning_content}
        known_to_some = {key: value for key, value in more.items() if value is not None}
        return {"role": role, "content": with_calls(self._text(place), calls), **known_to_some}

    @property
    def _calls(self) -> list[FunctionCall]:
        calls = [call.function for call in self.tool_calls or ()]
        return calls if self.function_call is None else [*calls, self.function_call]

    def _text(self, place: str) -> str:
        if isinstance(self.content, str):
            return self.content
        if self.content is None and (self.is_result or self.role == "assistant"):
            return self.refusal or ""
        if self.content is None:
            sentence = f"{place}.content is missing but must be a string or a list of text parts"
            raise UnsupportedParameter(f"{place}.content", sentence)
        for number, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                where = f"{place}.content[{number}]"
                sentence = f"{where} is of type {part.type[:40]!r} but this model reads text only"
                raise UnsupportedParameter(where, sentence)
        return "".join(part.text or "" for part in self.content)
