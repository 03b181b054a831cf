"""SelfWritten: conversations that an autoregressive model makes up, prompts and answers both.

A prompt is what the model writes after the empty user header of its chat template, or after the
first words of an ordinary request. Its answer is greedy, as it will be verified. A share of the
conversations gets a second turn. Answers that reach the limit or begin to loop are cut there and
kept: what a draft learns of a text does not depend on how it goes on.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from d2f_export.distill.from_ar.base import MARK
from d2f_export.distill.from_ar.generation import Job, Outcome
from d2f_stream.core.errors import InvalidRequest

__all__ = ["STARTERS", "ChatFrame", "Overlap", "SelfWritten"]

SYSTEM_SHARE: Final = 0.75  # of the conversations that have the template's own system prompt
STARTER_SHARE: Final = 0.5
SECOND_TURN_SHARE: Final = 0.2
TEMPERATURES: Final = (0.8, 1.0)  # of the prompts; at 1 alone many of a small model's make no sense
PROMPT_LIMIT: Final = 200  # tokens
SHORTEST_PROMPT: Final = 3
ROOM: Final = 16  # tokens that what is written needs at least
SHORTEST_CUT: Final = 48  # tokens of an answer that did not end, or that looped from there on
NGRAM: Final = 13  # words

STARTERS: Final = (
    "What is", "What are", "What is the capital of", "Who is", "Who was", "Who are you", "Why is",
    "Why do", "When did", "Where is", "How do I", "How can I", "How does", "How many", "Can you",
    "Could you please", "Please", "Tell me", "Tell me a joke about", "Tell me a story about",
    "Explain", "Explain in simple terms", "Describe", "Write a", "Write an email to",
    "Write a short story about", "Write a poem about", "Write a Python function that",
    "Write a function to", "Write a JavaScript function", "Write a SQL query",
    "Write a Python script that", "Write a program", "Fix this code:", "Summarize",
    "Summarize this:", "Summarize the following text:", "Translate", "Translate to French:",
    "Translate into Spanish:", "Give me", "Give me tips for", "Give me a recipe for", "List",
    "List three", "Name", "Compare", "Is it", "Should I", "I want to", "I need help with", "I am",
    "I have", "My", "Hi", "Hello", "Create", "Make a list of", "Convert", "Calculate", "Solve",
    "If", "Rewrite", "Suggest", "Help me", "Let's", "Define", "In Python,", "Generate",
    "What does", "What's the difference between",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """The chat template around one user turn, as token ids.

    Attributes:
        opening: before the first user's words, the template's own system prompt included.
        bare_opening: the same without a system prompt.
        answer: between a user's words and the answer.
        bridge: between an answer (its end token included) and the next user's words.
        end_id: ends a turn.
    """

    opening: list[int]
    bare_opening: list[int]
    answer: list[int]
    bridge: list[int]
    end_id: int

    @classmethod
    def of(
        cls,
        render: Callable[[list[dict[str, str]]], str],
        encode: Callable[[str], list[int]],
        special_ids: Iterable[int],
        end_id: int,
    ) -> "ChatFrame":
        """Find the pieces by rendering marked conversations.

        Args:
            render: messages to text, with the header of an answer at its end.
            encode: text to ids, special tokens known and none added.
            special_ids: ids of special tokens.
            end_id: ends a turn.
        """
        turns = [{"role": role, "content": MARK} for role in ("user", "assistant", "user")]
        opening, _, between, tail = render(turns).split(MARK)
        head = encode(opening)
        special = set(special_ids)
        last = max(place for place, token in enumerate(head) if token in special)
        bridge = encode(between)
        return cls(head, head[last:], encode(tail), bridge[bridge.index(end_id) + 1 :], end_id)


class Overlap:
    """Finds texts that share NGRAM words in a row with texts that are kept for evaluation."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._known = {gram for text in texts for gram in _grams(text)}

    def __contains__(self, text: str) -> bool:
        return any(gram in self._known for gram in _grams(text))


@dataclass(slots=True)
class _Turn:
    kind: str  # "prompt" or "answer"
    context: list[int]  # before the user's words
    is_first: bool


class SelfWritten:
    """Gives jobs to a Generation and gathers what comes of them.

    Args:
        frame: of the model's chat.
        encode: text to ids.
        decode: ids to text.
        questions: prompts of the user's, answered first.
        starters: first words of the requests that the model goes on with, equally often.
        overlap: what must not be learnt.
        answer_limit: longest answer, tokens.
        length: of a whole conversation, tokens.
        seed: of every choice.

    Raises:
        InvalidRequest: a starter leaves no room for a request.
    """

    def __init__(
        self,
        frame: ChatFrame,
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        *,
        questions: Sequence[str],
        starters: Sequence[str] = STARTERS,
        overlap: Overlap,
        answer_limit: int,
        length: int,
        seed: int,
    ) -> None:
        self._frame, self._decode, self._overlap = frame, decode, overlap
        self._limit, self._length = answer_limit, length
        self._random = np.random.default_rng(seed)
        self._starters = [encode(text) for text in starters]
        opening = max(len(frame.opening), len(frame.bare_opening))
        for text, start in zip(starters, self._starters, strict=True):
            if (room := length - opening - ROOM) < len(start):
                raise InvalidRequest(
                    f"the starter {text[:40]!r} has {len(start)} tokens, but length, {length}, "
                    f"leaves room for {max(0, room)}; raise length, or shorten it"
                )
        self._waiting: deque[Job] = deque()
        self._seen: set[bytes] = set()
        self.examples: list[tuple[list[int], list[int]]] = []
        self.counts: Counter[str] = Counter()
        self.is_open = True
        for question in questions:
            self._answer(frame.opening, encode(question), is_first=False)

    def next_job(self) -> Job | None:
        """Return an answer that waits to be written, else a new prompt."""
        if self._waiting:
            return self._waiting.popleft()
        if not self.is_open:
            return None
        bare = self._random.random() >= SYSTEM_SHARE
        return self._prompt(self._frame.bare_opening if bare else self._frame.opening, True)

    def take(self, outcome: Outcome) -> None:
        """Take what was written."""
        turn: _Turn = outcome.job.tag
        reason = self._refusal(turn, outcome)
        kept = "kept" if outcome.reason == "end" else f"cut at {outcome.reason}"
        self.counts[f"{turn.kind}: {reason or kept}"] += 1
        if reason:
            return
        given = outcome.job.prompt
        if turn.kind == "prompt":
            words = [*given[len(turn.context) :], *outcome.tokens[:-1]]
            self._answer(turn.context, words, is_first=turn.is_first)
            return
        self.examples.append((given, outcome.tokens))
        if outcome.reason != "end":
            return
        room = self._length - len(given) - len(outcome.tokens) - 200
        if turn.is_first and room > 0 and self._random.random() < SECOND_TURN_SHARE:
            context = [*given, *outcome.tokens, *self._frame.bridge]
            self._waiting.append(self._prompt(context, False))

    def _refusal(self, turn: _Turn, outcome: Outcome) -> str | None:
        is_whole = outcome.reason == "end"
        if is_whole and outcome.tokens[-1] != self._frame.end_id:
            return "another end"
        words = outcome.tokens[:-1] if is_whole else outcome.tokens
        if turn.kind == "answer" and not is_whole and len(words) < SHORTEST_CUT:
            return outcome.reason
        if turn.kind == "prompt":
            if not is_whole:
                return outcome.reason
            words = [*outcome.job.prompt[len(turn.context) :], *words]
            if len(words) < SHORTEST_PROMPT:
                return "short"
        if not words:
            return "empty"
        key = hashlib.blake2b(
            np.asarray([*turn.context, *words], np.uint32).tobytes(), digest_size=12
        ).digest()
        if turn.kind == "prompt" and key in self._seen:
            return "seen before"
        self._seen.add(key)
        text = self._decode(words)
        if not text.strip() or "\ufffd" in text:
            return "no text"
        return "overlap with an evaluation set" if text in self._overlap else None

    def _prompt(self, context: list[int], is_first: bool) -> Job:
        start: list[int] = []
        if self._random.random() < STARTER_SHARE:
            start = self._starters[int(self._random.integers(len(self._starters)))]
            if len(context) + len(start) + ROOM > self._length:  # of a second turn
                start = []
        heat = float(self._random.choice(TEMPERATURES))
        return Job([*context, *start], heat, PROMPT_LIMIT, _Turn("prompt", context, is_first))

    def _answer(self, context: list[int], words: list[int], *, is_first: bool) -> None:
        prompt = [*context, *words, *self._frame.answer]
        if len(prompt) + ROOM > self._length:
            self.counts["prompt: too long"] += 1
            return
        limit = min(self._limit, self._length - len(prompt))
        self._waiting.append(Job(prompt, 0.0, limit, _Turn("answer", context, is_first)))


def _grams(text: str) -> set[int]:
    words = text.lower().split()
    return {hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1)}
