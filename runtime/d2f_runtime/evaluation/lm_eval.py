"""The model `d2f_stream` of lm-evaluation-harness, registered when this module is imported.

lm-eval has no entry points for models: a program imports this module, then names the model; on the
command line, `python -m d2f_runtime.evaluation` does so and goes on as lm-eval. Written against the
interface of lm-eval 0.4.13 (api/model.py, api/instance.py).

Answers many requests at a time on one engine, local or remote. A local one does not narrow its
windows as sessions grow, so that an answer does not depend on those beside it.
"""

import asyncio
import atexit
import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.evaluation.lm_eval_settings import (
    answers_at_a_time,
    cut_at,
    overrides_of,
    overrides_of_task,
    preset_of,
    stop_strings,
)
from d2f_runtime.evaluation.samples import Question, Sample, answer_all, opened
from d2f_stream.core.errors import MissingExtra
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Engine, Prompt

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise MissingExtra("evaluating tasks", "lm-eval", "eval") from error

__all__ = ["ChatPrompt", "D2FStreamLM"]

logger = logging.getLogger("d2f_stream.evaluation")

MAX_STOP_STRINGS: Final = 16  # of an engine; further ones are cut from the finished text
NO_SCORES: Final = (
    "d2f_stream decodes answers and gives no log-likelihoods, which task {task!r} asks for; choose "
    "a variant of the task whose output_type is generate_until"
)


class ChatPrompt(str):
    """Chat messages on their way to a server, which has the template; as text they are JSON."""

    messages: list[dict[str, str]]

    def __new__(cls, messages: list[dict[str, str]]) -> "ChatPrompt":
        """Keep the messages."""
        prompt = super().__new__(cls, json.dumps(messages, ensure_ascii=False))
        prompt.messages = messages
        return prompt

    def __getnewargs__(self) -> tuple[list[dict[str, str]]]:  # type: ignore[override]
        """Let lm-eval's request cache copy and pickle it."""
        return (self.messages,)


@dataclass(frozen=True, slots=True)
class _Request:
    question: Question
    until: tuple[str, ...]  # all of them


@register_model("d2f_stream")
class D2FStreamLM(LM):  # type: ignore[misc]  # lm-eval is untyped
    """An engine as lm-eval sees it.

    Args:
        model: a folder, GGUF file or hub id, None for the default model, or a server's address.
        batch_size: answers at a time; "auto" is 16.
        max_batch_size: bounds "auto".
        device: "auto", "cpu", "cuda", ...
        adapter: a LoRA to merge into the weights.
        backend: "auto", "onnx" or "torch".
        quantization: what the backend offers.
        token: of a server that asks for one.
        preset: a name of PRESETS to start from instead of the model's defaults.
        prompt_prefix: put before each prompt, such as a BOS that the tokenizer does not add.
        escape_until: answer to the end of the block limit or EOS and leave stop strings alone, as
            the published D2F runs of HumanEval do.
        samples: a JSON-lines file to which a record of each answer is appended.
        params: fields of GenerationParams. They win over what a task says, which wins over preset
            and defaults.

    Raises:
        InvalidParams: an unknown preset or field, or a value out of range.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str = "auto",
        adapter: str | None = None,
        backend: str = "auto",
        quantization: str = "auto",
        token: str | None = None,
        preset: str | None = None,
        prompt_prefix: str = "",
        escape_until: bool = False,
        samples: str | Path | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        self._model = model
        self._concurrency = answers_at_a_time(batch_size, max_batch_size)
        self._local = {"device": device, "backend": backend, "quantization": quantization}
        self._adapter = adapter
        self._token = token
        self._preset = None if preset is None else preset_of(preset)
        self._fixed = overrides_of(params)
        GenerationParams().with_overrides(self._fixed)  # complain before the model loads
        self._prefix = prompt_prefix
        self._escapes = escape_until
        self._output = None if samples is None else Path(samples)
        self._taken: list[Sample] = []
        self._runner = asyncio.Runner()
        self._contexts = contextlib.AsyncExitStack()
        self._opened: Engine | None = None
        self._closed = False
        atexit.register(self.close)

    def close(self) -> None:
        """Close the engine and its event loop, for good. Idempotent; done at exit."""
        atexit.unregister(self.close)
        if not self._closed:
            self._closed = True
            self._runner.run(self._contexts.aclose())
            self._runner.close()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer all requests; texts in their order, cut before the first stop string.

        Raises:
            InvalidParams: a task asks for a setting that this engine does not have.
            D2FError: the engine failed.
        """
        engine = self._engine
        prepared = [self._prepare(request, number) for number, request in enumerate(requests)]
        local = engine if isinstance(engine, LocalEngine) else None
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="d2f_stream", disable=disable_tqdm) as bar:

            def note(number: int, sample: Sample) -> None:
                texts[number] = cut_at(sample.text, prepared[number].until)
                self._note(requests[number], sample)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                bar.update()

            self._runner.run(
                answer_all(
                    engine,
                    [request.question for request in prepared],
                    concurrency=self._concurrency,
                    decode=local.codec.decode if local else None,
                    on_sample=note,
                )
            )
        taken = self._taken[len(self._taken) - len(requests) :]
        refused = [sample.error for sample in taken if sample.error]
        if refused:
            logger.warning(
                "%d of %d requests were refused and count as empty answers; the first: %s",
                len(refused), len(requests), refused[0],
            )  # fmt: skip
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: the engine gives no probabilities of given text.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(NO_SCORES.format(task=requests[0].task_name if requests else ""))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse, as `loglikelihood`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(NO_SCORES.format(task=requests[0].task_name if requests else ""))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages by the model's template; the last one is an answer begun, if so asked.

        Raises:
            InvalidPrompt: the model has no template, or it refuses the messages.
            NotImplementedError: the template is on a server and the answer is begun already.
        """
        engine = self._engine
        if isinstance(engine, LocalEngine):
            if add_generation_prompt:
                return engine.codec.render(chat_history)
            return engine.codec.render(chat_history[:-1]) + chat_history[-1]["content"]
        if not add_generation_prompt:
            raise NotImplementedError(
                "the task begins the answer itself (gen_prefix), which a server's chat template "
                "cannot go on from; load the model here, or leave the chat template out"
            )
        return ChatPrompt(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """Tell lm-eval's request cache the models apart."""
        return f"d2f_stream-{self._engine.info.name}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what stands in the results beside the scores: the model and sums over samples."""
        engine, taken = self._engine, [sample for sample in self._taken if not sample.error]
        steps = sum(sample.steps for sample in taken)
        useful = [sample.useful_tokens for sample in taken if sample.useful_tokens is not None]
        totals: dict[str, float | None] = {
            "num_samples": len(taken),
            "num_refused": len(self._taken) - len(taken),
            "useful_tokens": sum(useful) if len(useful) == len(taken) else None,
            "total_tokens": sum(sample.total_tokens for sample in taken),
            "steps": steps,
        }
        tokens = totals["useful_tokens"]
        totals["tokens_per_step"] = round(tokens / steps, 4) if tokens and steps else None
        info = {"model": engine.info.name, "family": engine.info.family, "settings": self._fixed}
        return {"d2f_stream": {**info, **totals}}

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            self._opened = self._runner.run(self._open())
        return self._opened

    async def _open(self) -> Engine:
        engine = opened(
            self._model,
            concurrency=self._concurrency,
            adapter=self._adapter,
            token=self._token,
            **self._local,
        )
        return await self._contexts.enter_async_context(engine)

    def _prepare(self, request: Instance, number: int) -> _Request:
        context, settings = request.args
        task = overrides_of_task(settings)
        until = () if self._escapes else stop_strings(settings.get("until"))
        params = (self._preset or self._engine.defaults).with_overrides(
            cast(ParamOverrides, {**task, "stop": until[:MAX_STOP_STRINGS], **self._fixed})
        )
        if params.seed is not None:  # or the repeats of a document would all be the same
            params = params.with_overrides({"seed": (params.seed + number) % 2**63})
        prompt: Prompt = self._prefix + context
        if isinstance(context, ChatPrompt):
            prompt = context.messages
        return _Request(Question(prompt, params), until)

    def _note(self, request: Instance, sample: Sample) -> None:
        self._taken.append(sample)
        if self._output is not None:
            entry = {"task": request.task_name, "doc_id": request.doc_id, **sample.to_dict()}
            self._output.parent.mkdir(parents=True, exist_ok=True)
            with self._output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
