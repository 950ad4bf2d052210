"""Locks between processes, on one machine or on several that see the same disk: an output has one maker at a time.

A lock is a file that exists while somebody holds it or died holding it; the operating system ends the lock with the
process. Its content says who that is.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knn_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

# Whoever finds an output taken waits a little, for one that is about to be finished, and then says so.
WAIT_SECONDS = 30.0
DAY = 86400.0


@contextmanager
def locked(path: Path, what: str, seconds: float | None = None) -> Iterator[bool]:
    """Hold the lock ``path``; where another process does, wait for it, and say so.

    Parameters
    ----------
    path : the lock's file, in a folder that exists.
    what : what is held, for messages: the output.
    seconds : how long to wait; None is ``WAIT_SECONDS``.

    Yields
    ------
    Whether a process died holding it: what lies unfinished under the output's hidden names is then of this program.

    Raises
    ------
    UserError
        Where the other process still holds it then.
    """
    from filelock import FileLock, Timeout  # a tenth of a second, which commands that only read need not wait

    seconds = WAIT_SECONDS if seconds is None else seconds
    lock = FileLock(path)
    holder, before = _holder(path), _identity(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Waiting for %s: %s is at work on it.", what, holder)
        try:
            lock.acquire(timeout=seconds)
        except Timeout as error:
            raise UserError(
                f"{holder[0].upper()}{holder[1:]} is at work on {what}, and was not done within {seconds:g} seconds; "
                f"wait for it to end, or end it, and run again."
            ) from error
    try:
        is_left = before is not None and _identity(path) == before  # who ends in order takes the file away
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield is_left
    finally:
        # While it is held: whoever waits sees that the file that it opened has no name any more, and tries again.
        path.unlink(missing_ok=True)
        lock.release()


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _holder(path: Path) -> str:
    """Who holds or held the lock, as far as its file says."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
