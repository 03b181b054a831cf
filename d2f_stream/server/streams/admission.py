"""Admission: which requests a server takes on, and in what form. Pure.

A request is measured before its prompt is read, by about how many tokens it may take; what it may
take is charged until its stream has ended.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from d2f_stream.core.errors import (
    InvalidRequest,
    MessageTooLarge,
    PromptTooLong,
    TooManyStreams,
)
from d2f_stream.core.params import ParamOverrides
from d2f_stream.core.session import Engine, Prompt
from d2f_stream.server.limits import RateLimit, ServeLimits
from d2f_stream.wire.protocol import Generate

__all__ = ["Admission", "Measured", "PromptReader", "measured"]


@runtime_checkable
class PromptReader(Protocol):
    """An engine that reads prompts off the event loop."""

    def check_size(self, prompt: Prompt) -> None:
        """Refuse a prompt that is too long at first sight."""
        ...

    async def encode(self, prompt: Prompt, *, raw: bool = True) -> list[int]:
        """Return a prompt's ids, which generate() takes for it. Safe to cancel."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """A request as the server will put it to the engine.

    Attributes:
        prompt: what is asked.
        raw: whether a string is taken verbatim.
        overrides: its parameters, within the server's limits.
        clamp: whether the answer is shortened, not refused, where the model has no room for it.
        charge: tokens that prompt and answer may take, about.
    """

    prompt: Prompt
    raw: bool
    overrides: ParamOverrides
    clamp: bool
    charge: int

    def fitted(
        self, num_tokens: int, *, max_prompt_tokens: int | None, max_len: int
    ) -> ParamOverrides:
        """Return the parameters with an answer that fits behind the prompt, where that may be.

        Raises:
            MessageTooLarge: the prompt is longer than the server allows.
            PromptTooLong: the model has no room behind it.
        """
        if max_prompt_tokens is not None and num_tokens > max_prompt_tokens:
            raise MessageTooLarge.of_prompt(num_tokens, max_prompt_tokens)
        room = max_len - num_tokens
        if not self.clamp or self.overrides.get("max_new_tokens", 0) <= room:
            return self.overrides  # the engine fits what was left open
        if room < 1:
            raise PromptTooLong(num_tokens, 1, max_len)
        return {**self.overrides, "max_new_tokens": room}


def measured(request: Generate, engine: Engine, limits: ServeLimits, *, clamp: bool) -> Measured:
    """Return what a request asks of the engine.

    Args:
        request: what is asked.
        engine: what will answer.
        limits: what the server allows.
        clamp: whether an answer is shortened, not refused, where the model has no room for its
            length. One whose length the request leaves open always is.

    Raises:
        D2FError: it asks for what cannot be, or for more than the server allows.
    """
    overrides = request.params.to_dict()
    is_open = "max_new_tokens" not in overrides
    params = engine.defaults.with_overrides(overrides)
    limit = limits.max_new_tokens
    if limit is not None and params.max_new_tokens > limit:
        if not is_open:
            raise MessageTooLarge(
                f"max_new_tokens is {params.max_new_tokens} but this server allows {limit}"
            )
        overrides["max_new_tokens"] = limit
    clamp = clamp or is_open
    max_len = engine.info.max_len
    if not clamp and params.max_new_tokens > max_len:
        raise PromptTooLong(1, params.max_new_tokens, max_len, at_least=True)
    most = min(params.max_new_tokens, limit or params.max_new_tokens)
    if clamp:
        most = min(most, max_len)
    prompt = _prompt_of(request)
    if isinstance(engine, PromptReader):
        engine.check_size(prompt)
    charge = most + _size_of(prompt)
    return Measured(prompt, request.raw, overrides, clamp, charge)


class Admission:
    """Counts what runs or waits, and refuses what there is no room for."""

    def __init__(self, limits: ServeLimits) -> None:
        self._limits = limits
        self._rate = RateLimit(limits.requests_per_minute)
        self._taken: dict[str, list[int]] = {}  # by client: what each of its streams may take

    @property
    def num_streams(self) -> int:
        """Streams that run or wait."""
        return sum(map(len, self._taken.values()))

    @property
    def num_tokens(self) -> int:
        """Tokens that they may take."""
        return sum(map(sum, self._taken.values()))

    def admit(self, client: str, charge: int, *, now_s: float) -> None:
        """Take a stream on, until `release`.

        Args:
            client: whose it is.
            charge: tokens that it may take.
            now_s: of any monotonic clock.

        Raises:
            TooManyStreams: names the limit.
            RateLimited: the client has used its requests up.
        """
        limits = self._limits
        if self.num_streams >= limits.max_streams:
            raise TooManyStreams(
                f"{self.num_streams} streams are running or waiting and the limit is "
                f"{limits.max_streams}; try again later"
            )
        own, bound = self._taken.get(client, []), limits.max_streams_per_client
        if bound is not None and len(own) >= bound:
            raise TooManyStreams(
                f"{len(own)} of your streams are running or waiting and the limit is {bound}; "
                "wait for one to end, or cancel it"
            )
        if self.num_tokens + charge > limits.max_running_tokens:
            raise TooManyStreams(
                f"the running streams may take {limits.max_running_tokens} tokens in all; "
                "try again later, or lower max_new_tokens"
            )
        if own and sum(own) + charge > limits.token_share:
            raise TooManyStreams(
                f"your running streams may take {limits.token_share} tokens together; "
                "wait for one to end, or lower max_new_tokens"
            )
        self._rate.take(client, now_s)
        self._taken.setdefault(client, []).append(charge)

    def take_over(self, client: str, charge: int) -> None:
        """Take a stream on that was admitted elsewhere: nothing is refused any more."""
        self._taken.setdefault(client, []).append(charge)

    def release(self, client: str, charge: int) -> None:
        """Count a stream no more: it has ended."""
        own = self._taken[client]
        own.remove(charge)
        if not own:
            del self._taken[client]


def _size_of(prompt: Prompt) -> int:
    """Return about how many tokens a prompt has."""
    if isinstance(prompt, str):
        return len(prompt) // 4
    return sum(1 if isinstance(item, int) else len(item.get("content", "")) // 4 for item in prompt)


def _prompt_of(request: Generate) -> Prompt:
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise InvalidRequest("the prompt mixes token ids and chat messages; send one or the other")
    return prompt  # type: ignore[return-value]  # all ints or all messages, as just checked
