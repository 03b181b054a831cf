"""Verified answers of real weights are the model's own autoregressive ones, to the token.

The oracle is one forward over prompt and answer, nothing cached, by transformers' Llama. fp32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2f_export.onnx.artefact import Description, write_artefact
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.decoder import Committed
from d2f_runtime.decoding.width import OWN
from d2f_runtime.engine.denoiser import Denoiser, decoder_of
from d2f_runtime.models.checkpoints import load_checkpoint, save_checkpoint
from d2f_stream.core.params import GenerationParams
from tiny_drafts import write_draft_adapter
from tiny_models import CONFIGS, MASK, NUM_TOKENS, tiny_model
from transformers_oracle import oracle_model

pytestmark = pytest.mark.torch

FEW = 8  # ids that may be produced: a draft is often right by chance
STUDENT = replace(CONFIGS["a2d"], num_tokens=FEW)
BASE = replace(CONFIGS["llama"], num_tokens=FEW)
NO_ID = 160  # the mask of the adapters, beyond the table
KINDS = [
    "torch",
    "onnx",
    "fast-references",
    "adapter",
    "untrained adapter",
    "onnx adapter",
    "fast adapter",
]


@dataclass(frozen=True)
class Rig:
    """A backend and the autoregressive model that its answers must be those of."""

    backend: Backend
    twin: Any  # transformers'
    forbidden: tuple[int, ...]

    def next_token(self, tokens: Sequence[int]) -> int:
        with torch.no_grad():
            logits = self.twin(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
        logits[list(self.forbidden)] = -torch.inf
        return int(logits.argmax())

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            tokens.append(self.next_token(tokens))
            if tokens[-1] in self.backend.info.eos_ids:
                break
        return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=KINDS)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    kind, root = request.param, tmp_path_factory.mktemp("verified")
    drafts = kind.endswith("adapter")
    config = BASE if drafts else STUDENT
    save_checkpoint(root / "checkpoint", tiny_model(config))
    model = load_checkpoint(root / "checkpoint")
    adapter = root / "adapter" if drafts else None
    if adapter is not None:
        write_draft_adapter(adapter, BASE, mask_id=NO_ID, trained=kind != "untrained adapter")
    backend: Backend
    if kind == "fast adapter":
        model = load_checkpoint(root / "checkpoint", adapter=adapter)
    if kind.startswith("fast"):
        backend = TorchBackend(model, name="fast", runner="fast", graphs="off")
    elif kind.startswith("onnx"):
        (root / "tokenizer.json").write_text("{}")
        about = Description(name="tiny", tokenizer=root / "tokenizer.json")
        stored = root / "artefact"
        write_artefact(root / "checkpoint", stored, about, quantization="fp32", adapter=adapter)
        backend = open_backend("onnx", stored, device="cpu", quantization="auto")
    else:
        backend = open_backend(
            "torch", root / "checkpoint", device="cpu", quantization="auto", adapter=adapter
        )
    padded = range(FEW, config.vocab_size)
    forbidden = tuple(padded) if drafts else (MASK, *padded)
    yield Rig(backend, oracle_model(config, model.state_dict()), forbidden)
    backend.close()


def decode(
    backend: Backend, prompt: Sequence[int], params: GenerationParams, spare_rows: int = 1000
) -> tuple[list[int], int]:
    """Return the committed tokens and the number of steps."""
    info = replace(backend.info, spare_rows=spare_rows)
    denoiser = Denoiser(prompt_tokens=prompt, params=params, info=info)
    slot = backend.open_slot(len(prompt) + params.max_new_tokens)
    committed: list[Committed] = []
    while True:
        (proposals,) = backend.step([denoiser.row(slot, OWN)])
        progress = denoiser.apply(proposals)
        committed += progress.committed
        if progress.reason is not None:
            backend.close_slot(slot)
            return [token for block in committed for token in block.tokens], progress.num_steps


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], GenerationParams]:
    share = st.floats(0.02, 1.0)
    prompt = draw(st.lists(st.integers(4, NUM_TOKENS - 1), min_size=1, max_size=20))
    params = GenerationParams(
        commit="verify",
        max_new_tokens=draw(st.integers(1, 40)),
        block_size=draw(st.integers(1, 32)),
        add_threshold=draw(share),
        confidence_threshold=draw(share),
        max_active_blocks=draw(st.sampled_from((1, 2, 3, 4, None))),
    )
    return prompt, params


@given(requests(), st.sampled_from((4, 10, 1000)))
@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
def test_a_verified_answer_is_the_models_own_next_tokens(
    rig: Rig, asked: tuple[list[int], GenerationParams], spare_rows: int
) -> None:
    prompt, params = asked
    answer, num_steps = decode(rig.backend, prompt, params, spare_rows)
    assert answer == rig.answer(prompt, params.max_new_tokens)
    assert num_steps <= len(answer)


@given(st.lists(st.integers(4, NUM_TOKENS - 1), min_size=1, max_size=9), st.integers(0, 2**40))
@settings(
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
def test_a_sampled_verified_answer_is_the_one_of_block_size_one(
    rig: Rig, prompt: list[int], seed: int
) -> None:
    params = GenerationParams(
        commit="verify",
        max_new_tokens=24,
        block_size=8,
        confidence_threshold=0.05,
        add_threshold=0.2,
        temperature=0.9,
        seed=seed,
    )
    answer, _ = decode(rig.backend, prompt, params)
    alone = params.with_overrides({"block_size": 1, "max_active_blocks": 1})
    assert answer == decode(rig.backend, prompt, alone)[0]


def test_rows_of_several_sessions_are_verified_in_one_step(rig: Rig) -> None:
    rows, decoders, slots = [], [], []
    params = GenerationParams(
        commit="verify",
        max_new_tokens=20,
        block_size=8,
        confidence_threshold=0.02,
        add_threshold=0.2,
    )
    prompts = [[5, 9, 12], [70, 71], [100, 20, 21, 22, 23, 24]]
    answers: list[list[int]] = [[], [], []]
    for prompt in prompts:
        decoders.append(decoder_of(rig.backend.info, prompt, params))
        slots.append(rig.backend.open_slot(len(prompt) + 20))
    while any(not decoder.finished for decoder in decoders):
        rows = [
            (index, StepRow(slots[index], window))
            for index, decoder in enumerate(decoders)
            if (window := decoder.next_window()) is not None
        ]
        found = rig.backend.step([row for _, row in rows])
        for (index, _), proposals in zip(rows, found, strict=True):
            for event in decoders[index].apply(proposals):
                if isinstance(event, Committed):
                    answers[index] += event.tokens
    for slot in slots:
        rig.backend.close_slot(slot)
    assert answers == [rig.answer(prompt, 20) for prompt in prompts]


def test_right_drafts_save_steps(rig: Rig) -> None:
    params = GenerationParams(
        commit="verify",
        max_new_tokens=60,
        block_size=8,
        confidence_threshold=0.02,
        add_threshold=0.2,
    )
    found = [decode(rig.backend, [seed, 9, 12], params) for seed in range(20, 25)]
    assert sum(steps for _, steps in found) < sum(len(answer) for answer, _ in found)
