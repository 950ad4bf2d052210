"""Changing several files of a datastore at once: none of what it was, or all of what it will be.

What is new is written into a hidden folder in the store's (``.appending``, say) while the store stays as it is. Then a
journal appears, ``.change.json``, which says which file takes which place, and what the manifest will be: from that
moment on the change is made. Whoever reads the manifest and finds a journal, because its writer is at work or died,
first sees to it that all of it is done; every step can be done again.

Keys are not copied for those that are added: these are written behind the others, where nobody who has the file mapped
looks, and only then is the header changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from tqdm import tqdm

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.system.files import disk_errors_in, fsync, read_json, replace_file
from knn_lm_eval.system.json_schema import Count, check_json
from knn_lm_eval.system.locks import DAY, locked
from knn_lm_eval.system.seals import check_seal, write_sealed_json

JOURNAL, JOURNAL_LOCK, STORE_LOCK = ".change.json", ".change.lock", ".changing.lock"
COPIED_BYTES = 2**24  # at a time
REMEDY = "copy or fetch the datastore again"


class TailRecord(TypedDict):
    """Bytes that go behind what a file has, and those that its beginning is changed to.

    Attributes
    ----------
    file : which file.
    source, skip : the file that has the bytes, after so many others.
    at : where they go.
    head : the file's first bytes, hexadecimal.
    """

    file: str
    source: str
    skip: Count
    at: Count
    head: str


class _ChangeJSON(TypedDict):
    waiting: str
    places: dict[str, str]
    tails: list[TailRecord]
    gone: list[str]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """What is done to a store; paths are in its folder, with forward slashes.

    Attributes
    ----------
    waiting : the folder of what is new, which goes when all is done.
    manifest : what the manifest will be.
    places : what each file's place is taken by.
    tails : bytes that are added to files.
    gone : files and folders that go.
    """

    waiting: str
    manifest: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    tails: list[TailRecord] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    def make(self, folder: Path) -> None:
        """Change the store in ``folder``."""
        fsync(folder / self.waiting)
        write_sealed_json(folder / JOURNAL, asdict(self))
        finish_change(folder)

    @classmethod
    def read(cls, folder: Path) -> Change:
        """The change that is under way; raises UserError where its journal is damaged."""
        path = folder / JOURNAL
        content = check_seal(path, read_json(path), REMEDY)
        check_json(content, _ChangeJSON, path, REMEDY)
        change = cls(**{name: content[name] for name in _ChangeJSON.__annotations__})
        of_tails = [name for tail in change.tails for name in (tail["file"], tail["source"])]
        for name in (change.waiting, *change.places, *change.places.values(), *change.gone, *of_tails):
            plain = PurePosixPath(name)
            if plain.is_absolute() or not plain.parts or ".." in plain.parts:
                raise UserError(f"{path} is damaged: it names {shortened(name)}, which is not in the store; {REMEDY}.")
        return change


@contextmanager
def one_change_of(folder: Path) -> Iterator[None]:
    """Hold the store for a change that is prepared: one process at a time; raises UserError where another does."""
    with disk_errors_in(folder), locked(folder / STORE_LOCK, f"the datastore {folder}"):
        yield


def finish_change(folder: Path) -> None:
    """See to it that a change of the store in ``folder`` that is under way is done; nothing where there is none.

    Raises UserError where it was interrupted and the folder cannot be written to.
    """
    if not (folder / JOURNAL).exists():
        return
    try:
        with locked(folder / JOURNAL_LOCK, f"the datastore {folder}", seconds=DAY):
            if (folder / JOURNAL).exists():
                _finish(folder, Change.read(folder))
    except OSError as error:
        raise UserError(
            f"The datastore {folder} is being changed, or that was interrupted, and it cannot be written to here "
            f"({error.strerror or error}); open it once where it can."
        ) from error


def _finish(folder: Path, change: Change) -> None:
    for tail in change.tails:
        if (folder / tail["source"]).exists():
            _add_tail(folder, tail)
    for final, waiting in change.places.items():
        if (folder / waiting).exists():
            replace_file(folder / waiting, folder / final)
    for name in change.gone:
        _remove(folder / name)
    write_sealed_json(folder / "manifest.json", change.manifest)
    _remove(folder / change.waiting)
    (folder / JOURNAL).unlink()
    fsync(folder)


def _add_tail(folder: Path, tail: TailRecord) -> None:
    source = folder / tail["source"]
    with (
        open(source, "rb") as new,
        open(folder / tail["file"], "r+b") as file,
        tqdm(
            total=source.stat().st_size - tail["skip"],
            unit="B",
            unit_scale=True,
            desc=f"Adding to {tail['file']}",
            disable=source.stat().st_size < 2**28,
        ) as bar,
    ):
        new.seek(tail["skip"])
        file.seek(tail["at"])
        while block := new.read(COPIED_BYTES):
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(bytes.fromhex(tail["head"]))
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
