"""The two functions that most programs need: `generate` and `load`.

Knows which engine a request goes to. The runtime is imported on the first call, so that importing
d2f_stream stays light.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Unpack

from d2f_stream.params import GenerationParams, ParamOverrides
from d2f_stream.session import Engine, Prompt, Session

__all__ = ["generate", "load"]


def generate(
    prompt: Prompt,
    *,
    model: str | Path | Engine | None = None,
    params: GenerationParams | None = None,
    **overrides: Unpack[ParamOverrides],
) -> Session:
    """Start an answer on the running event loop; the session streams it.

        async for block in d2f_stream.generate("How many is 3 times 4?"):
            print(block.text, end="")

    Args:
        prompt: a string, taken verbatim; a list of chat messages ({"role": ..., "content": ...}),
            put through the model's template; or a list of token ids.
        model: None is the embedded model; a path is a model folder; an open engine is used as it
            is. A model that is not open yet is loaded once per process and stays loaded, and all
            requests of an event loop share one engine for it; `load` gives control over that.
        params: instead of the model's defaults.
        overrides: single fields of GenerationParams, on top of either.

    Raises:
        InvalidRequest: prompt or parameters do not fit the model. While the model is loading, the
            session's first await raises this instead.
        ModelError: there is no such model, or it cannot be used; once loading began, raised by the
            session's first await.
    """
    if model is None or isinstance(model, str | Path):
        from d2f_runtime.opening import shared_engine

        model = shared_engine(model)
    return model.generate(prompt, params, **overrides)


@contextlib.asynccontextmanager
async def load(
    model: str | Path | None = None,
    *,
    backend: str = "auto",
    quantization: str = "auto",
    device: str = "auto",
) -> AsyncIterator[Engine]:
    """Load a model and open an engine over it; leaving the context ends its sessions.

    The same model loaded twice is held once; its memory is freed when the last engine is closed.
    Safe to cancel.

    Args:
        model: None is the embedded model; a path is a model folder.
        backend: "auto", "onnx", "torch" or "scripted".
        quantization: what the backend offers; "auto" is its own choice.
        device: "auto", "cpu", "cuda", "cuda:1", ...

    Raises:
        ModelError: there is no such model, or it cannot be used.
        MissingExtra: the backend's library is not installed.
    """
    from d2f_runtime.opening import open_engine

    async with open_engine(
        model, backend=backend, quantization=quantization, device=device
    ) as engine:
        yield engine
