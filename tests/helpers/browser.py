"""A headless Chromium that asks nobody but this machine for anything."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LOCAL = ("http://127.0.0.1:", "file://", "data:", "blob:")


def obstacle(*packages: str) -> str | None:
    """What is missing here for a ``Browser`` and these packages; None where nothing is."""
    if CHROMIUM is None:
        return "needs chromium"
    missing = [name for name in ("playwright", *packages) if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}" if missing else None


class Browser:
    """The browser; it notes what pages complain of, and whom else they ask."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self.complaints: list[str] = []
        self.outside: list[str] = []

    @contextmanager
    def page(self, scheme: str = "light") -> Iterator[Any]:
        """A page of a visitor of its own: playwright's ``Page``."""
        context = self._chromium.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 1000})
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", self._note)
        try:
            yield page
        finally:
            context.close()

    def _note(self, request: Any) -> None:
        if not request.url.startswith(LOCAL):
            self.outside.append(request.url)


@contextmanager
def open_browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
