"""The fast step decodes what the plain step decodes: whole answers, step by step."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from triton_mode import CAN_RUN, DEVICE  # isort: skip  # before the kernels

from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.backends.buckets import CROWD, Bucket
from d2f_runtime.backends.fast_runner import FastRunner
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.kernels.language import HAS_TRITON
from d2f_runtime.models.fast_transformer import KERNELS, REFERENCES, FastTransformer
from d2f_stream.core.errors import UnsupportedModel
from d2f_stream.core.params import GenerationParams
from tiny_models import CONFIGS, MASK, tiny_model

pytestmark = pytest.mark.torch

NEEDS_CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
PROMPT = [10 + (7 * i) % 100 for i in range(11)]


def backend(
    family: str,
    runner: str,
    *,
    device: str = "cpu",
    graphs: str = "lazy",
    max_tokens: int = 256,
) -> TorchBackend:
    return TorchBackend(
        tiny_model(CONFIGS[family]),
        name=runner,
        device=device,
        runner="fast" if runner == "fast" else "plain",
        graphs="lazy" if graphs == "lazy" else "off",
        max_tokens=max_tokens,
    )


def trace(
    backend: Backend,
    *,
    prompt: Sequence[int] = PROMPT,
    temperature: float = 0.0,
    steps: int = 60,
) -> list[Proposals]:
    """Decode an answer; return the proposals of every step."""
    info = backend.info
    decoder = BlockDecoder(
        prompt_tokens=prompt,
        params=GenerationParams(
            max_new_tokens=24, block_size=min(8, info.max_block_size), confidence_threshold=0.5
        ),
        mask_id=info.mask_id,
        eos_ids=info.eos_ids,
        shift_logits=info.shift_logits,
        prompt_attention=info.prompt_attention,
        native_block_size=info.native_block_size,
    )
    slot = backend.open_slot(64)
    found: list[Proposals] = []
    while (window := decoder.next_window()) and len(found) < steps:
        width = len(window.tokens)
        uniforms = [(i * 0.37 + len(found) * 0.11) % 1 for i in range(width)]
        row = StepRow(slot, window, temperature=temperature, uniforms=uniforms)
        found += backend.step([row])
        decoder.apply(found[-1])
    backend.close_slot(slot)
    return found


def assert_equal(found: Sequence[Proposals], wanted: Sequence[Proposals]) -> None:
    assert [list(p.tokens) for p in found] == [list(p.tokens) for p in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert list(a.confidence) == pytest.approx(list(b.confidence), abs=1e-4)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_answers_equal_those_of_the_plain_step(family: str) -> None:
    wanted = trace(backend(family, "plain"))
    assert_equal(trace(backend(family, "fast")), wanted)


def test_sampled_answers_equal_those_of_the_plain_step() -> None:
    wanted = trace(backend("dream", "plain"), temperature=0.9)
    assert_equal(trace(backend("dream", "fast"), temperature=0.9), wanted)


@pytest.mark.skipif(
    not HAS_TRITON or not CAN_RUN or DEVICE == "cuda", reason="for Triton's interpreter"
)
def test_interpreted_kernels_decode_the_same() -> None:
    fast = backend("dream", "fast")
    assert isinstance(fast._runner, FastRunner)
    fast._runner._model.ops = KERNELS
    found, wanted = (
        trace(each, prompt=PROMPT[:5], steps=2)  # one bucket of 16 rows: the prompt's, and over it
        for each in (fast, backend("dream", "plain"))
    )
    assert_equal(found, wanted)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_graphs_change_nothing(family: str, temperature: float) -> None:
    wanted = trace(backend(family, "plain"), temperature=temperature)
    uncaptured = trace(
        backend(family, "fast", device="cuda", graphs="off"), temperature=temperature
    )
    captured = trace(backend(family, "fast", device="cuda"), temperature=temperature)
    assert captured == uncaptured
    assert_equal(captured, wanted)


@pytest.mark.gpu
@NEEDS_CUDA
def test_shapes_can_be_captured_beforehand() -> None:
    fast = backend("llada", "fast", device="cuda")
    assert isinstance(fast._runner, FastRunner)
    fast._runner.warm_up([Bucket(1, 16), Bucket(1, 32)])
    assert list(fast._runner.graph_bytes) == [Bucket(1, 16), Bucket(1, 32)]


def test_long_steps_run_without_a_bucket() -> None:
    tokens = tuple(10 + i % 100 for i in range(20))
    answers = []
    for runner in ("fast", "plain"):
        tested = backend("llada", runner)
        slots = [tested.open_slot(24) for _ in range(8)]
        rows = [
            StepRow(s, Window(0, (*tokens[i:], MASK), 0, (21 - i,))) for i, s in enumerate(slots)
        ]
        rows = [
            StepRow(tested.open_slot(4), Window(0, (9, MASK), 0, (2,))) for _ in range(9)
        ] + rows
        answers.append(tested.step(rows))  # 17 sessions
    assert_equal(*answers)


def test_more_sessions_than_a_shape_holds_run_in_two_steps() -> None:
    answers = []
    for runner in ("fast", "plain"):
        tested = backend("llada", runner, max_tokens=4 * (CROWD + 1))
        tokens = [(10 + i % 100, MASK) for i in range(CROWD + 1)]
        answers.append(
            tested.step([StepRow(tested.open_slot(4), Window(0, each, 0, (2,))) for each in tokens])
        )
        if isinstance(tested._runner, FastRunner):
            assert all(shape.sessions <= CROWD for shape in tested._runner._shapes)
            assert tested._runner._shapes, "none without a graph"
    assert_equal(*answers)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_wide_steps_equal_those_of_the_plain_step(family: str, temperature: float) -> None:
    answers = []
    for runner in ("fast", "plain"):
        tested = TorchBackend(
            tiny_model(CONFIGS[family]),
            name=runner,
            runner="fast" if runner == "fast" else "plain",
            max_tokens=1024,
        )
        rows = []
        for number in range(17):  # 697 rows, of which 544 are masks: 768, and 576 through the head
            tokens = tuple(10 + (number + i) % 100 for i in range(9))
            window = Window(0, (*tokens, *[MASK] * 32), 0, (9, 41))
            uniforms = [(i * 0.37 + number * 0.11) % 1 for i in range(41)]
            row = StepRow(tested.open_slot(48), window, temperature=temperature, uniforms=uniforms)
            rows.append(row)
        answers.append(tested.step(rows))
    assert_equal(*answers)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_fp8_stays_close(family: str) -> None:
    model = tiny_model(CONFIGS[family])
    exact = backend(family, "fast")
    rough = backend(family, "fast")
    assert isinstance(rough._runner, FastRunner)
    packed = FastTransformer(model, quantization="fp8", ops=REFERENCES)
    rough._runner._model = packed
    window = Window(0, (*PROMPT, *[MASK] * 8), 0, (11, 19))
    (found,), (wanted,) = (
        tested.step([StepRow(tested.open_slot(32), window)]) for tested in (rough, exact)
    )
    same = sum(a == b for a, b in zip(found.tokens, wanted.tokens, strict=True))
    assert same >= 15  # of 19, of which 8 are masks: weights of this size are unkind to rounding
    assert packed.num_bytes < FastTransformer(model, quantization="fp32", ops=REFERENCES).num_bytes


def test_fp8_is_refused_without_a_gpu() -> None:
    with pytest.raises(UnsupportedModel, match="fp8 needs the fast step, but there is no CUDA"):
        TorchBackend(tiny_model(CONFIGS["llada"]), name="fp8", quantization="fp8")


def test_a_consumed_model_gives_its_layers_away() -> None:
    model = tiny_model(CONFIGS["llada"])
    FastTransformer(model, quantization="fp32", ops=REFERENCES, consume=True)
    assert all(isinstance(layer, torch.nn.Identity) for layer in model.layers)


def test_positions_that_have_no_room_take_no_memory() -> None:
    config = replace(CONFIGS["dream"], max_len=2**31 - 1)
    made = TorchBackend(tiny_model(config), name="long", runner="fast", max_tokens=64)
    assert made.info.max_len == 64
    assert trace(made)[0].tokens == trace(backend("dream", "fast"))[0].tokens
