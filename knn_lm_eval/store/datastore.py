"""The datastore on disk: what the folder holds, and opening it.

A datastore is a folder with

- ``keys.npy``: float16 ``[count, dimension]``, the hidden state before each token, in text order;
- ``values.npy``: int32 ``[count]``, the token itself, so the values are the tokenized text;
- ``document_starts.npy``: int64 ``[documents]``, the entry at which each document begins, ascending;
- ``removed.npy``, where documents were removed: int64, their numbers, ascending. Their entries are still in the other
  files, and do not count;
- where the keys are a projection of the hidden states, ``projection.npy``: float32 ``[width, dimension]``, what each
  hidden state was multiplied by; ``projection`` in the manifest says the width, as ``from``;
- ``manifest.json``: what made it (model, windows, source), sizes and checksums of the files above.

Entry i's successor in its document is entry i + 1. The manifest is written last: a folder without one is not
a datastore. Indexes (``*.faiss``, each with a ``*.json`` beside it) lie in the same folder.

A store that was imported may differ in three ways, which its manifest states:

- its keys are a raw array without a header, ``keys.raw``, of the dtype that ``keys`` says:
  ``{"file": "keys.raw", "dtype": "float16"}`` (or float32), in C order ``[count, dimension]``;
- it has no keys: ``keys`` is null. An index still finds neighbours, by its own distances;
- it has ``weights.npy``, int32 ``[count]``: entry i stands for so many entries that were merged. Such a store is
  in no text order.

A store that was pruned has a part of another's entries, so its manifest says ``"text_order": false``, and under
``pruned_from`` what it was made from and how. It may have weights. Its entries are in the order of the other's, but
nothing follows from that: it counts as one document.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knn_lm_eval.errors import UserError, counted
from knn_lm_eval.store.change import JOURNAL
from knn_lm_eval.store.manifest import DOCUMENT_STARTS, PROJECTION, REMOVED, VALUES, WEIGHTS, FileRecord, Manifest
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.store.verification import Expected, Limits, Verification
from knn_lm_eval.system.arrays import map_npy


@dataclass(frozen=True)
class Datastore:
    """An opened datastore; its arrays are memory-mapped and read-only.

    Attributes
    ----------
    path : the folder.
    manifest : the content of ``manifest.json``.
    keys : float16 (float32 where imported so) ``[count, dimension]``; None where the store has none. What cannot
        do without them takes them by ``require_keys``.
    values : int32 ``[count]``.
    document_starts : int64 ``[documents]``.
    weights : int32 ``[count]``, how many entries each stands for; None for one each.
    removed : the entries that do not count, of documents that were removed; None where all count.
    projection : float32 ``[width, dimension]``, what the LM's hidden states were multiplied by to become the keys;
        None where they are the keys.
    verification : how its files, and what is opened beside it (indexes, clusters), are verified, and what was.
    """

    path: Path
    manifest: Manifest
    keys: np.ndarray | None
    values: np.ndarray
    document_starts: np.ndarray
    weights: np.ndarray | None = None
    removed: Removed | None = None
    projection: np.ndarray | None = None
    verification: Verification = field(default_factory=Verification, compare=False)

    @classmethod
    def open(cls, path: str | Path, verify: str = "auto") -> Datastore:
        """Open the datastore in the folder ``path`` and check its files against the manifest.

        Parameters
        ----------
        verify : whether the files are read for it: ``auto`` reads what was not verified before, or changed since;
            ``always`` reads all, ``never`` none.

        Raises
        ------
        UserError
            Where there is no datastore, a dump was not finished, or a file is missing, cut or not what the
            manifest says.
        """
        path = Path(path)
        while True:
            manifest = Manifest.read(path)
            try:
                return cls._open(path, manifest, verify)
            except UserError:
                # It may just have been changed by another process, so that some files are of before and some of after.
                if not (path / JOURNAL).exists() and Manifest.read(path) == manifest:
                    raise

    @classmethod
    def _open(cls, path: Path, manifest: Manifest, verify: str) -> Datastore:
        """Open the store of this manifest."""
        verification = Verification(verify)
        for name in manifest.files:
            check_size(path, name, manifest.files)
        count, keys = manifest.count, None
        documents = None if manifest.documents is None else (manifest.documents,)
        if manifest.keys is not None:
            opened = _open_raw if manifest.keys.is_raw else open_array
            keys = opened(path / manifest.keys.file, np.dtype(manifest.keys.dtype), (count, manifest.dimension))
        starts = open_array(path / DOCUMENT_STARTS, np.int64, documents)
        opened_store = cls(
            path=path,
            manifest=manifest,
            keys=keys,
            values=open_array(path / VALUES, np.int32, (count,)),
            document_starts=starts,
            weights=open_array(path / WEIGHTS, np.int32, (count,)) if WEIGHTS in manifest.files else None,
            projection=_open_projection(path, manifest),
            verification=verification,
        )
        verification.check(own_files(path, manifest))
        if REMOVED in manifest.files:
            numbers = open_array(path / REMOVED, np.int64, None)
            if numbers.ndim != 1 or (len(numbers) and not 0 <= numbers[0] <= numbers[-1] < len(starts)):
                raise UserError(
                    f"{path / REMOVED} is damaged: it names documents that the store has not; copy it again."
                )
            opened_store = replace(opened_store, removed=Removed.of_documents(np.unique(numbers), starts, count))
        return opened_store

    def __len__(self) -> int:
        """The number of entries."""
        return len(self.values)

    @property
    def kept(self) -> int:
        """The number of entries that count: those that are not of removed documents."""
        return len(self) if self.removed is None else self.removed.kept

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.path.resolve().name

    @property
    def label(self) -> str:
        """What messages call it: its folder."""
        return str(self.path)

    def place(self, entry: int) -> Place:
        """Where an entry is."""
        document = None
        if self.in_text_order:
            document = int(np.searchsorted(self.document_starts, entry, side="right")) - 1
        return Place(self, self.name, entry, document)

    @property
    def dimension(self) -> int:
        """The width of a key."""
        return self.manifest.dimension

    @property
    def keys_checksum(self) -> str:
        """What names the keys for indexes built from them; see ``Manifest.keys_checksum``."""
        return self.manifest.keys_checksum

    @property
    def in_text_order(self) -> bool:
        """Whether the values are the text: none was merged or left out."""
        return self.weights is None and self.manifest.text_order

    def require_keys(self, purpose: str) -> np.ndarray:
        """The keys; raises UserError where the store has none, which ``purpose`` needs."""
        if self.keys is None:
            is_imported = "imported" in self.manifest.source
            remedy = "import it with its keys" if is_imported else "dump it again, without --keys none"
            raise UserError(f"The datastore {self.path} has no keys, which {purpose} needs; {remedy}.")
        return self.keys

    def require_all(self, purpose: str) -> None:
        """Raise UserError where documents were removed and are still in the files, which ``purpose`` would read."""
        if self.removed is not None:
            removed = counted(len(self.removed.documents), "removed document")
            raise UserError(
                f"The datastore {self.path} has {removed}, and {purpose} would take in what they have: take it out of "
                f"its files first, with compact_datastore."
            )

    def require_text_order(self, purpose: str) -> None:
        """Raise UserError where entry i + 1 is not what followed entry i, which ``purpose`` needs."""
        if not self.in_text_order:
            raise UserError(
                f"The datastore {self.path} is in no text order, since entries were merged or left out, and "
                f"{purpose} needs it; use the store that it was made from."
            )


class Place(NamedTuple):
    """Where an entry is.

    Attributes
    ----------
    store, name : the datastore, and what it is called among several.
    entry : the entry's number in it.
    document : the document's number in it; None where the store is in no text order.
    """

    store: Datastore
    name: str
    entry: int
    document: int | None


def own_files(path: Path, manifest: Manifest) -> list[Expected]:
    """The store's own files, and what is to be in them; raises UserError where the manifest says what cannot be."""
    limits = {
        VALUES: Limits(0, manifest.model.get("vocabulary")),
        DOCUMENT_STARTS: Limits(0, manifest.count, ascending=True),
        WEIGHTS: Limits(1),
        REMOVED: Limits(0, manifest.documents, ascending=True),
        PROJECTION: Limits(),
    }
    raw_dtype = None
    if manifest.keys is not None:
        limits[manifest.keys.file] = Limits()
        raw_dtype = np.dtype(manifest.keys.dtype) if manifest.keys.is_raw else None
    return [
        Expected(
            path / name,
            record.get("sha256"),
            limits.get(name),
            raw_dtype if manifest.keys is not None and name == manifest.keys.file else None,
            "fetch, copy or dump it again",
        )
        for name, record in manifest.files.items()
    ]


def check_size(path: Path, name: str, files: dict[str, FileRecord]) -> None:
    """Raise UserError where a recorded file of the store is missing or of another size than its manifest says."""
    if not (path / name).is_file():
        gone = f" (it is a link to {(path / name).readlink()})" if (path / name).is_symlink() else ""
        raise UserError(f"The datastore {path} is incomplete: {name}{gone} is missing.")
    if (actual := (path / name).stat().st_size) != int(files[name]["bytes"]):
        raise UserError(
            f"The datastore {path} is damaged: {name} has {actual} bytes, the manifest says {files[name]['bytes']}; "
            f"copy or dump it again."
        )


def open_array(path: Path, dtype: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """Memory-map a .npy file, read-only; raises UserError where it is not of this dtype and (unless None) shape."""
    array = map_npy(path)
    if array.dtype != dtype or (shape is not None and array.shape != shape) or not array.flags.c_contiguous:
        raise UserError(
            f"{path} is not what the manifest says: it holds {array.dtype} {list(array.shape)}, "
            f"expected {np.dtype(dtype)} {list(shape or array.shape)}."
        )
    return array


def _open_projection(path: Path, manifest: Manifest) -> np.ndarray | None:
    if manifest.projection is None:
        return None
    return open_array(path / PROJECTION, np.float32, (manifest.width, manifest.dimension))


def _open_raw(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    needed = shape[0] * shape[1] * dtype.itemsize
    if not path.is_file() or (actual := path.stat().st_size) != needed:
        have = f"it has {actual} bytes" if path.is_file() else "it is missing"
        raise UserError(
            f"{path} is not what the manifest says: {have}, {dtype} {list(shape)} takes {needed}; import it again."
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
