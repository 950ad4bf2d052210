"""Verifying a store's files as they are opened: their checksums, and that their numbers name what exists.

A file that was verified before and did not change is not read again (``knn_lm_eval.system.file_contents``). Compiled
code and faiss follow numbers unseen, so what lets them is decided here, once per file.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.file_contents import WORTH_A_BAR, Advance, Contents, examine, known, register
from knn_lm_eval.system.locks import DAY, locked

MODES = ("auto", "always", "never")
NOW, BEFORE, NO_CHECKSUM, NOT_VERIFIED = "sha256 now", "sha256 before", "no checksum", "not verified"


class Limits(NamedTuple):
    """What an array's numbers may be; floating-point numbers must be finite in any case.

    Attributes
    ----------
    least, beyond : the smallest integer, and that above the largest; None for no such limit.
    ascending : whether none may be smaller than the one before it.
    """

    least: int | None = None
    beyond: int | None = None
    ascending: bool = False


class Expected(NamedTuple):
    """A file, and what is to be in it.

    Attributes
    ----------
    path : the file.
    sha256 : its checksum; None where there is none.
    limits : of an array; None for other files.
    raw_dtype : of an array without a header.
    remedy : what to do where it is damaged.
    """

    path: Path
    sha256: str | None
    limits: Limits | None = None
    raw_dtype: np.dtype | None = None
    remedy: str = "fetch it, or make it, again"

    def fault(self, contents: Contents) -> str | None:
        """What is wrong with what is in it, in one sentence; None where nothing is."""
        if self.sha256 is not None and contents.sha256 != self.sha256:
            return f"{self.path} is damaged: its SHA-256 is not the one that was recorded for it; {self.remedy}."
        if self.limits is None:
            return None
        numbers, limits = contents.numbers, self.limits
        if numbers is None:
            return f"{self.path} is damaged: it is not an array of numbers; {self.remedy}."
        least, most = numbers.least or 0, numbers.most or 0
        if not numbers.finite:
            return f"{self.path} is damaged: it has numbers that are NaN or infinite; {self.remedy}."
        if numbers.least is not None and (
            (limits.least is not None and least < limits.least) or (limits.beyond is not None and most >= limits.beyond)
        ):
            allowed = f"at least {limits.least}" + ("" if limits.beyond is None else f" and below {limits.beyond:,}")
            return (
                f"{self.path} is damaged: it has numbers from {least:,} to {most:,}, and they name what exists only "
                f"where they are {allowed}; {self.remedy}."
            )
        if limits.ascending and not numbers.ascending:
            return f"{self.path} is damaged: its numbers are not ascending; {self.remedy}."
        return None


class Finding(NamedTuple):
    """What came of verifying a file: how it was done, and what is wrong with it, if anything is."""

    file: Expected
    how: str
    fault: str | None


class Verification:
    """How the files of a store are verified, and what was.

    Parameters
    ----------
    mode : ``auto`` reads a file unless it was verified before and did not change, ``always`` reads it, ``never``
        reads none.

    Attributes
    ----------
    found : how each file was verified, by its path.

    Raises
    ------
    UserError
        Where ``mode`` is unknown.
    """

    def __init__(self, mode: str = "auto") -> None:
        if mode not in MODES:
            raise UserError(f"verify={mode!r} is unknown; use {', '.join(MODES[:-1])} or {MODES[-1]}.")
        self.mode, self.found = mode, dict[Path, str]()

    def check(self, files: Iterable[Expected]) -> None:
        """Verify files, each of which ``always`` reads once; raises UserError where one is not as expected."""
        files = list(files)
        if self.mode == "never":
            self.found |= {file.path: NOT_VERIFIED for file in files}
            return
        again = {file.path for file in files if self.mode == "always" and file.path not in self.found}
        for finding in verify_files(files, again):
            if finding.fault is not None:
                raise UserError(finding.fault)
            if self.found.get(finding.file.path) != NOW:
                self.found[finding.file.path] = finding.how

    def of_files(self, folder: Path) -> dict[str, str]:
        """How each file was verified, by its path in ``folder`` where it lies in it."""
        return {
            (path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)): how
            for path, how in self.found.items()
        }


def verify_files(files: Sequence[Expected], again: Container[Path] = ()) -> list[Finding]:
    """Verify files that exist, with one bar for all.

    Parameters
    ----------
    again : those that are read though they were verified before.
    """
    contents = {file: None if file.path in again else _enough(file) for file in files}
    unknown = [file for file, known_contents in contents.items() if known_contents is None]
    size = sum(file.path.stat().st_size for file in unknown)
    with _alone(size), _bar(size) as advance:
        for file in unknown:
            if file.path not in again:  # another process may have read it while this one waited
                contents[file] = _enough(file)
            contents[file] = contents[file] or examine(file.path, file.raw_dtype, advance)
    findings = []
    for file in files:
        found = contents[file]
        assert found is not None
        how = NO_CHECKSUM if file.sha256 is None else NOW if file in unknown else BEFORE
        findings.append(Finding(file, how, file.fault(found)))
    return findings


def _enough(file: Expected) -> Contents | None:
    """What the register knows of a file, if that is all that is to be known."""
    contents = known(file.path)
    return None if contents is None or (file.limits is not None and contents.numbers is None) else contents


@contextmanager
def _bar(size: int) -> Iterator[Advance]:
    with tqdm(total=size, unit="B", unit_scale=True, desc="Verifying the datastore", disable=size < WORTH_A_BAR) as bar:
        yield bar.update


@contextmanager
def _alone(size: int) -> Iterator[None]:
    """Of several processes that would all read the same files for the first time, one does it and the others wait."""
    held: AbstractContextManager[object] = nullcontext()
    if size >= WORTH_A_BAR:
        try:
            register().mkdir(parents=True, exist_ok=True)
            held = locked(register() / ".lock", "the register of verified files", seconds=DAY)
        except (OSError, RuntimeError):  # each for itself then
            pass
    with held:
        yield
