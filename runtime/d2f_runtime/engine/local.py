"""LocalEngine: serves requests for one loaded model on one event loop.

Checks requests and makes streams of them; the step loop runs them. Never imports torch: what the
model runs on is behind `backends.base`.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Self, Unpack

from d2f_runtime.backends.base import Backend
from d2f_runtime.engine.answer_params import default_params, defaults_of
from d2f_runtime.engine.continuation import Continuation
from d2f_runtime.engine.limits import EngineLoad, Limits
from d2f_runtime.engine.prompts import check_size, encode
from d2f_runtime.engine.request import Request
from d2f_runtime.engine.running_streams import StepObserver
from d2f_runtime.engine.step_loop import StepLoop
from d2f_runtime.engine.stream import StreamId
from d2f_runtime.loaded_model import MODELS, LoadedModel, ModelParts
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.buffer import EventBuffer
from d2f_stream.core.errors import EngineClosed, EngineFailed
from d2f_stream.core.events import Block, StreamNames
from d2f_stream.core.params import GenerationParams, ParamOverrides, check_given
from d2f_stream.core.session import Prompt, Session

__all__ = ["Limits", "LocalEngine"]

NUM_ENCODERS: Final = 2
"""Threads that read prompts, of which one may be long."""


class LocalEngine:
    """An engine over a leased model; belongs to the event loop that it is first used on.

    `async with engine:` waits for the model and closes the engine at the end. Requests may come
    earlier: they wait for the model. Leaving gives the lease back, which the last engine's frees
    the model.

    Args:
        model: leased from a ModelCache; the engine gives the lease back.
        limits: how much it takes on at once.
        warm_up: let the backend prepare its steps when the engine is entered.
    """

    def __init__(
        self, model: LoadedModel, *, limits: Limits | None = None, warm_up: bool = False
    ) -> None:
        self._model = model
        self._warm_up = warm_up
        self._observers: dict[object, StepObserver] = {}
        self._steps = StepLoop(model, limits or Limits(), self._observers)
        self._encoders = ThreadPoolExecutor(NUM_ENCODERS, thread_name_prefix="d2f-encode")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._closed = asyncio.Event()

    @classmethod
    def over(
        cls,
        backend: Backend,
        codec: TextCodec,
        *,
        defaults: GenerationParams | None = None,
        limits: Limits | None = None,
        warm_up: bool = False,
    ) -> Self:
        """Return an engine over a backend that nobody else uses, such as a ScriptedBackend."""
        if defaults is None:
            defaults = default_params(backend.info)
        parts = ModelParts(backend, codec, defaults)
        model = MODELS.lease(None, backend.info.name, lambda: parts)
        return cls(model, limits=limits, warm_up=warm_up)

    @property
    def info(self) -> ModelInfo:
        """Facts about the model, once it is loaded."""
        return self._parts().info

    @property
    def defaults(self) -> GenerationParams:
        """The parameters of a request that gives none, once the model is loaded."""
        return defaults_of(self._parts(), self._steps.limits)

    @property
    def codec(self) -> TextCodec:
        """The model's tokenizer and template, once it is loaded."""
        return self._parts().codec

    @property
    def current_load(self) -> EngineLoad:
        """What the engine does at this moment."""
        return self._steps.current_load

    def on_step(self, observe: StepObserver) -> Callable[[], None]:
        """Call `observe` after each step, on the event loop; it must not wait or raise.

        Returns:
            What ends that; idempotent.
        """
        observers, key = self._observers, object()
        observers[key] = observe

        def undo() -> None:
            observers.pop(key, None)

        return undo

    @property
    def usable(self) -> bool:
        """Whether requests are accepted: not closed, and nothing broke."""
        return not self._closing and self._steps.failure is None

    def generate(
        self,
        prompt: Prompt,
        params: GenerationParams | None = None,
        *,
        names: StreamNames | None = None,
        committed: Sequence[Block] = (),
        raw: bool = True,
        **overrides: Unpack[ParamOverrides],
    ) -> Session:
        """Start a request; the session streams its answer.

        Args:
            prompt: chat messages, for the model's template; a string; or token ids.
            params: instead of the model's defaults.
            names: that the events carry; no other stream of the engine may have them.
            committed: the blocks that another engine has told of this request, from the first on.
                The session tells what follows them: where it depends on nothing but prompt,
                parameters and seed, that is what would have followed there.
            raw: take a string verbatim, as a text to be continued; else it is a user's turn, where
                the model has a template.
            overrides: single fields, on top of either. Where neither says max_new_tokens, the
                model's default is what the answer gets at most: less where the prompt leaves less.

        Raises:
            InvalidRequest: prompt or parameters do not fit the model, or what was committed does
                not fit them. While it is loading, the session's first await raises this instead.
            EngineClosed: the engine was closed.
            EngineFailed: the backend failed before.
        """
        self._check_open()
        check_given(params)
        given = names or StreamNames.fresh()
        stream_id = StreamId(given.stream)
        steps = self._steps
        buffer = EventBuffer(
            cancel=partial(steps.cancel, stream_id),
            pause=partial(steps.pause, stream_id),
            resume=partial(steps.resume, stream_id),
            committed=committed,
        )

        request = Request(
            prompt=prompt,
            params=params,
            overrides=overrides,
            names=given,
            before=Continuation(committed),
            raw=raw,
            buffer=buffer,
        )
        steps.submit(request)
        return Session(buffer)

    def check_size(self, prompt: Prompt) -> None:
        """Refuse a prompt that is too long at first sight, before it is read.

        Raises:
            PromptTooLong: it has more tokens than the model holds, whatever they are.
        """
        check_size(prompt, self._parts())

    async def encode(self, prompt: Prompt, *, raw: bool = True) -> list[int]:
        """Return a prompt's ids, which generate() takes for it; long ones hold nobody up.

        Safe to cancel.

        Raises:
            InvalidPrompt: it is of no kind that is known, or its template refuses it.
            PromptTooLong: the model cannot hold it.
        """
        self._check_open()
        parts = self._parts()
        check_size(prompt, parts)
        loop = asyncio.get_running_loop()
        read = partial(encode, prompt, parts, raw=raw)
        return await loop.run_in_executor(self._encoders, read)

    @property
    def busy_s(self) -> float:
        """For how long the device has been at work on one call, a step as a rule, seconds."""
        return self._model.device.busy_s

    async def wait_failed(self) -> None:
        """Wait until the backend has failed. Safe to cancel."""
        await self._steps.failed.wait()

    async def reload(self) -> None:
        """Load the model anew after the backend failed, and accept requests again.

        What is known of the model stays known meanwhile. Safe to cancel; the engine has then
        failed for good, as after an error.

        Raises:
            D2FError: the model cannot be loaded or warmed up.
        """
        freed = MODELS.release(self._model)
        if freed is not None:
            await asyncio.wait((freed,))
        if self._closing:
            return
        self._model = model = MODELS.renew(self._model)
        steps = StepLoop(model, self._steps.limits, self._observers)
        await steps.load()
        if self._warm_up:
            await self._prepare_steps(steps)
        self._steps = steps

    def shut(self) -> None:
        """Begin to close, without waiting. Idempotent.

        Where the engine's event loop was closed, any other may do it.
        """
        is_left = self._loop is not None and self._loop.is_closed()
        if not is_left:
            self._check_loop()
        if self._closing:
            return
        self._closing = True
        self._encoders.shutdown(wait=False, cancel_futures=True)
        if is_left:
            self._model.device.post(self._model.do_reclaim)
            self._release()
        else:
            self._steps.close(self._release)

    async def close(self) -> None:
        """End all sessions and free what the engine holds. Idempotent.

        Safe to cancel; the engine goes on closing. Waits for the step in flight.
        """
        self.shut()
        await self._closed.wait()

    async def __aenter__(self) -> Self:
        """Wait until the model is loaded, and warm where asked. Safe to cancel; loading goes on.

        Raises:
            D2FError: the model cannot be loaded or warmed up, or the engine was closed.
        """
        self._check_open()
        try:
            await self._steps.load()
            if self._warm_up:
                await self._prepare_steps(self._steps)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the engine. Safe to cancel; the engine goes on closing."""
        await self.close()

    async def _prepare_steps(self, steps: StepLoop) -> None:
        parts = await steps.load()
        defaults = defaults_of(parts, steps.limits)
        try:
            await self._model.device.call(self._model.do_warm_up)
            if defaults.may_narrow or defaults.commit == "verify":
                await steps.time_steps(defaults)
        except Exception as error:
            MODELS.discard(self._model)
            raise EngineFailed(f"the model cannot be warmed up: {error!r}") from error

    def _release(self) -> None:
        freed = MODELS.release(self._model)
        if freed is None:
            self._closed.set()
        else:
            freed.add_done_callback(lambda _: self._closed.set())

    def _parts(self) -> ModelParts:
        if self._steps.parts is None:
            raise RuntimeError("the model is not loaded yet; enter the engine with `async with`")
        return self._steps.parts

    def _check_open(self) -> None:
        if self._model.device.forked:
            raise EngineClosed(
                "the engine belongs to the process that this one was forked from; load() the model "
                "here, or start processes by spawn"
            )
        self._check_loop()
        if self._closing:
            raise EngineClosed("the engine was closed; load() the model again")
        failure = self._steps.failure
        if failure is not None:
            raise EngineFailed(f"the engine failed earlier: {failure}") from failure

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError(
                "this engine belongs to another event loop; load() one here, the weights are shared"
            )
