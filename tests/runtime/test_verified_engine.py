"""Verified answers through the engine: texts with stop strings, drafts, refusals, reused K/V."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.width import OWN
from d2f_runtime.engine.denoiser import Denoiser
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.events import Block, Draft, StreamFinished
from d2f_stream.core.params import GenerationParams
from tiny_models import CONFIGS, tiny_model

pytestmark = pytest.mark.torch

CONFIG = replace(CONFIGS["a2d"], num_tokens=10, eos_ids=(1,))  # few ids, so that drafts are right
PARAMS = GenerationParams(
    commit="verify",
    max_new_tokens=40,
    block_size=8,
    confidence_threshold=0.05,
    add_threshold=0.2,
)


class Letters:
    """A letter for each id."""

    special_tokens: Mapping[str, int] = MappingProxyType({})
    longest_token = 1
    chats = False

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(message["content"] for message in messages)


def backend() -> TorchBackend:
    tested = TorchBackend(tiny_model(CONFIG), name="tiny")
    tested.info = replace(tested.info, spare_rows=1000)  # so that many drafts are kept
    return tested


@given(
    prompts=st.lists(st.text("efghij", min_size=1, max_size=12), min_size=1, max_size=3),
    stop=st.lists(st.text("acefghij", min_size=1, max_size=2), max_size=2),
    block_size=st.sampled_from((2, 5, 8, 16)),
    drafts=st.booleans(),
)
@settings(max_examples=20)
def test_texts_are_those_of_one_token_after_the_other(
    prompts: list[str], stop: list[str], block_size: int, drafts: bool
) -> None:
    async def run() -> None:
        async with LocalEngine.over(backend(), Letters(), defaults=PARAMS) as engine:
            asked = PARAMS.with_overrides(
                {"stop": tuple(stop), "block_size": block_size, "drafts": drafts}
            )
            alone = asked.with_overrides({"block_size": 1, "max_active_blocks": 1})
            sessions = [engine.generate(prompt, asked) for prompt in prompts]
            found = await asyncio.gather(*(session.result() for session in sessions))
            for prompt, result in zip(prompts, found, strict=True):
                wanted = await engine.generate(prompt, alone).result()
                assert (result.text, result.reason) == (wanted.text, wanted.reason)
                # a block that holds the stop string is final as a whole, a token ends with it
                assert result.token_ids[: len(wanted.token_ids)] == wanted.token_ids
                assert result.usage.steps <= len(result.token_ids)

    asyncio.run(run())


async def test_drafts_of_blocks_that_leave_are_erased() -> None:
    tested = backend()
    tested.info = replace(tested.info, branches=False)  # nothing is drafted in their place
    shown: dict[int, Draft] = {}
    num_committed = num_erased = 0
    async with LocalEngine.over(tested, Letters(), defaults=PARAMS) as engine:
        for seed in range(8):
            shown.clear()
            num_committed = 0
            session = engine.generate(
                "efgh"[: seed % 4 + 1] + "j" * (seed // 4), drafts=True, block_size=2
            )
            async for event in session.events():
                match event:
                    case Draft(filled=()):
                        num_erased += 1
                        assert event.index >= num_committed
                        shown.pop(event.index, None)
                    case Draft():
                        assert event.index >= num_committed
                        shown[event.index] = event
                    case Block():
                        num_committed += 1
                        shown.pop(event.index, None)
                    case StreamFinished():
                        assert event.usage.completion_tokens <= 40
    assert num_erased > 0


def test_what_is_shown_is_what_is_on_the_canvas() -> None:
    tested = backend()
    params = PARAMS.with_overrides({"drafts": True})
    for seed in range(6):
        prompt = [4 + seed, 5, 6]
        denoiser = Denoiser(prompt_tokens=prompt, params=params, info=tested.info)
        slot, shown = tested.open_slot(64), set[int]()
        while True:
            row: StepRow = denoiser.row(slot, OWN)
            joined = {view.index for view in denoiser.joined()}
            assert not joined & shown
            shown |= joined
            progress = denoiser.apply(tested.step([row])[0])
            shown -= {block.index for block in progress.committed} | set(progress.left)
            if progress.reason is not None:
                break
            active = {view.index for view in progress.active}
            assert shown <= active
            shown = active  # those that drafts have reached just now are shown with the others
        tested.close_slot(slot)


async def test_a_model_that_cannot_be_verified_says_so() -> None:
    dream = TorchBackend(tiny_model(CONFIGS["dream"]), name="dream")
    defaults = GenerationParams(block_size=8)
    async with LocalEngine.over(dream, Letters(), defaults=defaults) as engine:
        with pytest.raises(InvalidParams, match="commit is 'verify' but must be 'filled'"):
            await engine.generate("efgh", commit="verify").result()


async def test_verifying_is_the_default_of_a_converted_model() -> None:
    async with LocalEngine.over(backend(), Letters()) as engine:
        assert (engine.defaults.commit, engine.defaults.block_size) == ("verify", 8)
