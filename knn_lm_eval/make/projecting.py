"""Making a datastore of narrower keys of an existing one: its keys go through a projection, all else stays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.projection import Projection
from knn_lm_eval.make.directions import SEED, copy_projection, sample_size, shared_projection, write_projection
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import SEARCH_CHUNK, key_chunks, keys_of
from knn_lm_eval.store.manifest import KEYS, NPY_KEYS, PROJECTION, ProjectionRecord, file_record, now
from knn_lm_eval.system.files import (
    check_free_space,
    check_new_folder,
    disk_errors_in,
    finished_folder,
    write_npy_header,
)
from knn_lm_eval.system.sampling import draw_entries
from knn_lm_eval.version import __version__

KEY_DTYPE = np.float16


def project_datastore(datastore: Datastore, output: str | Path, keys: int | Datastore) -> Datastore:
    """Write a datastore of the same entries whose keys have fewer numbers. It takes an index of its own.

    Parameters
    ----------
    datastore : the store, whose keys are whole; it stays as it is.
    output : the new store's folder.
    keys : the numbers that a key keeps, of the directions in which a sample of the keys varies most; or a store of the
        same model, whose projection is taken.

    Raises
    ------
    UserError
        Where the store has no keys or projected ones, ``keys`` is out of range or a store without a projection or of
        another model, the folder is taken, or the disk is full.
    """
    whole = datastore.require_keys("projecting")
    if datastore.projection is not None:
        raise UserError(
            f"The keys of the datastore {datastore.path} are a projection already; project the store that it was made "
            f"from, or dump it anew."
        )
    dimension = keys if isinstance(keys, int) else _shared_with(datastore, keys).shape[1]
    if not 1 <= dimension <= datastore.dimension:
        raise UserError(
            f"The keys of the datastore {datastore.path} have {datastore.dimension} numbers, of which {keys} cannot "
            f"be kept."
        )
    output, count = check_new_folder(output), len(datastore)
    said = datastore.manifest
    copied = [name for name in said.files if said.keys is None or name != said.keys.file]
    with disk_errors_in(output), finished_folder(output) as folder:
        size = sum(said.files[name]["bytes"] for name in copied) + count * dimension * np.dtype(KEY_DTYPE).itemsize
        check_free_space(folder, size, f"{count:,} entries of {dimension} numbers")
        for name in copied:
            shutil.copyfile(datastore.path / name, folder / name)
        record = _place_projection(folder, whole, keys)
        _write_keys(whole, Projection(np.load(folder / PROJECTION)), folder / KEYS)
        replace(
            said,
            dimension=dimension,
            key_dtype=np.dtype(KEY_DTYPE).name,
            keys=NPY_KEYS,  # an imported store has a raw array
            projection=record,
            files={name: file_record(folder / name) for name in (KEYS, *copied, PROJECTION)},
            created=now(),
            versions={"knn_lm_eval": __version__},
            derived={},
        ).write(folder)
    return Datastore.open(output)


def _shared_with(datastore: Datastore, of: Datastore) -> np.ndarray:
    """The projection of another store; raises UserError where it has none, or is of another model."""
    projection, models = shared_projection(of), [repr(store.manifest.fingerprint) for store in (of, datastore)]
    if models[0] != models[1] or of.manifest.width != datastore.dimension:
        raise UserError(f"The datastores {of.path} and {datastore.path} were made by different models.")
    return projection


def _place_projection(folder: Path, whole: np.ndarray, keys: int | Datastore) -> ProjectionRecord:
    if isinstance(keys, Datastore):
        return copy_projection(keys, folder)
    return write_projection(folder, _sample(whole), whole.shape[1], keys)


def _sample(whole: np.ndarray) -> Iterator[np.ndarray]:
    """Random keys, some at a time: float32 ``[n, width]``."""
    entries = draw_entries(len(whole), sample_size(whole.shape[1]), SEED)
    for start in range(0, len(entries), SEARCH_CHUNK):
        yield keys_of(whole, entries[start : start + SEARCH_CHUNK])


def _write_keys(whole: np.ndarray, projection: Projection, path: Path) -> None:
    with (
        tqdm(total=len(whole), desc="Projecting keys", unit=" keys", unit_scale=True) as bar,
        open(path, "wb") as file,
    ):
        write_npy_header(file, KEY_DTYPE, (len(whole), projection.dimension))
        for chunk in key_chunks(whole, size=SEARCH_CHUNK):
            keys = projection(torch.from_numpy(chunk)).numpy().astype(KEY_DTYPE)
            if not np.isfinite(keys).all():
                raise UserError("A projected key is beyond what float16 holds (65,504), so the keys cannot be kept so.")
            file.write(keys.tobytes())
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
