"""Random decoding cases and a run that checks every invariant of the decoder at every step."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from d2f_runtime.decoding.decoder import Accepted, BlockDecoder, Committed, Edited
from d2f_runtime.decoding.policy import AcceptancePolicy
from d2f_runtime.decoding.width import Width
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_stream.core.params import GenerationParams, Tail
from reference_loop import MASK, RefSettings

Attention = Literal["full", "causal", "grid", "prompt_grid"]

LEVELS = 16  # confidences and thresholds share a coarse scale, so that ties and equality happen


@dataclass(frozen=True)
class HashModel:
    """Proposals as a fixed function of what a position may see (or of position and step)."""

    seed: int
    eos_ids: tuple[int, ...]
    eos_share: float  # of the proposals
    skew: int  # 0: uniform confidence; positive: mostly high; negative: mostly low
    by_step: bool

    def __call__(
        self, visible: tuple[int, ...], position: int, step: int
    ) -> tuple[int, float, float]:
        state = (self.seed, position, step) if self.by_step else (self.seed, position, visible)
        bits = (hash(state) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        confidence = (bits >> 8) % (LEVELS + 1)
        other = (bits >> 16) % (LEVELS + 1)
        for _ in range(abs(self.skew)):
            confidence = max(confidence, other) if self.skew > 0 else min(confidence, other)
            other = (other * 7 + 3) % (LEVELS + 1)
        is_eos = (bits >> 24) % 1000 < self.eos_share * 1000
        token = self.eos_ids[bits % len(self.eos_ids)] if is_eos else 10 + (bits >> 40) % 5
        return token, confidence / LEVELS, -((bits >> 50) % 4) / 4


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    params: GenerationParams
    model: HashModel
    eos_ids: tuple[int, ...]
    prompt_attention: Attention
    shifted: bool = False

    @property
    def block_size(self) -> int:
        return self.params.block_size

    @property
    def origin(self) -> int:
        num_prompt = len(self.prompt)
        return num_prompt - (num_prompt % self.block_size if self.prompt_attention == "grid" else 0)

    def with_params(self, **changes: object) -> "Case":
        return replace(self, params=self.params.with_overrides(changes))  # type: ignore[arg-type]

    def decoder(self, *, policy: AcceptancePolicy | None = None) -> BlockDecoder:
        return BlockDecoder(
            prompt_tokens=self.prompt,
            params=self.params,
            mask_id=MASK,
            eos_ids=self.eos_ids,
            shift_logits=self.shifted,
            prompt_attention=self.prompt_attention,
            native_block_size=self.block_size,
            policy=policy,
        )

    def settings(self) -> RefSettings:
        return RefSettings(
            block_size=self.block_size,
            max_new_tokens=self.params.max_new_tokens,
            block_add_threshold=self.params.add_threshold,
            decoded_token_threshold=self.params.activate_threshold,
            skip_threshold=self.params.confidence_threshold,
            eos_ids=self.eos_ids,
            max_active_blocks=self.params.max_active_blocks,
            cut_tail=self.params.tail == "cut",
            grid=self.prompt_attention == "grid",
            sub_block_size=self.params.sub_block_size,
            shifted=self.shifted,
        )


def random_case(rnd: random.Random) -> Case:
    block_size = rnd.randint(1, 9)
    prompt_attention: Attention = rnd.choice(("full", "full", "causal", "grid", "prompt_grid"))
    num_prompt = rnd.randint(1, 12)
    tail: Tail = rnd.choice(("cut", "drop"))
    params = GenerationParams(
        max_new_tokens=rnd.randint(block_size if tail == "drop" else 1, 60),
        block_size=block_size,
        add_threshold=rnd.choice((1, 1, rnd.randint(1, LEVELS))) / LEVELS,
        activate_threshold=rnd.randint(1, LEVELS) / LEVELS,
        confidence_threshold=rnd.choice((13, 14, 15, rnd.randint(1, LEVELS))) / LEVELS,
        max_active_blocks=rnd.choice((None, None, 1, 2, 3, 4)),
        rank=rnd.choice(("confidence", "margin", "neg_entropy")),
        stop_at_eos=rnd.choice(("truncate", "drain")),
        tail=tail,
    )
    eos_ids = rnd.choice(((1,), (1, 2)))
    model = HashModel(
        seed=rnd.randint(0, 2**32),
        eos_ids=eos_ids,
        eos_share=rnd.choice((0.0, 0.0, 0.01, 0.03, 0.2)),
        skew=rnd.randint(-2, 2),
        by_step=rnd.choice((False, True)),
    )
    prompt = tuple(rnd.choice((1, 10, 11)) for _ in range(num_prompt))
    sub_block_size, shifted = rnd.choice((0, 0, 1, 2, 3, 8)), rnd.choice((False, True))
    params = params.with_overrides({"sub_block_size": sub_block_size})
    return Case(prompt, params, model, eos_ids, prompt_attention, shifted)


def propose(case: Case, cache: Sequence[int], window: Window, step: int) -> Proposals:
    """Answer like a backend: K/V before the window, masks by `visible_until`."""
    canvas = (*cache, *window.tokens)
    tokens, confidence, rank = [], [], []
    for row, (token, stop) in enumerate(zip(window.tokens, window.visible_until(), strict=True)):
        proposal = (NO_TOKEN, 0.0, 0.0)
        if token == MASK:
            proposal = case.model(canvas[:stop], window.start + row, step)
        tokens.append(proposal[0])
        confidence.append(proposal[1])
        rank.append(proposal[2])
    return Proposals(tokens, confidence, None if case.params.rank == "confidence" else rank)


@dataclass
class Run:
    """What a checked run saw."""

    windows: list[Window] = field(default_factory=list)
    accepted: list[list[Accepted]] = field(default_factory=list)  # by step
    commits: list[Committed] = field(default_factory=list)

    @property
    def text(self) -> tuple[int, ...]:
        return tuple(token for commit in self.commits for token in commit.tokens)


def checked_run(
    case: Case,
    *,
    decoder: BlockDecoder | None = None,
    bound: Callable[[int], int | None] = lambda _: None,
) -> Run:
    """Decode to the end and check the invariants at every step; `bound` narrows its windows."""
    decoder = decoder or case.decoder()
    cache: list[int] = []
    run = Run()
    while True:
        step = decoder.num_steps + 1
        is_finished = decoder.finished
        window = decoder.next_window(Width(max_active_blocks=bound(step)))
        assert decoder.next_window() is window
        assert is_finished == (window is None) == (decoder.finish_reason is not None)
        if window is None:
            break
        check_window(case, cache, window)
        before = decoder.answer_tokens
        events = decoder.apply(propose(case, cache, window, step))
        cache += window.tokens[: window.num_to_cache]
        assert decoder.num_cached == len(cache)
        assert decoder.num_steps == step
        run.windows.append(window)
        check_events(case, decoder, before, events, run)
        check_views(case, decoder, run)
    check_end(case, decoder, run)
    return run


def edges(case: Case, stop: int) -> list[int]:
    """Attention block edges up to stop, from the definitions."""
    num_prompt, size = len(case.prompt), case.block_size
    match case.prompt_attention:
        case "full":
            prompt_edges = {0, num_prompt}
        case "causal":
            prompt_edges = set(range(num_prompt + 1))
        case "grid":
            prompt_edges = set(range(0, num_prompt + 1, size))
        case "prompt_grid":
            prompt_edges = {0, *range(num_prompt, 0, -size)}
    answer_edges = set(range(case.origin, stop, size)) | {stop}
    return sorted(prompt_edges | answer_edges)


def check_window(case: Case, cache: list[int], window: Window) -> None:
    known = edges(case, window.stop)
    assert window.start == len(cache)
    assert window.start in known
    assert window.block_stops == tuple(edge for edge in known if edge > window.start)
    assert MASK not in cache
    final = window.tokens[: window.num_to_cache]
    assert MASK not in final
    cache_stop = window.start + window.num_to_cache
    assert cache_stop in known
    assert cache_stop >= case.origin, "the prompt's blocks are cached by the first step"
    first_open = min(edge for edge in known if edge > cache_stop)
    assert MASK in window.tokens[window.num_to_cache : first_open - window.start]
    assert window.stop <= len(case.prompt) + case.params.max_new_tokens
    size, bound = case.block_size, case.params.max_active_blocks
    answer = (*cache, *window.tokens)[case.origin :]
    unfilled = sum(MASK in answer[at : at + size] for at in range(0, len(answer), size))
    assert bound is None or unfilled <= bound


def check_events(
    case: Case,
    decoder: BlockDecoder,
    before: tuple[int, ...],
    events: Sequence[Accepted | Edited | Committed],
    run: Run,
) -> None:
    accepted = [event for event in events if isinstance(event, Accepted)]
    commits = [event for event in events if isinstance(event, Committed)]
    assert list(events) == [*accepted, *commits]
    assert accepted, "every step makes progress"
    after = list(before)
    for event in accepted:
        assert after[event.position] == MASK
        after[event.position] = event.token
    assert [event.position for event in accepted] == sorted(event.position for event in accepted)
    answer = decoder.answer_tokens
    assert answer == tuple(after[: len(answer)])
    if case.params.stop_at_eos == "drain":
        assert len(answer) == len(after)
    for commit in commits:
        last = run.commits[-1] if run.commits else Committed(-1, 0, 0, ())
        assert (commit.index, commit.start) == (last.index + 1, last.stop)
        assert commit.stop - commit.start == len(commit.tokens) > 0
        assert MASK not in commit.tokens
        assert not set(case.eos_ids).intersection(run.text, commit.tokens[:-1])
        assert not set(case.eos_ids).intersection(run.text)
        run.commits.append(commit)
    assert answer[: len(run.text)] == run.text, "committed tokens never change"
    assert decoder.num_useful_tokens == len(run.text) == num_final(case, answer)
    if case.params.stop_at_eos == "truncate":
        assert decoder.finished == (ends_with_eos(case, run.text) or len(run.text) == limit(case))
    run.accepted.append(accepted)


def num_final(case: Case, answer: tuple[int, ...]) -> int:
    """How much of the answer is committed, from the definition."""
    num_filled = (*answer, MASK).index(MASK)
    eos = [at for at in range(num_filled) if answer[at] in case.eos_ids]
    if eos:
        return eos[0] + 1
    stops = range(case.origin + case.block_size - len(case.prompt), num_filled + 1, case.block_size)
    return num_filled if num_filled == limit(case) else max(stops, default=0)


def limit(case: Case) -> int:
    """How long the answer may become."""
    length = case.params.max_new_tokens
    if case.params.tail == "drop":
        length -= (len(case.prompt) + length - case.origin) % case.block_size
    return length


def ends_with_eos(case: Case, text: tuple[int, ...]) -> bool:
    return text != () and text[-1] in case.eos_ids


def check_views(case: Case, decoder: BlockDecoder, run: Run) -> None:
    views = decoder.active_blocks
    if not decoder.finished and not set(case.eos_ids).intersection(run.text):
        shown = run.text + tuple(token for view in views for token in view.tokens)
        assert shown == decoder.answer_tokens
        stops = [run.commits[-1].stop if run.commits else 0, *(view.stop for view in views)]
        assert [view.start for view in views] == stops[:-1]
        first = run.commits[-1].index + 1 if run.commits else 0
        assert [view.index for view in views] == list(range(first, first + len(views)))


def check_end(case: Case, decoder: BlockDecoder, run: Run) -> None:
    assert decoder.num_steps <= case.params.max_new_tokens
    ended_by_eos = ends_with_eos(case, run.text)
    assert decoder.finish_reason == ("eos" if ended_by_eos else "length")
    assert ended_by_eos or len(run.text) == limit(case)
    if case.params.stop_at_eos == "drain":
        assert MASK not in decoder.answer_tokens
