"""The functions that most programs need: `generate`, `load` and `connect`.

Knows which engine a request goes to. The runtime and the clients are imported on the first call, so
that importing d2f_stream stays light.
"""

import asyncio
import contextlib
import operator
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, Unpack

from d2f_stream.core.errors import InvalidRequest
from d2f_stream.core.limits import Limits
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Engine, Prompt, Session

if TYPE_CHECKING:
    from d2f_stream.client.shared import SharedEngine
    from d2f_stream.transformers_streamer import Streamer

__all__ = ["connect", "generate", "load"]


def generate(
    prompt: Prompt,
    *,
    model: str | Path | Engine | None = None,
    params: GenerationParams | None = None,
    streamer: "Streamer | None" = None,
    raw: bool = False,
    **overrides: Unpack[ParamOverrides],
) -> Session:
    """Start an answer on the running event loop; the session streams it.

        async for block in d2f_stream.generate("What is the capital of Japan?"):
            print(block.text, end="")

    Awaited, the session gives the whole answer: `result = await d2f_stream.generate("...")`.

    Args:
        prompt: a string, which is a user's turn where the model chats, or a list of chat messages
            ({"role": ..., "content": ...}): both are put through the model's template; or a list of
            token ids.
        model: None is the default model; a path is a model folder or a .gguf file; "org/name" is a
            Hugging Face repository, unless there is a folder of that name; an address as of
            `connect` is a server; an open engine is used as it is. A model that is not open yet is
            loaded once per process and stays loaded, and all requests of an event loop share one
            engine for it, or one connection; `load` and `connect` give control over that.
        params: instead of the model's defaults.
        streamer: one of transformers (TextStreamer, AsyncTextIteratorStreamer, ...), or any object
            with `put` and `end`: gets the answer beside whoever reads the session, which nobody
            need do; see d2f_stream.transformers_streamer. It gets the prompt only where that is
            token ids, and drafts where it has `put_draft`, unless drafts=False.
        raw: take a string verbatim, as a text to be continued, which is what an engine's own
            generate() does unless told otherwise. One for a model without a chat template always
            is.
        overrides: single fields of GenerationParams, on top of either. Where neither says
            max_new_tokens, a prompt that leaves less room than the model's default gets an answer
            of at most that room; one that is given must fit.

    Raises:
        InvalidRequest: prompt or parameters do not fit the model. While the model is loading, the
            session's first await raises this instead.
        ModelError: there is no such model, or it cannot be used; once loading began, raised by the
            session's first await.
        RemoteError: the server cannot be reached, or refuses; raised by the session's first await.
        MissingExtra: a streamer was given and numpy is not installed.
        RuntimeError: no event loop runs.
    """
    _check_loop()
    feed = None
    if streamer is not None:
        from d2f_stream.transformers_streamer import Feed

        feed = Feed(streamer, prompt_ids=_ids(prompt))
        if feed.wants_drafts:
            overrides.setdefault("drafts", True)
    if isinstance(model, str) and "://" in model:
        from d2f_stream.client.shared import shared_remote_engine

        model = shared_remote_engine(model, partial(_remote_engine, model))
    elif model is None or isinstance(model, str | Path):
        from d2f_runtime.engine.opening import shared_engine

        model = shared_engine(model)
    elif not hasattr(type(model), "generate") or not hasattr(type(model), "__aenter__"):
        raise InvalidRequest(
            f"the model is {model!r:.100} but must be a name, a folder, a server's address or an "
            "engine, such as that of `async with d2f_stream.load(...) as engine`"
        )
    session = model.generate(prompt, params, raw=raw, **overrides)
    return session if feed is None else feed.follow(session)


@contextlib.asynccontextmanager
async def load(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    quantization: str = "auto",
    device: str = "auto",
    kv_tokens: int | None = None,
    family: str | None = None,
    limits: Limits | None = None,
    warm_up: bool = False,
    token: str | None = None,
) -> AsyncIterator[Engine]:
    """Load a model and open an engine over it; leaving the context ends its sessions.

    The same model loaded twice is held once; its memory is freed when the last engine is closed.
    Safe to cancel.

    Args:
        model: None is the default model; a path is a model folder or a .gguf file; "org/name" or
            "org/name@revision" is a Hugging Face repository, unless there is a folder of that name;
            an address is a server, which has chosen all that follows itself, save the token.
        adapter: folder or repository of a LoRA adapter (PEFT), merged into the weights.
        backend: "auto", "onnx", "torch" or "scripted".
        quantization: what the backend offers; "auto" is its own choice.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        kv_tokens: how many tokens all sessions together may hold (prompts and answers), which is
            taken from the device's memory (torch only). By default 1 GiB of them; where one request
            of the model's full length needs more, that, but at most half of what is free once the
            weights are loaded; on a GPU 65,536 tokens, if those are an eighth of that at most.
        family: which family a published model is of, by its model_type in docs/models.md, where its
            own files do not tell or tell a wrong one (torch only).
        limits: how much the engine takes on at once, and whether the windows of its sessions may
            narrow; by default they do not: an answer is the same whatever else runs.
        warm_up: prepare the steps of one session beforehand (on a GPU: compile kernels, capture
            graphs; some 20 s where nothing is compiled yet), so that no request waits for that.
        token: of a server that asks for one, as of `connect`.

    Raises:
        InvalidRequest: a token for a model that runs here, or anything else for one that does not.
        InvalidParams: kv_tokens is no positive number.
        ModelError: there is no such model, or it cannot be used.
        MissingExtra: the backend's library is not installed.
        RemoteError: the server cannot be reached, or refuses.
    """
    if isinstance(model, str) and "://" in model:
        chosen = (adapter, backend, quantization, device, kv_tokens, family, limits, warm_up)
        if chosen != (None, "auto", "auto", "auto", None, None, None, False):
            raise InvalidRequest(
                "adapter, backend, quantization, device, kv_tokens, family, limits and warm_up are "
                "the server's own choice; leave them out"
            )
        async with connect(model, token=token) as remote:
            yield remote
        return
    if token is not None:
        raise InvalidRequest(
            "a token is for a server, and this model runs here; give a server's address as the "
            "model, or leave the token out"
        )
    from d2f_runtime.engine.opening import open_engine

    async with open_engine(
        model,
        adapter=adapter,
        backend=backend,
        quantization=quantization,
        device=device,
        kv_tokens=kv_tokens,
        family=family,
        limits=limits,
        warm_up=warm_up,
    ) as engine:
        yield engine


def connect(
    url: str, *, token: str | None = None, reconnect_timeout_s: float = 30.0
) -> AbstractAsyncContextManager[Engine]:
    """Open an engine whose model is on a server; leaving the context ends its sessions.

        async with d2f_stream.connect("ws://127.0.0.1:8000") as engine:
            turn = {"role": "user", "content": "What is the capital of Japan?"}
            async for block in engine.generate([turn]):
                print(block.text, end="")

    It is used like one of `load`. A connection that breaks is made again, and every answer goes on
    where it broke off.

    Args:
        url: ws://host:port or wss://host, whose path is /v1/stream unless it has another; http://
            and https:// mean these; or mqtt://broker, mqtts://broker.
        token: of a server that asks for one. Never put it into the address.
        reconnect_timeout_s: how long a server that was lost is tried, before every session fails.
            One that does not answer at first is not tried again.

    Raises:
        InvalidRequest: the address cannot be used.
        RemoteError: on entering: the server cannot be reached, or refuses.
        MissingExtra: the client's library is not installed.
    """
    return _remote_engine(url, token=token, reconnect_timeout_s=reconnect_timeout_s)


def _ids(prompt: Prompt) -> list[int]:
    """Return a prompt of token ids, nothing for any other."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return []
    ids = [item for item in prompt if isinstance(item, SupportsIndex)]
    return [operator.index(item) for item in ids] if len(ids) == len(prompt) else []


def _check_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "generate() needs a running event loop: call it in `async def main()`, which "
            "asyncio.run(main()) starts, or use d2f_stream.sync.generate(), which needs none"
        ) from None


def _remote_engine(
    url: str, *, token: str | None = None, reconnect_timeout_s: float = 30.0
) -> "SharedEngine":
    scheme, is_address, _ = str(url).partition("://")
    if not is_address:
        raise InvalidRequest(f"{url} is no address of a server; http://{url} would be one")
    if scheme in ("mqtt", "mqtts"):
        from d2f_stream.client.mqtt_line import connect_mqtt

        return connect_mqtt(url, token=token, reconnect_timeout_s=reconnect_timeout_s)
    if scheme not in ("ws", "wss", "http", "https"):
        raise InvalidRequest(
            f"{scheme}:// is no address of a model; it must be one of ws, wss, http, https, mqtt, "
            "mqtts"
        )
    from d2f_stream.channels.websocket import check_url, open_websocket
    from d2f_stream.client.backoff import Backoff
    from d2f_stream.client.websocket_line import connect_websocket

    dial = partial(open_websocket, check_url(url), token=token)
    return connect_websocket(dial, backoff=Backoff(timeout_s=reconnect_timeout_s))
