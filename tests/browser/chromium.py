"""What the browser tests need from Playwright and axe; who imports this is skipped without them.

With D2F_FORBID_SKIPS=1 in the environment it fails instead.
"""

import os

import pytest

try:
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
    from playwright.sync_api import (
        Browser,
        BrowserContext,
        ConsoleMessage,
        Page,
        Request,
        ViewportSize,
        WebSocket,
        expect,
        sync_playwright,
    )
except ModuleNotFoundError as error:
    if os.environ.get("D2F_FORBID_SKIPS") == "1":
        raise
    pytest.skip(f"the Python package {error.name} is not installed", allow_module_level=True)

TIMEOUT_MS = 20_000  # a guard against hanging; nothing waits for it to pass

expect.set_options(timeout=TIMEOUT_MS)

__all__ = [
    "TIMEOUT_MS",
    "Axe",
    "Browser",
    "BrowserContext",
    "ConsoleMessage",
    "Page",
    "Request",
    "ViewportSize",
    "WebSocket",
    "expect",
    "sync_playwright",
]
