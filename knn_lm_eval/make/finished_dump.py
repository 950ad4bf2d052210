"""What of a dump is done once and takes no LM: training the index of one without keys, and making it a datastore."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from knn_lm_eval.make.dump_progress import START_ANEW, dump_states, entries_done, runs_written
from knn_lm_eval.make.index_dump import IndexDump
from knn_lm_eval.make.key_file import KEY_DTYPE
from knn_lm_eval.make.tokens import VALUE_DTYPE
from knn_lm_eval.store.manifest import (
    DOCUMENT_STARTS,
    KEYS,
    MANIFEST,
    NPY_KEYS,
    ORDER_OF_DUMPS,
    PROJECTION,
    VALUES,
    Manifest,
    file_record,
    now,
)
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import disk_errors_in, replace_file
from knn_lm_eval.version import __version__

UNFINISHED_KEYS = "keys.npy.part"


def train_index_of(output: Path) -> None:
    """Train the index that a dump without keys goes into, when all shares of its sample are read."""
    with disk_errors_in(output):
        if not (output / MANIFEST).exists():
            IndexDump(output).train()


def finish_dump(output: Path) -> None:
    """Make a datastore of a folder in which all shares' keys are written."""
    with disk_errors_in(output):
        states = dump_states(output)
        if not (output / MANIFEST).exists():  # else it was interrupted when all was done but what follows
            manifest = _manifest(output, states)
            states.note(**states.notes() | {"runs_done": runs_written(output)})  # all in one file, which goes last
            manifest.write(output)
        if "index" in states.settings:
            IndexDump(output).remove()
        states.remove()


def _manifest(output: Path, states: SavedStates) -> Manifest:
    """Give all else its name; what the manifest says of it."""
    settings, notes = states.settings, states.notes()
    values, starts = (map_npy(output / name, START_ANEW) for name in (VALUES, DOCUMENT_STARTS))
    assert entries_done(output) == len(values), "a share of the keys is missing"
    names, derived = [VALUES, DOCUMENT_STARTS], list[str]()
    if "index" in settings:
        dimension, derived = len(notes["fingerprint"]["key"]), IndexDump(output).finish()
    else:
        if (output / UNFINISHED_KEYS).exists():
            replace_file(output / UNFINISHED_KEYS, output / KEYS)
        dimension, names = map_npy(output / KEYS, START_ANEW).shape[1], [KEYS, *names]
    if notes.get("projection"):
        names.append(PROJECTION)
    return Manifest(
        count=len(values),
        dimension=dimension,
        projection=notes.get("projection"),
        documents=len(starts),
        key_dtype=np.dtype(KEY_DTYPE).name,
        value_dtype=np.dtype(VALUE_DTYPE).name,
        keys=NPY_KEYS if KEYS in names else None,
        key_type=settings["key_type"],
        windows=settings["windows"],
        max_tokens=settings["max_tokens"],
        source=settings["source"],
        model=settings["model"],
        key_module=notes["key_module"],
        fingerprint=notes["fingerprint"],
        files={name: file_record(output / name) for name in names},
        derived={name: file_record(output / name) for name in derived},
        created=now(),
        versions=_versions(),
        order=ORDER_OF_DUMPS,
    )


def _versions() -> dict[str, str]:
    return {"knn_lm_eval": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
