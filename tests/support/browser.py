"""A headless Chromium for the tests: the machine's own, or Debian's package."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, expect, sync_playwright

from support.server_programs import provide, which

__all__ = ["open_page"]

# The smallest package of Chromium, and the font that the style sheets of the examples name.
_PACKAGES = ["chromium-headless-shell", "fonts-dejavu-core"]
_TIMEOUT_MS = 120_000  # on a loaded machine, a slow step is not an error


@functools.cache
def _chromium() -> str:
    """The program. Playwright's own one would be a download from its maker's servers."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    return provide(lambda: which(*names), "Chromium", _PACKAGES, None, "browser")


@contextmanager
def open_page(width: int, height: int) -> Iterator[Page]:
    """Open an empty page in a new browser. At the end the page must have had no error.

    Args:
        width: The width of the page in CSS pixels; a screenshot has twice as many.
        height: The height.

    Raises:
        Unavailable: Chromium is not installed and cannot be.
    """
    program = _chromium()
    expect.set_options(timeout=_TIMEOUT_MS)
    with sync_playwright() as playwright:
        # Without a sandbox, which root cannot have: the pages come from the tests. Playwright passes --no-sandbox.
        browser = playwright.chromium.launch(executable_path=program, timeout=_TIMEOUT_MS, chromium_sandbox=False)
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=2)
            page.set_default_timeout(_TIMEOUT_MS)
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            yield page
            assert not problems
        finally:
            browser.close()
