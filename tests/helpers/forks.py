"""Work in a child process that begins where the tests are, with everything imported, and ends at a chosen moment."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import psutil

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")


@dataclass
class Ended:
    """How a child ended: its exit status (below 0: the signal that killed it), and all that it printed."""

    status: int
    said: str

    @property
    def complaint(self) -> str:
        """The sentence with which it ended; empty where it said none."""
        last = self.said.strip().splitlines()[-1] if self.said.strip() else ""
        return last if last.startswith(("error: ", "interrupted: ")) else ""


class Child:
    """A child process under way.

    Parameters
    ----------
    work : what it does.
    below : the folder whose changes are counted: files that are opened to be written, renamed, removed or made safe
        against power cuts, folders that are made or removed. What an LM reads counts, too.
    at : the change before which it sends itself the signal ``number``; None for none.
    """

    def __init__(
        self, work: Callable[[], object], below: Path, at: int | None = None, number: int = signal.SIGKILL
    ) -> None:
        self._output: IO[bytes] = TemporaryFile()  # noqa: SIM115 (closed when the child has ended)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(work, below, at, number)

    def ended(self) -> Ended:
        """Wait for its end."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._output.seek(0)
        with self._output as output:
            return Ended(status, output.read().decode(errors="replace").replace("\r", "\n"))

    def left(self) -> list[int]:
        """The processes that it began and that go on without it, after a moment for those that are about to end."""
        until = time.monotonic() + 5
        while (going_on := [pid for pid in psutil.pids() if _session(pid) == self.pid]) and time.monotonic() < until:
            time.sleep(0.1)
        return going_on

    def _be(self, work: Callable[[], object], below: Path, at: int | None, number: int) -> None:
        status, at_its_end = 1, list[Callable[[], object]]()
        try:
            os.setsid()
            gc.freeze()  # what the tests have made need not be looked through at each of its collections
            print_to(self._output.fileno(), self._output.fileno())
            # What the tests have begun is theirs: it is neither ended here nor let go, which may end in a crash.
            atexit.register = lambda *call, **more: at_its_end.append(partial(*call, **more)) or call[0]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if at is not None:
                _count(below, at, number)
            status = as_an_interpreter(work)
        finally:
            for function in reversed(at_its_end):
                function()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def print_to(output: int, errors: int) -> None:
    """Have this process print to these file descriptors."""
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def as_an_interpreter(work: Callable[[], object]) -> int:
    """Do ``work``, and say what went wrong as an interpreter would that has begun with it; returns its exit status."""
    sys.excepthook = sys.__excepthook__
    if torch := sys.modules.get("torch"):
        # After a fork torch makes a new pool of threads when one is asked for, but two that ask at once may get none.
        torch.set_num_threads(torch.get_num_threads())
    try:
        work()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except BaseException:
            traceback.print_exc()
        return 1
    return 0


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended
        return None


def _count(below: Path, at: int, number: int) -> None:
    """Send this process the signal before change number ``at``."""
    from knn_lm_eval.lm.reading import Reader

    count, folder = 0, str(below)

    def one() -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)

    def is_below(path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(folder)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES and is_below(path):
                one()
        elif event in CHANGES and (is_below(arguments[0]) or (isinstance(arguments[-1], int) and arguments[-1] >= 0)):
            one()

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            one()
            return original(*arguments, **more)

        return call

    os.fsync = counted(os.fsync)
    Reader.read = counted(Reader.read)  # type: ignore[method-assign]
    sys.addaudithook(heard)


def run_verb(name: str, *arguments: object) -> Callable[[], object]:
    """What a shell's `knn-lm-eval NAME ARGUMENTS` does."""

    def run() -> object:
        sys.argv = [f"knn-lm-eval {name}", *map(str, arguments)]
        return import_module(f"knn_lm_eval.cli.{name}").main()

    return run
