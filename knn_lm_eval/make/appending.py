"""Growing a datastore: new documents go behind the old ones, and its indexes and clusterings take in their entries.

The new text is dumped into a hidden folder of the store's, by the LM and in the windows of the store; then what changes
of the store is prepared beside it, and takes its place all at once. Keys are added to their file, not copied. Until
then the store is as it was, and a dump that was interrupted goes on.

Where the store has no keys, the new text is dumped without keys as well, into an index that is trained as the store's.
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_store_model
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.changed_clusters import extend_clusters
from knn_lm_eval.make.changed_store import Changed
from knn_lm_eval.make.clustered_keys import only_index
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.text import Piece
from knn_lm_eval.search.changed_index import (
    MEASURED_WITH,
    check_growable_without_keys,
    emptied,
    extend_index,
    join_index,
)
from knn_lm_eval.search.index_build import write_index
from knn_lm_eval.store.change import one_change_of
from knn_lm_eval.store.clusters import cluster_names
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexFiles, find_parts, index_names
from knn_lm_eval.store.manifest import (
    DOCUMENT_STARTS,
    KEYS,
    MANIFEST,
    VALUES,
    AppendedRecord,
    FileRecord,
    now,
)
from knn_lm_eval.system.checkpoints import PROGRESS, SavedStates
from knn_lm_eval.system.file_contents import Contents, examine_joined, note_contents
from knn_lm_eval.system.files import check_free_space, write_npy_header
from knn_lm_eval.system.processes import Processes

logger = logging.getLogger(__name__)

WAITING = ".appending"
TRAINED = "trained.faiss"  # in the new documents' dump, where the store has no keys
# The share of new entries from which on an index is worth being trained anew: see docs/measurements/indexes.md.
LARGE_SHARE = 0.5


def append_documents(
    folder: str | Path,
    lm: CausalHFLM,
    pieces: Iterable[Piece],
    *,
    max_tokens: int | None = None,
    resume: bool = False,
    source: dict[str, Any] | None = None,
    processes: Processes | None = None,
) -> Datastore:
    """Append the documents of a text to the datastore in ``folder``.

    Parameters
    ----------
    lm : the LM that made the store.
    pieces : the text, from ``knn_lm_eval.make.text``.
    max_tokens : stop after so many entries.
    resume : go on with what was interrupted; nothing is done where it was finished.
    source : kept in the manifest.
    processes : those that share the LM's work and all call this function; None is this one alone.

    Raises
    ------
    UserError
        Where the store was not made by this LM, or does not say how, the text is empty, something else was begun, the
        disk is full, or another process is changing the store.
    """
    folder, processes = Path(folder), processes or Processes()
    if not folder.is_dir():
        Datastore.open(folder)  # says so
    with ExitStack() as held:
        processes.first_does(lambda: held.enter_context(one_change_of(folder)))
        store = processes.each_does(lambda: Datastore.open(folder))
        processes.each_does(lambda: _check(store, lm))
        waiting, states = folder / WAITING, _states(store, source or {}, max_tokens)
        if processes.each_does(lambda: resume and not states.file.exists() and _is_last(store, states.settings)):
            return store
        processes.first_does(lambda: _begin(states, resume))
        new = _dumped(store, lm, pieces, waiting / "dump", max_tokens, processes)
        processes.first_does(lambda: _append(store, new, Changed(store, waiting), source or {}))
    return Datastore.open(folder)


def _states(store: Datastore, source: dict[str, Any], max_tokens: int | None) -> SavedStates:
    """What is begun of an append."""
    settings = {
        "keys_sha256": store.keys_checksum,
        "count": len(store),
        "source": source,
        "max_tokens": max_tokens,
    }
    file, what = store.path / WAITING / PROGRESS, f"What is being appended to {store.path}"
    return SavedStates(file, settings, what=what, instead="leave out --resume")


def _check(store: Datastore, lm: CausalHFLM) -> None:
    """Raise UserError where new entries would not be as the store's are."""
    manifest = store.manifest
    store.require_text_order("appending")
    if manifest.windows is None or (manifest.keys is not None and manifest.keys.is_raw):
        raise UserError(
            f"The datastore {store.path} was imported and does not say in which windows the LM read its text, which "
            f"appending needs; dump the text with dump_datastore."
        )
    if store.keys is None:
        check_growable_without_keys(store, _only_index(store))
    paths = [store.path / name for name in _growing(store)]
    if any(path.is_symlink() or path.stat().st_nlink > 1 for path in paths):
        raise UserError(
            f"Arrays of the datastore {store.path} are links, and another datastore may have the same files, to which "
            f"entries would be added; copy it first."
        )
    if lm.prefix_token_id != manifest.windows["prefix_token_id"]:
        raise UserError(
            f"The datastore's documents begin with token {manifest.windows['prefix_token_id']}, and this model's with "
            f"{lm.prefix_token_id}; give --model_args prefix_token_id={manifest.windows['prefix_token_id']}."
        )
    model = LanguageModel(lm.model, manifest.key_type, lm.mixed_precision_dtype, manifest.key_module)
    check_store_model(manifest, model, lm.tokenizer, str(lm.pretrained))


def _growing(store: Datastore) -> list[str]:
    """The arrays that grow."""
    return [*([] if store.keys is None else [KEYS]), VALUES, DOCUMENT_STARTS]


def _only_index(store: Datastore) -> str:
    return only_index(store, "new entries can be appended to one that has a single index, into which they are dumped")


def _is_last(store: Datastore, settings: dict[str, Any]) -> bool:
    """Whether what is to be appended was the last that was."""
    said = {"source": settings["source"], "max_tokens": settings["max_tokens"]}
    last = store.manifest.appended[-1:]
    return bool(last) and {"source": last[0]["source"], "max_tokens": last[0].get("max_tokens")} == said


def _begin(states: SavedStates, resume: bool) -> None:
    if not (resume and states.resumed() is not None):
        shutil.rmtree(states.folder, ignore_errors=True)
        states.begin()


def _dumped(
    store: Datastore,
    lm: CausalHFLM,
    pieces: Iterable[Piece],
    output: Path,
    max_tokens: int | None,
    processes: Processes,
) -> Datastore:
    """The new documents, as a store of their own."""
    if processes.each_does(lambda: (output / MANIFEST).exists() and not (output / PROGRESS).exists()):
        return Datastore.open(output)
    windows = store.manifest.windows
    assert windows is not None
    index = None if store.keys is not None else processes.first_does(lambda: _trained_plan(store, output))
    return dump_datastore(
        lm,
        pieces,
        output,
        key_type=store.manifest.key_type,
        key_module=store.manifest.key_module,
        max_length=windows["max_length"],
        stride=windows["stride"],
        batch_size=windows["batch_size"],
        max_tokens=max_tokens,
        keys="all" if index is None else "none",
        index=index,
        projection_of=None if store.projection is None else store.path,
        resume=(output / PROGRESS).exists(),
        processes=processes,
    )


def _trained_plan(store: Datastore, output: Path) -> IndexPlan:
    """The index that new documents of a store without keys go into: trained as the store's own."""
    name = _only_index(store)
    metadata, parts = find_parts(store, name)
    output.mkdir(parents=True, exist_ok=True)
    if not (output / TRAINED).exists():
        write_index(emptied(parts[0]), output / TRAINED)
    return IndexPlan(metadata["factory"], name, metadata["sim_func"], quality_queries=0, trained=TRAINED)


def _append(store: Datastore, new: Datastore, changed: Changed, source: dict[str, Any]) -> None:
    """Prepare all that changes, then change it."""
    shutil.rmtree(changed.new, ignore_errors=True)
    changed.new.mkdir()
    _check_room(store, new)
    starts = changed.new / DOCUMENT_STARTS
    np.save(starts, new.document_starts + len(store))
    tails = {name: starts if name == DOCUMENT_STARTS else new.path / name for name in _growing(store)}
    contents = {name: _add_tail(store, changed, name, tail) for name, tail in tails.items()}
    changed.keys_sha256 = contents[VALUES if store.keys is None else KEYS].sha256
    for name in index_names(store):
        to = changed.keys_sha256, changed.new
        if new.keys is None:
            segment = IndexFiles(new.path, name).index
            changed.place_index(join_index(store, name, segment, len(new), *to))
        else:
            changed.place_index(extend_index(store, name, new.keys, *to))
    values = np.concatenate([store.values, new.values]) if cluster_names(store) else store.values
    for name in cluster_names(store):
        in_folder = changed.new / "clusters" / name
        changed.place_clusters(name, extend_clusters(store, name, new, values, changed.keys_sha256, in_folder))
    changed.place_params()
    documents = len(store.document_starts)
    record = AppendedRecord(
        first=documents,
        stop=documents + len(new.document_starts),
        source=source,
        max_tokens=new.manifest.max_tokens,
        created=now(),
    )
    sizes = {name: store.manifest.files[name]["bytes"] + np.load(tails[name], mmap_mode="r").nbytes for name in tails}
    grown = {name: FileRecord(bytes=sizes[name], sha256=contents[name].sha256) for name in tails}
    changed.make(
        count=len(store) + len(new),
        documents=record["stop"],
        files=store.manifest.files | grown,
        appended=[*store.manifest.appended, record],
    )
    for name, of_file in contents.items():
        note_contents(store.path / name, of_file)


def _check_room(store: Datastore, new: Datastore) -> None:
    """Raise UserError where there is no room for the new entries, and for what is written anew."""
    tails = sum(record["bytes"] for record in new.manifest.files.values())
    derived = sum(record["bytes"] for record in store.manifest.derived.values())
    grown = derived * (len(store) + len(new)) // len(store)
    check_free_space(store.path, tails + grown, f"{len(new):,} more entries, and the indexes and clusters with them,")


def _add_tail(store: Datastore, changed: Changed, name: str, source: Path) -> Contents:
    """Have an array grow by another; returns what will be in its file."""
    old, new = (np.load(path, mmap_mode="r") for path in (store.path / name, source))
    both = (store.path / name, old), (source, new)
    heads = {path: path.stat().st_size - array.nbytes for path, array in both}  # bytes
    file = io.BytesIO()
    write_npy_header(file, old.dtype, (len(old) + len(new), *old.shape[1:]))
    head = file.getvalue()
    if len(head) != heads[store.path / name] or old.dtype != new.dtype or old.shape[1:] != new.shape[1:]:
        raise UserError(f"{store.path / name} cannot grow: it was not written as dump_datastore writes it.")
    changed.add_tail(name, head, source, heads[source])
    return examine_joined(head, list(heads.items()), old.dtype, name)


def worth_training(store: Datastore) -> list[str]:
    """The indexes of which a large share of the entries is newer than their training, each in a sentence."""
    sentences = []
    remedy = "dump all text again" if store.keys is None else "build it again (build_index --overwrite)"
    for name in index_names(store):
        measured = find_parts(store, name)[0].get(MEASURED_WITH)
        if measured and (share := len(store) / max(1, measured["count"]) - 1) >= LARGE_SHARE:
            sentences.append(
                f"The index {name!r} has {share:.0%} more entries than it was trained and measured with: {remedy}."
            )
    return sentences
