"""What a test needs from the machine: found, or a reason why the test is skipped."""

import importlib.util
import os
import shutil

import pytest


def require_program(name: str) -> str:
    """Return the program's path; skip the test where it is not installed.

    With D2F_FORBID_SKIPS=1 in the environment the test fails instead.
    """
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=search)
    if found is None:
        missing(f"{name} is not installed")
    assert found is not None
    return found


def missing(reason: str) -> None:
    """Skip the test for that reason, or fail it where skips are forbidden."""
    if os.environ.get("D2F_FORBID_SKIPS") == "1":
        pytest.fail(f"{reason}, and D2F_FORBID_SKIPS=1 forbids to skip")
    pytest.skip(reason)


def require_module(name: str) -> None:
    """Skip the test where a module is not installed; fail it where skips are forbidden."""
    if importlib.util.find_spec(name) is None:
        missing(f"{name} is not installed")


def optional_module(name: str) -> None:
    """Skip the test where a module is not installed that no environment of ours must have."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
