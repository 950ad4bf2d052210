"""Errors that the user can mend: one clear sentence instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class UserError(ValueError):
    """Something the user gave is wrong. The message says what, where, and what to do about it."""


class _Hook:
    def __init__(self, previous: ExceptHook) -> None:
        self.previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            self.previous(kind, error, trace)


def report_user_errors() -> None:
    """Let an uncaught UserError end the program with its message alone (and exit status 1, as ever)."""
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)
