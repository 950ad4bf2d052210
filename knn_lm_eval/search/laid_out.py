"""Files that are made from an index once and then mapped: beside it or, where that is read-only, in the user's cache.

Each kind lies in a folder ``INDEX.KIND`` whose ``KIND.json`` says what the files were made from, and their checksums.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from knn_lm_eval.store.datastore import Datastore, open_array
from knn_lm_eval.store.index_files import IndexFiles, index_checksums
from knn_lm_eval.store.verification import Expected, Limits
from knn_lm_eval.system.file_contents import examine
from knn_lm_eval.system.files import cache_root, disk_errors_in, read_json, unfinished_folder
from knn_lm_eval.system.json_schema import check_json
from knn_lm_eval.system.locks import DAY, locked
from knn_lm_eval.system.seals import check_seal, write_sealed_json

logger = logging.getLogger(__name__)

NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class LaidOutJSON(TypedDict, total=False):
    """What the JSON holds beside what the files are of."""

    files: dict[str, str]  # their checksums


@dataclass(frozen=True)
class LaidOut:
    """Files made from the index ``name`` of a datastore.

    Attributes
    ----------
    kind : a word, the ending of the folder's name: ``codes`` or ``scan``.
    what : the files in words, such as "RetoMaton's codes".
    part : the number of the index's part that they are made from; None is all of it.
    """

    datastore: Datastore
    name: str
    kind: str
    what: str
    part: int | None = None

    def find(self) -> Path | None:
        """The folder that is there; None where there is none, or of another index only."""
        identity = self._identity()
        return next((folder for folder in self._places(identity) if self._is_of(folder, identity)), None)

    def folder(self, write: Callable[[Path], None], arrays: Iterable[str]) -> Path:
        """The folder; where there is none ``write`` fills it, unless another process just did: one does it, and the
        others wait.

        Parameters
        ----------
        write : given a folder, writes ``ARRAY.npy`` for each of ``arrays``.
        """
        if (found := self.find()) is not None:
            return found
        identity, arrays = self._identity(), list(arrays)
        beside, cached = self._places(identity)
        with disk_errors_in(beside):
            try:
                return self._make(beside, identity, write, arrays)
            except OSError as error:
                if error.errno not in NOT_WRITABLE:
                    raise
        logger.warning("%s cannot be written to: %s of its index go to %s.", self.datastore.path, self.what, cached)
        with disk_errors_in(cached):
            cached.parent.mkdir(parents=True, exist_ok=True)
            return self._make(cached, identity, write, arrays)

    def arrays(
        self,
        folder: Path,
        dtypes: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        limits: Mapping[str, Limits] | None = None,
    ) -> dict[str, np.ndarray]:
        """Map the arrays of a folder; raises UserError where one is damaged, or not of its dtype and shape."""
        shapes, limits = shapes or {}, limits or {}
        arrays = {
            array: open_array(folder / f"{array}.npy", dtype, shapes.get(array)) for array, dtype in dtypes.items()
        }
        recorded = read_json(folder / f"{self.kind}.json").get("files", {})
        self.datastore.verification.check(
            Expected(
                folder / f"{array}.npy",
                recorded.get(f"{array}.npy"),
                limits.get(array, Limits()),
                remedy=_remedy(folder),
            )
            for array in dtypes
        )
        return arrays

    def _make(self, folder: Path, identity: dict[str, Any], write: Callable[[Path], None], arrays: list[str]) -> Path:
        lock = folder.with_name(f".{folder.name}.lock")
        with locked(lock, f"the {self.kind} {folder}", seconds=DAY) as is_left:
            if not self._is_of(folder, identity):
                with unfinished_folder(folder, is_left) as unfinished:
                    write(unfinished)
                    files = {f"{array}.npy": examine(unfinished / f"{array}.npy").sha256 for array in arrays}
                    write_sealed_json(unfinished / f"{self.kind}.json", identity | {"files": files})
        return folder

    def _identity(self) -> dict[str, Any]:
        """What the files are made from."""
        checksums = index_checksums(self.datastore, self.name)
        return {"keys_sha256": self.datastore.keys_checksum, "index_files": checksums}

    def _places(self, identity: dict[str, Any]) -> tuple[Path, Path]:
        """The folders where the files may lie: beside the index and, where that cannot be written to, in the cache."""
        files = IndexFiles(self.datastore.path, self.name)
        index = files.index if self.part is None else files.part(self.part)
        said = json.dumps([str(index.resolve()), identity], sort_keys=True)
        cached = f"{index.stem}-{hashlib.sha256(said.encode()).hexdigest()[:24]}"
        return index.with_suffix(f".{self.kind}"), cache_root() / self.kind / cached

    def _is_of(self, folder: Path, identity: dict[str, Any]) -> bool:
        file = folder / f"{self.kind}.json"
        if not file.is_file():
            return False
        said = check_seal(file, read_json(file), _remedy(folder))
        check_json(said, LaidOutJSON, file, _remedy(folder))
        return {name: value for name, value in said.items() if name != "files"} == identity


def _remedy(folder: Path) -> str:
    return f"delete the folder {folder}, which is made again when it is needed"
