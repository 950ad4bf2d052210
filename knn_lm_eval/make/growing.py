"""Large datastores for measuring indexes, made of real ones: their entries, then noisy copies of them.

An index of many millions of entries has to be measured on keys that lie as an LM's do: on few directions, in clumps,
several domains apart from each other. Random vectors don't. The noise of a copy is therefore the difference of two
real keys of the same source that are followed by the same token as the entry itself: it has the directions in which
such contexts differ, and changes nothing about what follows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.directions import copy_projection
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import DOCUMENT_STARTS, KEYS, NPY_KEYS, PROJECTION, VALUES, file_record
from knn_lm_eval.system.files import check_free_space, check_new_folder, disk_errors_in, finished_folder

ROWS_AT_ONCE = 2**14


def grow_datastore(
    sources: Sequence[Datastore], output: str | Path, entries: int, *, noise: float = 0.3, seed: int = 0
) -> Datastore:
    """Write a datastore of so many entries: the sources one after the other, then copies of all with noise.

    Parameters
    ----------
    sources : stores of one LM, without weights.
    output : the folder to write; must not exist.
    entries : how many; the last copy is cut off there.
    noise : the factor of the difference that a copy has added to its keys.
    seed : of the choice of differences.

    Raises
    ------
    UserError
        Where the sources are of several LMs, the folder is taken, or the disk is too small.
    """
    models = {source.path: source.manifest.fingerprint for source in sources}
    if len({repr(fingerprint) for fingerprint in models.values()}) > 1:
        raise UserError(f"The datastores {', '.join(map(str, models))} were made by different models.")
    if len({repr(source.manifest.files.get(PROJECTION)) for source in sources}) > 1:
        raise UserError(
            f"The keys of the datastores {', '.join(map(str, models))} are projected to other directions each; make "
            f"them with one projection, by --projection_of."
        )
    for source in sources:
        source.require_text_order("growing")
        source.require_keys("growing")
        source.require_all("growing")
    output = check_new_folder(output)
    with disk_errors_in(output), finished_folder(output) as folder:
        check_free_space(folder, entries * (2 * sources[0].dimension + 4), f"{entries:,} entries")
        starts = _write_entries(sources, folder, entries, noise, seed)
        names = [KEYS, VALUES, DOCUMENT_STARTS]
        if sources[0].projection is not None:
            copy_projection(sources[0], folder)
            names.append(PROJECTION)
        manifest = replace(
            sources[0].manifest,
            count=entries,
            documents=len(starts),
            key_dtype="float16",
            keys=NPY_KEYS,  # an imported source has a raw array
            source={"grown_from": [str(source.path) for source in sources], "noise": noise, "seed": seed},
            files={name: file_record(folder / name) for name in names},
            appended=[],
            derived={},
        )
        manifest.write(folder)
    return Datastore.open(output)


def _write_entries(sources: Sequence[Datastore], folder: Path, entries: int, noise: float, seed: int) -> np.ndarray:
    """Write keys, values and document starts; returns the latter."""
    keys = np.lib.format.open_memmap(folder / KEYS, "w+", np.float16, (entries, sources[0].dimension))
    values = np.lib.format.open_memmap(folder / VALUES, "w+", np.int32, (entries,))
    rng, kin = np.random.default_rng(seed), [_Kin(source) for source in sources]
    starts, count, copy = [], 0, 0
    with tqdm(total=entries, unit=" entries", unit_scale=True, desc="Growing") as bar:
        while count < entries:
            for source, same_value in zip(sources, kin, strict=True):
                size = min(len(source), entries - count)
                values[count : count + size] = source.values[:size]
                starts.append(source.document_starts[source.document_starts < size] + count)
                for begin in range(0, size, ROWS_AT_ONCE):
                    end = min(begin + ROWS_AT_ONCE, size)
                    rows = same_value.keys[begin:end].astype(np.float32)
                    if copy:
                        rows += noise * same_value.differences(source.values[begin:end], rng)
                    keys[count + begin : count + end] = rows
                    bar.update(end - begin)
                count += size
            copy += 1
    keys.flush()
    values.flush()
    document_starts = np.concatenate(starts)
    np.save(folder / DOCUMENT_STARTS, document_starts)
    return document_starts


class _Kin:
    """For each value, the entries of a store that have it."""

    def __init__(self, store: Datastore) -> None:
        self.keys = store.require_keys("growing")
        self.order = np.argsort(store.values, kind="stable")
        self.starts = np.searchsorted(store.values[self.order], np.arange(store.values.max() + 2))

    def differences(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The difference of two random keys with each of ``values``; 0 where only one entry has it."""
        low, high = self.starts[values], self.starts[values + 1]
        one, other = (self.keys[self.order[rng.integers(low, high)]].astype(np.float32) for _ in range(2))
        return one - other
