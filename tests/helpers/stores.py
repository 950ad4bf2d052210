"""Datastores that need no model."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import FORMAT, FORMAT_VERSION, KEYS, Manifest, file_record
from knn_lm_eval.system.files import sha256, write_json


def change_json(path: Path, **changes: Any) -> None:
    """Change a JSON file by hand, so that it says no checksum of its own content."""
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    path.write_text(json.dumps(content | changes))


def let_age(folder: Path) -> None:
    """What was written just now may change within a tick of the clock, so it is not noted as verified.

    Each file gets a time of its own, as copies keep it: files of one size and time would be taken for each other where
    one has the other's inode.
    """
    then = time.time_ns() - 10 * 10**9
    for number, path in enumerate(folder.rglob("*")):
        if path.stat().st_mtime_ns > then:
            os.utime(path, ns=(then + number, then + number))


def flip_bit(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def make_store(folder: Path, count: int = 3000, dimension: int = 16, seed: int = 0, common: float = 0.0) -> Datastore:
    """A datastore of clustered random keys, which have a common part of length ``common``."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, dimension)) * 2
    value_of = rng.integers(0, 20, count)
    keys = centres[value_of] + rng.standard_normal((count, dimension)) + common / dimension**0.5
    np.save(folder / "keys.npy", keys.astype(np.float16))
    np.save(folder / "values.npy", value_of.astype(np.int32))
    np.save(folder / "document_starts.npy", np.array([0], dtype=np.int64))
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in folder.glob("*.npy")}
    shape = {"count": count, "dimension": dimension}
    write_json(
        folder / "manifest.json",
        {"format": FORMAT, "format_version": FORMAT_VERSION, **shape, "files": files},
    )
    return Datastore.open(folder)


def without_keys(store: Datastore, folder: Path) -> Datastore:
    """A copy of a store, with its indexes and clusters, as if it had been dumped without keys."""
    shutil.copytree(store.path, folder, ignore=shutil.ignore_patterns("keys.npy", "*.codes", "*.scan", ".*"))
    files = {name: record for name, record in store.manifest.files.items() if name != KEYS}
    replace(store.manifest, keys=None, key_dtype=None, files=files, derived={}).write(folder)
    named = Manifest.read(folder).keys_checksum
    for path in [*folder.glob("*.json"), *folder.glob("clusters/*/*.json")]:
        if "keys_sha256" in json.loads(path.read_text()):
            change_json(path, keys_sha256=named)
    return Datastore.open(folder)


def part_of(store: Datastore, folder: Path, first: int, stop: int) -> Datastore:
    """A datastore of some of another's documents, bit by bit its keys."""
    folder.mkdir(parents=True)
    starts = np.append(store.document_starts, len(store))[first : stop + 1]
    some = slice(int(starts[0]), int(starts[-1]))
    arrays = {"keys.npy": store.keys, "values.npy": store.values, "weights.npy": store.weights}
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / name, array[some])
    np.save(folder / "document_starts.npy", starts[:-1] - starts[0])
    files = {path.name: file_record(path) for path in sorted(folder.glob("*.npy"))}
    manifest = replace(store.manifest, count=some.stop - some.start, documents=stop - first, files=files, derived={})
    manifest.write(folder)
    return Datastore.open(folder)
