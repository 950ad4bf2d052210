"""The datastore on disk: what the folder holds, and opening it.

A datastore is a folder with

- ``keys.npy``: float16 ``[count, dimension]``, the hidden state before each token, in text order;
- ``values.npy``: int32 ``[count]``, the token itself, so the values are the tokenized text;
- ``document_starts.npy``: int64 ``[documents]``, the entry at which each document begins, ascending;
- ``manifest.json``: what made it (model, windows, source), sizes and checksums of the files above.

Entry i's successor in its document is entry i + 1. The manifest is written last: a folder without one is not
a datastore. Indexes (``*.faiss``, each with a ``*.json`` beside it) lie in the same folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.files import read_json

FORMAT = "knn_lm_eval datastore"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Datastore:
    """An opened datastore; its arrays are memory-mapped and read-only.

    Attributes
    ----------
    path : the folder.
    manifest : the content of ``manifest.json``.
    keys : float16 ``[count, dimension]``.
    values : int32 ``[count]``.
    document_starts : int64 ``[documents]``.
    """

    path: Path
    manifest: dict[str, Any]
    keys: np.ndarray
    values: np.ndarray
    document_starts: np.ndarray

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
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / MANIFEST} is damaged: {error!r} is missing or malformed.") from error
        for name, size in sizes.items():
            if not (path / name).is_file():
                raise UserError(f"The datastore {path} is incomplete: {name} is missing.")
            if (actual := (path / name).stat().st_size) != size:
                raise UserError(
                    f"The datastore {path} is damaged: {name} has {actual} bytes, the manifest says {size}; "
                    f"copy or dump it again."
                )
        return cls(
            path=path,
            manifest=manifest,
            keys=_open_array(path / "keys.npy", np.float16, (count, dimension)),
            values=_open_array(path / "values.npy", np.int32, (count,)),
            document_starts=_open_array(path / "document_starts.npy", np.int64, None),
        )

    def __len__(self) -> int:
        """The number of entries."""
        return len(self.values)

    @property
    def dimension(self) -> int:
        """The width of a key."""
        return self.keys.shape[1]

    @property
    def keys_checksum(self) -> str:
        """The SHA-256 of ``keys.npy``, which names the keys for indexes built from them."""
        return self.manifest["files"]["keys.npy"]["sha256"]


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


def _open_array(path: Path, dtype: Any, shape: tuple[int, ...] | None) -> np.ndarray:
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
