"""Loader: how the commands open the model that their arguments name."""

import argparse
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from d2f_stream.core.session import Engine

__all__ = ["Loader", "default_load", "fetch_first", "for_another", "opened_model"]


class Loader(Protocol):
    """Opens a model, as `d2f_stream.load` does."""

    def __call__(
        self,
        model: str | None = None,
        *,
        adapter: str | None = None,
        backend: str,
        quantization: str,
        device: str,
        kv_tokens: int | None = None,
        family: str | None = None,
        token: str | None = None,
    ) -> AbstractAsyncContextManager[Engine]:
        """Return the engine as an async context manager."""
        ...


def opened_model(args: argparse.Namespace, load: Loader) -> AbstractAsyncContextManager[Engine]:
    """Return the engine of the arguments."""
    said = {} if args.family is None else {"family": str(args.family)}
    return load(
        args.model,
        token=args.token,
        adapter=args.adapter,
        backend=args.backend,
        quantization=args.quantization,
        device=args.device,
        kv_tokens=args.kv_tokens,
        **said,
    )


def for_another(args: argparse.Namespace, model: str, token: str | None) -> argparse.Namespace:
    """Return the arguments as they are for a model that is named later.

    Adapter, family and token belong to the first model; a server has a machine of its own.

    Args:
        args: of the command line.
        model: as `--model` takes it.
        token: of the model, if that is a server.
    """
    if model == args.model:
        return args
    given = {**vars(args), "model": model, "token": None, "adapter": None, "family": None}
    if "://" in model:
        auto = dict.fromkeys(("backend", "quantization", "device"), "auto")
        given |= {**auto, "token": token, "kv_tokens": None}
    return argparse.Namespace(**given)


def fetch_first(args: argparse.Namespace) -> None:
    """Fetch the model of the arguments where the hub has it. Blocks; Ctrl-C ends it at once."""
    if "://" in (args.model or ""):
        return
    from d2f_runtime.engine.opening import fetch_model

    fetch_model(
        args.model,
        adapter=args.adapter,
        backend=args.backend,
        device=args.device,
        family=args.family,
    )


def default_load() -> Loader:
    """Return the SDK's own loader, imported when it is needed."""
    from d2f_stream.api import load

    return load
