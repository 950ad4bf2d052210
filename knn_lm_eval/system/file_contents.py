"""What is in a file, read once: its SHA-256 and, of an array, between which bounds its numbers lie.

A register in the user's cache folder remembers it by the file's identity (device, inode, size, time of its last
change), so that a file is not read again before it changes. It has a small file per device and inode, says nothing of
folders, and may be deleted at any time; where it cannot be written to, files are read each time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from knn_lm_eval.system.files import cache_root

logger = logging.getLogger(__name__)

BLOCK = 2**22  # bytes; whole numbers of any dtype
# Within a tick of the file system's clock a file may change and keep its time.
TICK = 50_000_000  # nanoseconds
WORTH_A_BAR = 2**28  # bytes
MAGIC = b"\x93NUMPY"

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class Numbers:
    """Between which bounds the numbers of an array lie.

    Attributes
    ----------
    least, most : of integers; None of floating-point numbers, and of no numbers at all.
    ascending : whether no integer is smaller than the one before it.
    finite : whether none is NaN or infinite.
    """

    least: int | None = None
    most: int | None = None
    ascending: bool = True
    finite: bool = True


@dataclass(frozen=True)
class Contents:
    """What is in a file.

    Attributes
    ----------
    sha256 : of all of it.
    numbers : of an array; None of other files.
    tried : whether a program that may die of it has read it.
    """

    sha256: str
    numbers: Numbers | None = None
    tried: bool = False


class _Bounds:
    """Gathers ``Numbers`` block by block."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype, self.found = dtype, Numbers()
        self._last: np.integer[Any] | None = None

    def add(self, data: bytes) -> None:
        block, found = np.frombuffer(data, dtype=self.dtype, count=len(data) // self.dtype.itemsize), self.found
        if not len(block):
            return
        if self.dtype.kind == "f":
            self.found = replace(found, finite=found.finite and _all_finite(block))
            return
        least, most = int(block.min()), int(block.max())
        ascending = found.ascending and (self._last is None or self._last <= block[0])
        ascending = bool(ascending) and not (block[1:] < block[:-1]).any()
        self._last = block[-1]
        self.found = replace(
            found,
            least=least if found.least is None else min(found.least, least),
            most=most if found.most is None else max(found.most, most),
            ascending=bool(ascending),
        )


def _all_finite(block: np.ndarray) -> bool:
    if block.dtype != np.float16:
        return bool(np.isfinite(block).all())
    # numpy has no half precision of its own; such a number is not finite where all bits of its exponent are set.
    return not ((block.view(np.uint16) & np.uint16(0x7C00)) == 0x7C00).any()


def examine(path: Path, raw_dtype: np.dtype | None = None, advance: Advance | None = None) -> Contents:
    """Read all of a file, whatever is known of it, and note what is in it.

    Parameters
    ----------
    raw_dtype : of the numbers of an array without a header.
    advance : is told each block's bytes; None shows a bar of its own for a large file.
    """
    digest, before = hashlib.sha256(), _identity(path)
    with (
        open(path, "rb") as file,
        tqdm(
            total=before["size"],
            unit="B",
            unit_scale=True,
            desc=f"Checksum of {path.name}",
            disable=advance is not None or before["size"] < WORTH_A_BAR,
        ) as bar,
    ):
        dtype, begin = (raw_dtype, 0) if raw_dtype is not None else _read_header(file)
        bounds = None if dtype is None else _Bounds(dtype)
        file.seek(0)
        digest.update(file.read(begin))
        while data := file.read(BLOCK):
            digest.update(data)
            if bounds is not None:
                bounds.add(data)
            (advance or bar.update)(len(data))
    contents = Contents(digest.hexdigest(), None if bounds is None else bounds.found)
    if _identity(path) == before:
        _note(before, contents)
    return contents


def examine_joined(head: bytes, pieces: Sequence[tuple[Path, int]], dtype: np.dtype, name: str) -> Contents:
    """What will be in a .npy file of numbers that are still in several.

    Parameters
    ----------
    head : its header.
    pieces : the files that have its numbers, in order, each with how many bytes there are before them.
    name : what it will be called, for the bar.
    """
    digest, bounds = hashlib.sha256(head), _Bounds(dtype)
    size = sum(path.stat().st_size - skip for path, skip in pieces)
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"Checksum of {name}", disable=size < WORTH_A_BAR) as bar:
        for path, skip in pieces:
            with open(path, "rb") as file:
                file.seek(skip)
                while data := file.read(BLOCK):
                    digest.update(data)
                    bounds.add(data)
                    bar.update(len(data))
    return Contents(digest.hexdigest(), bounds.found)


def note_contents(path: Path, contents: Contents) -> None:
    """Note what is in a file that was written just now, so that it is not read again for that."""
    time.sleep(max(0, TICK - abs(time.time_ns() - path.stat().st_mtime_ns)) / 1e9)
    _note(_identity(path), contents)


def known(path: Path) -> Contents | None:
    """What the register says is in the file; None where it does not know the file as it is now."""
    identity = _identity(path)
    try:
        noted = json.loads(_place(identity).read_bytes())
        if noted["size"] != identity["size"] or noted["changed"] != identity["changed"]:
            return None
        numbers = noted["numbers"]
        return Contents(str(noted["sha256"]), None if numbers is None else Numbers(**numbers), bool(noted["tried"]))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):  # RuntimeError: too deep, or there is no home
        return None


def contents_of(path: Path, raw_dtype: np.dtype | None = None) -> Contents:
    """What is in the file, which is read only where the register does not know it."""
    return known(path) or examine(path, raw_dtype)


def note_tried(path: Path, contents: Contents) -> None:
    """Note that a program that may die of it has read the file, whose contents these are."""
    _note(_identity(path), replace(contents, tried=True))


def _read_header(file: BinaryIO) -> tuple[np.dtype | None, int]:
    """The dtype of a .npy file's numbers, and where they begin; None and 0 for other files."""
    if file.read(len(MAGIC)) != MAGIC:
        return None, 0
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, dtype = read(file)
    except (ValueError, EOFError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError):
        return None, 0
    return (dtype, file.tell()) if dtype.kind in "iuf" and BLOCK % dtype.itemsize == 0 else (None, 0)


def _identity(path: Path) -> dict[str, int]:
    status = os.stat(path)
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "size": status.st_size,
        "changed": status.st_mtime_ns,
    }


def register() -> Path:
    """The register's folder."""
    return cache_root() / "verified"


def _place(identity: dict[str, int]) -> Path:
    return register() / f"{identity['device']:x}-{identity['inode']:x}.json"


def _note(identity: dict[str, int], contents: Contents) -> None:
    if abs(time.time_ns() - identity["changed"]) < TICK:
        return
    said = {name: identity[name] for name in ("size", "changed")} | asdict(contents)
    try:
        place = _place(identity)
        temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(said), encoding="utf-8")
        os.replace(temporary, place)  # whole or not at all; what a power cut takes is read again
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _warn(str(error))


@functools.cache
def _warn(reason: str) -> None:
    """Say once that the register cannot be written to."""
    logger.warning("Which files were verified cannot be noted (%s): each opening reads them again.", reason)
