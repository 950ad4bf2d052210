"""The datastore on disk: what the folder holds, and opening it.

A datastore is a folder with

- ``keys.npy``: float16 ``[count, dimension]``, the hidden state before each token, in text order;
- ``values.npy``: int32 ``[count]``, the token itself, so the values are the tokenized text;
- ``document_starts.npy``: int64 ``[documents]``, the entry at which each document begins, ascending;
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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.files import read_json, sha256, write_json

FORMAT = "knn_lm_eval datastore"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
RAW_DTYPES = {"float16": np.float16, "float32": np.float32}


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
    """

    path: Path
    manifest: dict[str, Any]
    keys: np.ndarray | None
    values: np.ndarray
    document_starts: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | Path) -> Datastore:
        """Open the datastore in the folder ``path`` and check its files against the manifest.

        Raises
        ------
        UserError
            Where there is no datastore, a dump was not finished, or a file is missing, cut or not what the
            manifest says.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            count, dimension, files = int(manifest["count"]), int(manifest["dimension"]), manifest["files"]
            sizes = {name: int(files[name]["bytes"]) for name in files}
            raw = manifest.get("keys", {})
            raw_file = (str(raw["file"]), np.dtype(RAW_DTYPES[raw["dtype"]])) if raw else None
            if raw_file and raw_file[0] not in files:
                raise KeyError(raw_file[0])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / MANIFEST} is damaged: {error!r} is missing or malformed.") from error
        for name, size in sizes.items():
            if not (path / name).is_file():
                gone = f" (it is a link to {(path / name).readlink()})" if (path / name).is_symlink() else ""
                raise UserError(f"The datastore {path} is incomplete: {name}{gone} is missing.")
            if (actual := (path / name).stat().st_size) != size:
                raise UserError(
                    f"The datastore {path} is damaged: {name} has {actual} bytes, the manifest says {size}; "
                    f"copy or dump it again."
                )
        keys: np.ndarray | None = None
        if raw_file is not None:
            keys = _open_raw(path / raw_file[0], raw_file[1], (count, dimension))
        elif raw is not None:
            keys = open_array(path / "keys.npy", np.float16, (count, dimension))
        return cls(
            path=path,
            manifest=manifest,
            keys=keys,
            values=open_array(path / "values.npy", np.int32, (count,)),
            document_starts=open_array(path / "document_starts.npy", np.int64, None),
            weights=open_array(path / "weights.npy", np.int32, (count,)) if "weights.npy" in files else None,
        )

    def __len__(self) -> int:
        """The number of entries."""
        return len(self.values)

    @property
    def dimension(self) -> int:
        """The width of a key."""
        return int(self.manifest["dimension"])

    @property
    def keys_checksum(self) -> str:
        """The SHA-256 of the keys' file, which names the keys for indexes built from them; where the store has
        no keys, that of the values stands for it."""
        raw = self.manifest.get("keys", {})
        name = "values.npy" if raw is None else raw.get("file", "keys.npy")
        return self.manifest["files"][name]["sha256"]

    @property
    def in_text_order(self) -> bool:
        """Whether the values are the text: none was merged or left out."""
        return self.weights is None and self.manifest.get("text_order", True)

    def require_keys(self, purpose: str) -> np.ndarray:
        """The keys; raises UserError where the store has none, which ``purpose`` needs."""
        if self.keys is None:
            raise UserError(f"The datastore {self.path} has no keys, which {purpose} needs; import it with its keys.")
        return self.keys

    def require_text_order(self, purpose: str) -> None:
        """Raise UserError where entry i + 1 is not what followed entry i, which ``purpose`` needs."""
        if not self.in_text_order:
            raise UserError(
                f"The datastore {self.path} is in no text order, since entries were merged or left out, and "
                f"{purpose} needs it; use the store that it was made from."
            )


def file_record(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and checksum."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def record_derived(path: Path, names: list[str]) -> None:
    """Enter files that were made from the store (indexes, clusterings) under ``derived`` in its manifest.

    They are what a copy of the store should have besides its own files; they may be missing.

    Parameters
    ----------
    path : the store's folder.
    names : the files' paths in it, with forward slashes.
    """
    manifest = read_json(path / MANIFEST)
    manifest["derived"] = manifest.get("derived", {}) | {name: file_record(path / name) for name in names}
    write_json(path / MANIFEST, manifest)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of the datastore in the folder ``path``; raises UserError where it has none."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"There is no datastore at {path}: no such folder; make one with dump_datastore.")
    if not (path / MANIFEST).is_file():
        if (path / PROGRESS).is_file():
            raise UserError(f"The datastore {path} is not finished; go on with dump_datastore --resume.")
        raise UserError(f"{path} is not a datastore: it has no {MANIFEST}; make one with dump_datastore.")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST} is not the manifest of a {FORMAT}.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"The datastore {path} has format version {manifest.get('format_version')}, this program reads "
            f"version {FORMAT_VERSION}; use the program's version that made it, or dump it again."
        )
    return manifest


def open_array(path: Path, dtype: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """Memory-map a .npy file, read-only; raises UserError where it is not of this dtype and (unless None) shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is damaged: it is not a .npy array ({error}).") from error
    if array.dtype != dtype or (shape is not None and array.shape != shape):
        raise UserError(
            f"{path} is not what the manifest says: it holds {array.dtype} {list(array.shape)}, "
            f"expected {np.dtype(dtype)} {list(shape or array.shape)}."
        )
    return array


def _open_raw(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    needed = shape[0] * shape[1] * dtype.itemsize
    if not path.is_file() or (actual := path.stat().st_size) != needed:
        have = f"it has {actual} bytes" if path.is_file() else "it is missing"
        raise UserError(
            f"{path} is not what the manifest says: {have}, {dtype} {list(shape)} takes {needed}; import it again."
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
