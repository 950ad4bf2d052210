"""Compiling functions with numba: kept between runs where there is a place for that, and without one all the same."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """numba's ``njit`` as a decorator, with what is compiled kept on disk: beside the package, in the user's cache or,
    where neither can be written to (a container's read-only package and no home), among the temporary files.

    Parameters
    ----------
    options : further ones of ``njit``.
    """
    if function is None:
        return functools.partial(compiled, **options)
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    _use_temporary_cache()
    # With a cache of its own numba finds a place; without, it compiles in every run.
    return numba.njit(cache=bool(numba.config.CACHE_DIR), **options)(function)


@functools.cache
def _use_temporary_cache() -> None:
    """Have numba keep what it compiles among the temporary files, in a folder of this user's alone; says so."""
    folder = Path(tempfile.gettempdir()) / f"knn_lm_eval-numba-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Loading what lies there runs it: nobody else may have put it there.
        usable = found.st_uid == os.getuid() and found.st_mode & 0o7777 == 0o700 and folder.is_dir()
    except OSError:
        usable = False
    usable = usable and not folder.is_symlink() and os.access(folder, os.W_OK)
    where = f"in {folder}" if usable else "nowhere, and compiles in every run"
    logger.warning(
        "numba can write neither beside the package nor to a home: what it compiles it keeps %s; set NUMBA_CACHE_DIR "
        "to a folder that lasts.",
        where,
    )
    numba.config.CACHE_DIR = str(folder) if usable else ""
