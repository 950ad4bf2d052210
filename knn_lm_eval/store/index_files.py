"""The files of an index beside its datastore: ``NAME.faiss`` with its metadata ``NAME.json``, found and checked.

The JSON says what the index was built from (the checksum of the keys), how (factory string, metric), which
``probe`` was found good enough, and how well it retrieves; see ``search/quality.py`` for the figures.

An index may be in parts, each of a run of entries: its JSON lists them under ``parts``, with ``start``,
``stop`` and ``bytes``, and says under ``part_ids`` whether a part numbers its entries from 0 (``relative``) or as
the store does (``absolute``). Part i lies in ``NAME.00i.faiss``.
"""

from __future__ import annotations

import glob
from collections.abc import Container
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypedDict

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import checksums_of_derived, recorded_checksums
from knn_lm_eval.store.names import check_new_name, check_plain_name
from knn_lm_eval.store.verification import Expected
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.json_schema import Count, Positive, check_json
from knn_lm_eval.system.seals import check_seal

DEFAULT_INDEX = "index"
EXACT = "exact"  # in the place of an index's name: all keys are compared, and no index is needed
MOST_PARTS = 1000  # their numbers have three digits
REMEDY = "fetch it or build the index again"


class _Run(TypedDict):
    start: Count
    stop: Count
    bytes: Count


class _Measured(TypedDict):
    keys_sha256: str
    count: Count


class _Required(TypedDict):
    factory: str
    sim_func: Literal["l2", "dot"]
    keys_sha256: str
    bytes: Count


class IndexJSON(_Required, total=False):
    """What the JSON holds, as far as it is read."""

    probe: Positive | None
    parts: list[_Run]
    part_ids: Literal["relative", "absolute"]
    measured_with: _Measured


@dataclass(frozen=True)
class IndexPart:
    """A file of an index: all of it, or the part that holds a run of entries.

    Attributes
    ----------
    path : the file.
    start, stop : the run.
    first_id : the entry that the file calls 0.
    """

    path: Path
    start: int
    stop: int
    first_id: int


@dataclass(frozen=True)
class IndexFiles:
    """Where the index called ``name`` of a datastore lies; raises UserError where that is no name."""

    folder: Path
    name: str = DEFAULT_INDEX

    def __post_init__(self) -> None:
        check_plain_name(self.name, "an index")

    def check_new(self) -> None:
        """Raise UserError where an index that is to be made cannot have this name."""
        check_new_name(self.name, "an index")
        if self.name.casefold() == EXACT:
            raise UserError(f"{self.name!r} cannot name an index: it stands for search without one; choose another.")

    @property
    def index(self) -> Path:
        return self.folder / f"{self.name}.faiss"

    def laid_out(self) -> list[Path]:
        """The folders of what was made from it; see ``search/laid_out.py``."""
        of_parts = self.folder.glob(f"{glob.escape(self.name)}.[0-9][0-9][0-9].scan")
        return [self.index.with_suffix(".codes"), self.index.with_suffix(".scan"), *of_parts]

    @property
    def metadata(self) -> Path:
        return self.folder / f"{self.name}.json"

    def part(self, number: int) -> Path:
        return self.folder / f"{self.name}.{number:03d}.faiss"


def searched_index(folder: Path, derived: Container[str], name: str | None) -> str | None:
    """The name of the index to search; None where all keys are to be compared.

    Parameters
    ----------
    folder, derived : the datastore's, and what its manifest lists beside its own files.
    name : as asked for; None takes the index called ``index``, or none where the store has no index at all. An index
        called ``exact``, as older stores may have, is taken for that name.
    """
    files = IndexFiles(folder, DEFAULT_INDEX if name is None else name)
    is_there = files.metadata.is_file() or files.index.is_file() or files.part(0).is_file()
    if is_there or files.metadata.name in derived:
        return files.name
    return None if name == EXACT or (name is None and not _index_names(folder)) else files.name


def find_parts(datastore: Datastore, name: str = DEFAULT_INDEX) -> tuple[dict[str, Any], list[IndexPart]]:
    """The metadata and the files of the index ``name``, in order; verifies as ``open_index`` does, but opens none."""
    files = IndexFiles(datastore.path, name)
    if not files.metadata.is_file() or not (files.index.is_file() or files.part(0).is_file()):
        built = index_names(datastore)
        others = f"it has {', '.join(built)}" if built else "build one with build_index"
        raise UserError(
            f"The datastore {datastore.path} has no index called {name!r}: {others}, or compare all keys with "
            f"index={EXACT}."
        )
    metadata = check_seal(files.metadata, read_json(files.metadata), REMEDY)
    check_json(metadata, IndexJSON, files.metadata, REMEDY)
    if metadata["keys_sha256"] != datastore.keys_checksum:
        raise UserError(
            f"The index {files.index} was built for other keys than those in {datastore.path}; build it again."
        )
    runs = metadata.get("parts", [{"start": 0, "stop": len(datastore), "bytes": metadata["bytes"]}])
    paths = [files.part(number) for number in range(len(runs))] if "parts" in metadata else [files.index]
    if "parts" in metadata:
        _check_parts(files.metadata, metadata, len(datastore))
    relative, parts = metadata.get("part_ids") == "relative", []
    for path, run in zip(paths, runs, strict=True):
        if not path.is_file():
            raise UserError(f"The index {files.index} is incomplete: {path.name} is missing; build or import it again.")
        if (actual := path.stat().st_size) != run["bytes"]:
            raise UserError(
                f"The index {path} is damaged: it has {actual} bytes, {files.metadata.name} says "
                f"{run['bytes']}; build it again."
            )
        parts.append(IndexPart(path, run["start"], run["stop"], run["start"] if relative else 0))
    recorded = recorded_checksums(datastore.path)
    of_index = [files.metadata, *(part.path for part in parts)]
    datastore.verification.check(Expected(path, recorded.get(path.name), remedy=REMEDY) for path in of_index)
    return metadata, parts


def _check_parts(file: Path, metadata: dict[str, Any], count: int) -> None:
    """Raise UserError where the parts in an index's JSON are not runs that cover all entries, in order."""
    wrong = "part_ids is missing" if "part_ids" not in metadata else None
    ends = [0, *(run["stop"] for run in metadata["parts"])]
    if [run["start"] for run in metadata["parts"]] != ends[:-1] or any(a > b for a, b in pairwise(ends)):
        wrong = "its parts do not follow one another"
    elif ends[-1] != count:
        wrong = f"its parts end at entry {ends[-1]:,}, and the datastore has {count:,}"
    if wrong:
        raise UserError(f"{file} is damaged: {wrong}; build the index again.")


def index_checksums(datastore: Datastore, name: str = DEFAULT_INDEX) -> dict[str, str]:
    """The SHA-256 of each file of the index ``name`` and of its metadata, by the files' names: what it holds.

    They are the manifest's, whose metadata's must hold; where it has none, as in stores of others, files are read.
    """
    files = IndexFiles(datastore.path, name)
    parts = [part.path.name for part in find_parts(datastore, name)[1]]
    return checksums_of_derived(datastore.path, files.metadata.name, parts)


def index_names(datastore: Datastore) -> list[str]:
    """The names of the finished indexes of ``datastore``."""
    return _index_names(datastore.path)


def _index_names(folder: Path) -> list[str]:
    names = [path.stem for path in folder.glob("*.json")]
    files = [IndexFiles(folder, name) for name in sorted(names)]
    return [f.name for f in files if f.index.is_file() or f.part(0).is_file()]
