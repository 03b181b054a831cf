"""What every backend must do, whatever it is made of: one suite for all of them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend, Slot, StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import OutOfCapacity
from tiny_models import CONFIGS, MASK, MIXTURES, NUM_TOKENS, recompute, tiny_folder

pytestmark = pytest.mark.torch

# fp32 sums in another order: rounding of logits of about 30 reaches confidences as 1e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rig:
    """A backend under test and the model that it must agree with."""

    backend: Backend
    model: Transformer

    @property
    def shifted(self) -> bool:
        return self.model.config.shift_logits


@pytest.fixture(scope="module", params=[*CONFIGS, *MIXTURES])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = [
    "torch",
    "onnx",
    "fast-references",  # the fast step's code over the kernels' plain references
    pytest.param("fast", marks=NEEDS_CUDA),
    pytest.param("fast-uncaptured", marks=NEEDS_CUDA),
]


@pytest.fixture(scope="module", params=KINDS)
def rig(request: pytest.FixtureRequest, family: str) -> Iterator[Rig]:
    model = load_checkpoint(tiny_folder(family, "torch"))
    backend: Backend
    if request.param.startswith("fast"):
        backend = TorchBackend(
            model,
            name="fast",
            device="cpu" if request.param == "fast-references" else "cuda",
            runner="fast",
            graphs="lazy" if request.param == "fast" else "off",
        )
    else:
        folder = tiny_folder(family, "torch" if request.param == "torch" else "fp32")
        backend = open_backend(request.param, folder, device="cpu", quantization="auto")
    yield Rig(backend, model)
    backend.close()


@dataclass(frozen=True)
class Canvas:
    """Tokens, the edges of the attention blocks, and where the masks begin."""

    tokens: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def first_mask(self) -> int:
        return self.tokens.index(MASK) if MASK in self.tokens else len(self.tokens)

    def window(self, start: int, num_to_cache: int = 0, stop: int | None = None) -> Window:
        stop = len(self.tokens) if stop is None else stop
        return Window(
            start=start,
            tokens=self.tokens[start:stop],
            num_to_cache=num_to_cache,
            block_stops=tuple(s for s in self.stops if start < s <= stop),
        )

    def cached(self, start: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.tokens[:start], tuple(stop for stop in self.stops if stop <= start)


def canvas(seed: int, *, sizes: Sequence[int] = (11, 4, 4, 4), num_filled: int = 2) -> Canvas:
    """Blocks of the given sizes: the first `num_filled` are filled, the others hold masks."""
    rng = random.Random(seed)
    tokens: list[int] = []
    for index, size in enumerate(sizes):
        ids = [rng.randrange(4, NUM_TOKENS) for _ in range(size)]
        if index >= num_filled:
            ids = [MASK if rng.random() < 0.7 else token for token in ids]
            ids[rng.randrange(size)] = MASK
        tokens += ids
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return Canvas(tuple(tokens), tuple(stops))


def cache_up_to(backend: Backend, slot: Slot, case: Canvas, edges: Sequence[int]) -> None:
    """Cache the canvas piece by piece; the windows end with the piece."""
    for start, stop in pairwise((0, *edges)):
        backend.step([StepRow(slot, case.window(start, stop - start, stop))])


def expected(rig: Rig, case: Canvas, window: Window) -> Proposals:
    return recompute(rig.model, window, *case.cached(window.start))


def assert_same(found: Proposals, wanted: Proposals) -> None:
    assert list(found.tokens) == list(wanted.tokens)
    assert list(found.confidence) == pytest.approx(list(wanted.confidence), abs=TOLERANCE)


def run(rig: Rig, case: Canvas, edges: Sequence[int], num_to_cache: int = 0) -> Proposals:
    """Cache at the edges in turn, then answer the rest of the canvas, in a slot of its own."""
    slot = rig.backend.open_slot(len(case.tokens))
    cache_up_to(rig.backend, slot, case, edges)
    window = case.window(edges[-1] if edges else 0, num_to_cache)
    (found,) = rig.backend.step([StepRow(slot, window)])
    rig.backend.close_slot(slot)
    return found


@pytest.mark.parametrize("edges", [(), (11,), (15,), (11, 15)])
def test_cached_steps_equal_a_recompute(rig: Rig, edges: tuple[int, ...]) -> None:
    case = canvas(1)
    window = case.window(edges[-1] if edges else 0)
    assert_same(run(rig, case, edges), expected(rig, case, window))


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(
    seed=st.integers(0, 10_000),
    filled=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    masked=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_partition_equals_a_recompute(
    rig: Rig, seed: int, filled: list[int], masked: list[int], data: st.DataObject
) -> None:
    case = canvas(seed, sizes=filled + masked, num_filled=len(filled))
    edges = sorted(data.draw(st.sets(st.sampled_from(case.stops[: len(filled)]))))
    start = edges[-1] if edges else 0
    later = [s - start for s in case.stops[: len(filled)] if s > start]
    num_to_cache = data.draw(st.sampled_from([0, *later]))
    found = run(rig, case, edges, num_to_cache)
    assert_same(found, expected(rig, case, case.window(start)))


def test_proposals_are_at_masks_and_never_forbidden(rig: Rig) -> None:
    case = canvas(2, sizes=(9, 16, 16), num_filled=1)
    found = run(rig, case, (9,))
    for token, proposed, confidence in zip(
        case.tokens[9:], found.tokens, found.confidence, strict=True
    ):
        if token == MASK:
            assert 0 <= proposed < NUM_TOKENS
            assert proposed != MASK
            assert 0.0 < confidence <= 1.0
        else:
            assert (proposed, confidence) == (NO_TOKEN, 0.0)
    assert found.rank is None


@pytest.mark.parametrize("rank", ["margin", "neg_entropy"])
def test_ranks_come_where_they_are_asked_for(rig: Rig, rank: str) -> None:
    case = canvas(3)
    slots = [rig.backend.open_slot(len(case.tokens)) for _ in range(2)]
    rows = [StepRow(slot, case.window(0)) for slot in slots]
    rows[0] = replace(rows[0], rank="margin" if rank == "margin" else "neg_entropy")
    with_rank, without = rig.backend.step(rows)
    for slot in slots:
        rig.backend.close_slot(slot)
    assert without.rank is None
    assert with_rank.rank is not None
    assert with_rank.confidence == pytest.approx(without.confidence, abs=TOLERANCE)
    at_masks = [r for t, r in zip(case.tokens, with_rank.rank, strict=True) if t == MASK]
    assert all(0 < r <= 1 for r in at_masks) if rank == "margin" else all(r < 0 for r in at_masks)


def test_sampling_follows_the_uniform_numbers(rig: Rig) -> None:
    case = canvas(4, sizes=(10, 16, 16), num_filled=1)
    rng = random.Random(4)
    uniforms = [rng.random() for _ in range(32)]
    slot = rig.backend.open_slot(64)
    cache_up_to(rig.backend, slot, case, (10,))
    window = case.window(10)
    row = StepRow(slot, window, temperature=0.8, uniforms=uniforms)
    (found,) = rig.backend.step([row])
    rig.backend.close_slot(slot)
    wanted = recompute(rig.model, window, *case.cached(10), temperature=0.8, uniforms=uniforms)
    assert_same(found, wanted)
    greedy = recompute(rig.model, window, *case.cached(10))
    assert list(found.tokens) != list(greedy.tokens)


def test_copied_prefix_serves_as_if_it_had_been_computed(rig: Rig) -> None:
    case = canvas(6)
    source, target = rig.backend.open_slot(64), rig.backend.open_slot(len(case.tokens))
    cache_up_to(rig.backend, source, case, case.stops[:2])
    rig.backend.copy_prefix(source, target, case.stops[0])
    rig.backend.close_slot(source)  # and what is computed next may lie where it lay
    other = rig.backend.open_slot(64)
    cache_up_to(rig.backend, other, canvas(7), (11,))
    window = case.window(case.stops[0])
    (found,) = rig.backend.step([StepRow(target, window)])
    for slot in (target, other):
        rig.backend.close_slot(slot)
    wanted = expected(rig, case, window)
    first = 1 if rig.shifted and case.tokens[window.start] == MASK else 0
    assert_same(
        Proposals(found.tokens[first:], found.confidence[first:]),
        Proposals(wanted.tokens[first:], wanted.confidence[first:]),
    )


def test_rows_of_a_step_do_not_touch_each_other(rig: Rig) -> None:
    cases = [canvas(seed, sizes=(5 + 3 * seed, 4, 3 + seed)) for seed in range(5)]
    slots = [rig.backend.open_slot(64) for _ in cases]
    starts = [case.stops[0] for case in cases]
    rig.backend.step(
        [StepRow(s, c.window(0, n, n)) for s, c, n in zip(slots, cases, starts, strict=True)]
    )
    # Some cache another block in the same step in which others only look, in another order.
    order = [3, 0, 4, 1, 2]
    rows = []
    for index in order:
        start = starts[index]
        num_to_cache = cases[index].stops[1] - start if index % 2 else 0
        rows.append(StepRow(slots[index], cases[index].window(start, num_to_cache)))
    for index, found in zip(order, rig.backend.step(rows), strict=True):
        case = cases[index]
        assert_same(found, expected(rig, case, case.window(starts[index])))
    for slot, case, index in zip(slots, cases, range(5), strict=True):
        start = case.stops[1] if index % 2 else starts[index]
        (found,) = rig.backend.step([StepRow(slot, case.window(start))])
        assert_same(found, expected(rig, case, case.window(start)))
        rig.backend.close_slot(slot)


def test_greedy_and_sampled_rows_share_a_step(rig: Rig) -> None:
    case = canvas(5)
    uniforms = [0.37] * len(case.tokens)
    slots = [rig.backend.open_slot(64), rig.backend.open_slot(64)]
    found = rig.backend.step(
        [
            StepRow(slots[0], case.window(0)),
            StepRow(slots[1], case.window(0), temperature=1.3, uniforms=uniforms),
        ]
    )
    assert_same(found[0], expected(rig, case, case.window(0)))
    wanted = recompute(rig.model, case.window(0), (), (), temperature=1.3, uniforms=uniforms)
    assert_same(found[1], wanted)
    for slot in slots:
        rig.backend.close_slot(slot)


def test_a_slot_starts_over_after_preemption(rig: Rig) -> None:
    case = canvas(8)
    slot = rig.backend.open_slot(64)
    cache_up_to(rig.backend, slot, canvas(9), (11, 15))
    cache_up_to(rig.backend, slot, case, (11,))
    (found,) = rig.backend.step([StepRow(slot, case.window(11))])
    assert_same(found, expected(rig, case, case.window(11)))
    rig.backend.close_slot(slot)


def test_a_trailing_lone_mask_is_predicted_without_being_seen(rig: Rig) -> None:
    tokens = tuple(random.Random(10).randrange(4, NUM_TOKENS) for _ in range(6))
    case = Canvas((*tokens, MASK), tuple(range(1, 8)))
    assert_same(run(rig, case, ()), expected(rig, case, case.window(0)))
    assert_same(run(rig, case, (5,)), expected(rig, case, case.window(5)))
    # ... also where nothing else is left to run, alone and beside other rows
    assert_same(run(rig, case, (6,)), expected(rig, case, case.window(6)))
    slots = [rig.backend.open_slot(16) for _ in range(2)]
    rows = []
    for slot, start in zip(slots, (6, 2), strict=True):
        cache_up_to(rig.backend, slot, case, (start,))
        rows.append(StepRow(slot, case.window(start)))
    for row, found in zip(rows, rig.backend.step(rows), strict=True):
        assert_same(found, expected(rig, case, row.window))
        rig.backend.close_slot(row.slot)


def test_no_rows_no_answers(rig: Rig) -> None:
    assert rig.backend.step([]) == []


def test_a_window_without_masks_proposes_nothing(rig: Rig) -> None:
    case = canvas(11, sizes=(5, 4), num_filled=2)
    found = run(rig, case, (5,), 4)
    assert found == Proposals([NO_TOKEN] * 4, [0.0] * 4)


def test_slots_run_out_and_come_back(rig: Rig) -> None:
    size = (1 << 30) // rig.backend.info.kv_bytes_per_token // 2  # of 1 GiB, the default
    slots = [rig.backend.open_slot(size) for _ in range(2)]
    with pytest.raises(OutOfCapacity, match=f"no room for the K/V of {size} tokens: 0 of "):
        rig.backend.open_slot(size)
    rig.backend.close_slot(slots[0])
    rig.backend.close_slot(slots[0])  # idempotent: its room is not counted twice
    slots[0] = rig.backend.open_slot(size)
    with pytest.raises(OutOfCapacity):
        rig.backend.open_slot(size)
    for slot in slots:
        rig.backend.close_slot(slot)


def test_a_window_that_the_slot_does_not_hold_is_refused(rig: Rig) -> None:
    case = canvas(12)
    slot = rig.backend.open_slot(22)
    with pytest.raises(ValueError, match="window ends at 23 but the slot has room for 22 tokens"):
        rig.backend.step([StepRow(slot, case.window(0, 11))])
    rig.backend.close_slot(slot)


def test_a_window_that_leaves_a_gap_is_refused(rig: Rig) -> None:
    slot = rig.backend.open_slot(64)
    with pytest.raises(ValueError, match="window starts at 11 but the slot holds 0 tokens"):
        rig.backend.step([StepRow(slot, canvas(13).window(11))])
    rig.backend.close_slot(slot)


def test_two_rows_of_a_slot_are_refused(rig: Rig) -> None:
    slot = rig.backend.open_slot(64)
    row = StepRow(slot, canvas(13).window(0))
    with pytest.raises(ValueError, match="two rows of a step have the same slot"):
        rig.backend.step([row, row])
    rig.backend.close_slot(slot)


def test_sampling_without_uniform_numbers_is_refused(rig: Rig) -> None:
    slot = rig.backend.open_slot(64)
    with pytest.raises(ValueError, match="one uniform number per entry"):
        rig.backend.step([StepRow(slot, canvas(14).window(0), temperature=0.5)])
    rig.backend.close_slot(slot)


def test_info_names_the_model(rig: Rig, family: str) -> None:
    config, info = (CONFIGS | MIXTURES)[family], rig.backend.info
    assert (info.family, info.mask_id, info.eos_ids) == (config.family, MASK, (1, 2))
    assert info.num_tokens == NUM_TOKENS
    assert info.prompt_attention == config.prompt_attention
    per_layer = 2 * config.num_kv_heads * config.head_dim * 4
    assert info.kv_bytes_per_token == config.num_layers * per_layer
    assert info.device in ("cpu", "cuda")
    assert info.quantization == "fp32"


def test_closing_twice_is_fine(family: str) -> None:
    for name, kind in (("torch", "torch"), ("onnx", "fp32")):
        folder = tiny_folder(family, "torch" if kind == "torch" else "fp32")
        backend = open_backend(name, folder, device="cpu", quantization="auto")
        slot = backend.open_slot(8)
        backend.close()
        backend.close()
        backend.close_slot(slot)


def test_the_torch_pool_is_bounded_by_tokens(family: str) -> None:
    backend = TorchBackend(
        load_checkpoint(tiny_folder(family, "torch")), name="small", max_tokens=100
    )
    first, second = backend.open_slot(60), backend.open_slot(40)
    with pytest.raises(OutOfCapacity, match="0 of 100 are free and 2 of 1024 slots open"):
        backend.open_slot(1)
    backend.close_slot(first)
    backend.close_slot(second)
    backend.open_slot(100)
