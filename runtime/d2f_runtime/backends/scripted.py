"""ScriptedBackend: answers from a script instead of a model. Shipped, so that users can test too.

Keeps every rule of the seam that a real backend relies on and raises where a row breaks one. One
token is one byte (`ByteCodec`), so texts with multi-byte characters meet partial UTF-8 on the way.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Self, get_args

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.step_gate import StepGate
from d2f_runtime.decoding.window import NO_TOKEN, Proposals
from d2f_runtime.models.facts import ModelInfo, PromptAttention
from d2f_runtime.text.files import read_object
from d2f_stream.core.errors import ModelDamaged, ModelNotFound, OutOfCapacity
from d2f_stream.core.params import GenerationParams

__all__ = ["EOS_ID", "MASK_ID", "SCRIPTED_INFO", "ByteCodec", "ScriptedBackend", "StepGate", "load"]

EOS_ID = 256
MASK_ID = 257

SCRIPTED_INFO = ModelInfo(
    name="scripted",
    family="scripted",
    mask_id=MASK_ID,
    eos_ids=(EOS_ID,),
    shift_logits=False,
    prompt_attention="full",
    native_block_size=8,
    max_block_size=64,
    max_len=4096,
    num_tokens=257,
    kv_bytes_per_token=0,
    device="cpu",
    quantization="none",
)

Answers = str | Mapping[str, str] | Callable[[tuple[int, ...]], Sequence[int]]
Confidence = Callable[[int, int], float]


class ByteCodec:
    """One token per byte; 256 is the EOS and 257 the mask, which decode to nothing."""

    special_tokens: Mapping[str, int] = MappingProxyType({})
    longest_token = 1
    chats = False  # so that a script answers the very string that a program asks

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of the text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; broken UTF-8 becomes U+FFFD, as tokenizers do it."""
        return bytes(token for token in ids if token < EOS_ID).decode(errors="replace")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return one line per message, then the beginning of the assistant's."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + "assistant: "


def load(path: Path, *, device: str, quantization: str) -> "ScriptedBackend":
    """Load a scripted model's folder; device and quantization mean nothing to it."""
    del device, quantization
    return ScriptedBackend.load(path)


@dataclass(slots=True)
class _SlotState:
    capacity: int
    num_cached: int = 0
    num_steps: int = 0
    num_prompt: int = 0
    tokens: list[int] = field(default_factory=list)  # what was cached, by position
    answer: tuple[int, ...] | None = None


@dataclass(slots=True, eq=False, repr=False)
class ScriptedBackend:
    """Proposes the tokens of a script; a confidence schedule decides how fast they are accepted.

    Attributes:
        answers: one text for all prompts, a text per prompt or last question of a conversation, or
            a function from prompt ids to answer ids. The EOS follows the answer by itself.
        info: what the backend claims to be.
        tokens_per_step: so many leading masks of the window get confidence 1.0, the others 0.0.
        confidence: (answer position, step of the session) -> confidence; overrides tokens_per_step.
        capacity: tokens that all open slots hold together; None is unlimited.
        gate: holds each step until it is let through.
        step_ms: how long each step takes at least.
        errors: raised instead of running the step of that number, from 0.
        open_slots: those not closed yet: empty after a test that leaks nothing.
        num_opened, num_closed, num_steps, num_warm_ups: counters since the beginning.
        batches: the rows of the latest steps, oldest first.
        threads: names of the threads that called; one, or the engine is wrong.
    """

    answers: Answers = ""
    info: ModelInfo = SCRIPTED_INFO
    tokens_per_step: int = 4
    confidence: Confidence | None = None
    capacity: int | None = None
    gate: StepGate | None = None
    step_ms: float = 0.0
    errors: Mapping[int, BaseException] = field(default_factory=dict)
    open_slots: dict[Slot, _SlotState] = field(default_factory=dict, init=False)
    num_opened: int = field(default=0, init=False)
    num_closed: int = field(default=0, init=False)
    num_steps: int = field(default=0, init=False)
    num_warm_ups: int = field(default=0, init=False)
    closed: bool = field(default=False, init=False)
    batches: deque[tuple[StepRow, ...]] = field(
        default_factory=lambda: deque(maxlen=256), init=False
    )
    threads: set[str] = field(default_factory=set, init=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a folder's script.json: {"answers": text or {prompt: text}, "tokens_per_step": n}.

        "step_ms" may stand there too, and "prompt_attention", which is "full" otherwise.

        Raises:
            ModelNotFound: the folder has no script.json.
            ModelDamaged: it cannot be read.
        """
        script = read_object(path / "script.json")
        if script is None:
            raise ModelNotFound(f"no script.json in {path}; a scripted model needs one")
        answers, tokens_per_step = script.get("answers"), script.get("tokens_per_step", 4)
        step_ms = script.get("step_ms", 0)
        attention = script.get("prompt_attention", "full")
        numbers = isinstance(tokens_per_step, int) and isinstance(step_ms, int | float)
        is_known = attention in get_args(PromptAttention)
        if not isinstance(answers, str | dict) or not numbers or not is_known:
            raise ModelDamaged(f"{path / 'script.json'} lacks answers, or has some of no use")
        info = replace(SCRIPTED_INFO, name=path.name, prompt_attention=attention)
        return cls(answers, info=info, tokens_per_step=tokens_per_step, step_ms=step_ms)

    def check(self, params: GenerationParams) -> None:
        """Accept all settings: the script does not depend on them."""

    def warm_up(self) -> None:
        """Do nothing but note the call."""
        self._note_call()
        self.num_warm_ups += 1

    def open_slot(self, capacity: int) -> Slot:
        """Open a slot; the script needs no storage, only the count."""
        self._note_call()
        used = sum(state.capacity for state in self.open_slots.values())
        if self.capacity is not None and used + capacity > self.capacity:
            free = self.capacity - used
            raise OutOfCapacity(
                f"a slot of {capacity} tokens was asked for, but {free} of {self.capacity} are free"
            )
        slot = Slot(self.num_opened)
        self.num_opened += 1
        self.open_slots[slot] = _SlotState(capacity)
        return slot

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        """Answer from the script.

        Raises:
            ValueError: a row breaks a rule of the seam.
        """
        self._note_call()
        number = self.num_steps
        self.num_steps += 1
        self.batches.append(tuple(rows))
        if self.gate is not None:
            self.gate.pass_through()
        if self.step_ms:
            time.sleep(self.step_ms / 1000)
        if number in self.errors:
            raise self.errors[number]
        if len({row.slot for row in rows}) < len(rows):
            raise ValueError("two rows of a step have the same slot")
        proposals = [self._propose(row) for row in rows]
        for row in rows:
            state, window = self.open_slots[row.slot], row.window
            state.num_steps += bool(window.asked(self.info.mask_id))
            state.num_cached = window.start + window.num_to_cache
            state.tokens[window.start :] = window.tokens[: window.num_to_cache]
        return proposals

    def copy_prefix(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """Let a slot hold what another one does for its first tokens."""
        self._note_call()
        old, new = self.open_slots[source], self.open_slots[target]
        if new.num_steps or not 0 < num_tokens <= min(old.num_cached, new.capacity):
            raise ValueError(f"{num_tokens} tokens of {old.num_cached} into {new.capacity}")
        new.num_cached, new.tokens = num_tokens, old.tokens[:num_tokens]

    def close_slot(self, slot: Slot) -> None:
        """Forget the slot."""
        self._note_call()
        if self.open_slots.pop(slot, None) is not None:
            self.num_closed += 1

    def close(self) -> None:
        """Note that the backend was closed."""
        self._note_call()
        self.closed = True

    def _propose(self, row: StepRow) -> Proposals:
        state, window = self.open_slots[row.slot], row.window
        self._check(state, row)
        asked = window.asked(self.info.mask_id)
        if not asked:  # a piece of a prompt
            return Proposals([NO_TOKEN] * window.num_entries, [0.0] * window.num_entries)
        if state.answer is None:
            self._read_prompt(state, row)
        answer = state.answer
        assert answer is not None
        tokens = [NO_TOKEN] * window.num_entries
        confidence = [0.0] * window.num_entries
        behind = [position + 1 for position in window.branch_positions()]
        positions = [*range(window.start, window.stop), *behind]
        canvas = (*window.tokens, *[self.info.mask_id] * window.num_branch_masks)
        set_already = [at for at in asked if canvas[at] != self.info.mask_id]
        in_order = set_already + [at for at in asked if canvas[at] == self.info.mask_id]
        for index, at in enumerate(in_order, -len(set_already)):
            position = positions[at] - state.num_prompt
            tokens[at] = answer[position] if position < len(answer) else self.info.eos_ids[0]
            if self.confidence is not None:
                confidence[at] = self.confidence(position, state.num_steps)
            else:
                confidence[at] = 1.0 if index < self.tokens_per_step else 0.0
        return Proposals(tokens, confidence, None if row.rank == "confidence" else confidence)

    def _read_prompt(self, state: _SlotState, row: StepRow) -> None:
        # Where the first window's masks begin, the prompt ends, unless the row knows that some of
        # the answer stands between; a copied prefix stands before it.
        window = row.window
        masks = (i for i, token in enumerate(window.tokens) if token == self.info.mask_id)
        rest = window.tokens[: next(masks, len(window.tokens))]
        prompt = (*state.tokens[: window.start], *rest)[: row.num_prompt]
        state.num_prompt = len(prompt)
        if callable(self.answers):
            state.answer = tuple(self.answers(prompt))
        elif isinstance(self.answers, str):
            state.answer = tuple(self.answers.encode())
        else:
            state.answer = tuple(_answer_to(ByteCodec().decode(prompt), self.answers).encode())

    def _check(self, state: _SlotState, row: StepRow) -> None:
        window, mask_id = row.window, self.info.mask_id
        stops = window.block_stops
        edges = {window.start, *stops}
        if window.start > state.num_cached:
            raise ValueError(f"window starts at {window.start} but {state.num_cached} are cached")
        if window.stop > state.capacity:
            raise ValueError(f"window ends at {window.stop}, slot holds {state.capacity}")
        if list(stops) != sorted(edges - {window.start}) or stops[-1] != window.stop:
            raise ValueError(
                f"block_stops {stops} do not rise from {window.start} to {window.stop}"
            )
        if window.start + window.num_to_cache not in edges:
            raise ValueError(f"num_to_cache {window.num_to_cache} is not on an edge of {stops}")
        if mask_id in window.tokens[: window.num_to_cache]:
            raise ValueError("a mask is about to be cached")
        if (row.uniforms is None) != (row.temperature == 0.0):
            raise ValueError("uniforms are for a temperature above 0")
        if row.uniforms is not None and len(row.uniforms) != window.num_entries:
            raise ValueError(f"{len(row.uniforms)} uniforms for {window.num_entries} entries")
        for branch in window.branches:
            if not window.start < branch.start < window.start + window.num_to_cache:
                raise ValueError(f"{branch} follows no filled position of the window")

    def _note_call(self) -> None:
        self.threads.add(threading.current_thread().name)


def _answer_to(prompt: str, answers: Mapping[str, str]) -> str:
    """Return a prompt's text, or that of a conversation's last question; a sentence for neither."""
    question = prompt.removesuffix("\nassistant: ").rpartition("user: ")[2]
    unknown = f"The script has no answer to {question!r}."  # an error would end all sessions
    return answers.get(prompt, answers.get(question, unknown))
