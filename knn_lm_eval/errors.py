"""Errors that the user can mend: one clear sentence instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

NO_RESULTS = "no results were written; start again."
ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class UserError(ValueError):
    """Something the user gave is wrong. The message says what, where, and what to do about it."""


class _Hook:
    def __init__(self, previous: ExceptHook, kept: str) -> None:
        self.previous, self.kept = previous, kept

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        elif issubclass(kind, KeyboardInterrupt):
            say_interrupted(self.kept)
        else:
            self.previous(kind, error, trace)


def report_user_errors(kept: str | None = None) -> None:
    """Let an uncaught UserError end the program with its message alone (and exit status 1, as ever), and Ctrl-C and
    SIGTERM with one sentence, which says what is ``kept`` and how to go on (and with exit status 130 and 143).

    Where that is None it stays as it is: a verb has said it, and then makes an LM."""
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook, kept or NO_RESULTS)
    elif kept is not None:
        sys.excepthook.kept = kept
    alone = threading.current_thread() is threading.main_thread()
    if alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def say_interrupted(kept: str) -> None:
    """Say once for all processes of a launch that this was interrupted."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\ninterrupted: {kept}", file=sys.stderr)


def _end(signal_number: int, frame: FrameType | None) -> None:
    """On SIGTERM: leave all that is begun in order, as on any error, and end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if isinstance(sys.excepthook, _Hook):
        say_interrupted(sys.excepthook.kept)
    raise SystemExit(128 + signal_number)
