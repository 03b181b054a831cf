"""What holds for all tests: none needs a fast machine, nor another test's logging."""

import gc
import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_sessionstart() -> None:
    gc.disable()  # what is collected, a million objects, is looked through again and again


def pytest_collection_finish() -> None:
    gc.freeze()  # it stays to the end
    gc.enable()


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """Give what the tests of a module begin, processes too, one core.

    ONNX Runtime takes a thread a core, and each spins while it waits: two of them take twice the
    CPU time of one, from the tests that run beside.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a command that ran in this process told the loggers to write, and where."""
    loggers = [logging.getLogger(name) for name in ("d2f_stream", "uvicorn")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
