"""Request: what was asked of an engine, and the stream that it becomes once its model is loaded."""

from dataclasses import dataclass

from d2f_runtime.engine.answer_params import defaults_of, fitted_params
from d2f_runtime.engine.continuation import Continuation
from d2f_runtime.engine.limits import Limits
from d2f_runtime.engine.prompts import check_size, encode
from d2f_runtime.engine.stream import Stream, StreamId
from d2f_runtime.loaded_model import ModelParts
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.events import StreamNames
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Prompt

__all__ = ["Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it came.

    Attributes:
        prompt: chat messages, a string, or token ids.
        params: instead of the model's defaults.
        overrides: single fields, on top of either.
        names: that the events carry.
        before: what another engine has told of the answer.
        raw: take a string verbatim.
        buffer: of the session.
    """

    prompt: Prompt
    params: GenerationParams | None
    overrides: ParamOverrides
    names: StreamNames
    before: Continuation
    raw: bool
    buffer: EventBuffer

    @property
    def id(self) -> StreamId:
        """Of its stream."""
        return StreamId(self.names.stream)

    def stream(self, parts: ModelParts, limits: Limits) -> Stream:
        """Return its stream.

        Raises:
            InvalidRequest: prompt, parameters or what was committed do not fit model and limits.
        """
        chosen = (self.params or defaults_of(parts, limits)).with_overrides(self.overrides)
        must_fit = self.params is not None or "max_new_tokens" in self.overrides
        check_size(self.prompt, parts)
        self.before.check(parts.info.num_tokens)
        tokens = encode(self.prompt, parts, raw=self.raw)
        return Stream(
            self.names,
            prompt_tokens=tokens,
            params=fitted_params(chosen, len(tokens), parts, limits, must_fit=must_fit),
            info=parts.info,
            codec=parts.codec,
            buffer=self.buffer,
            before=self.before,
        )
