"""How sure the LM was of each entry of a datastore: log p_LM of the value, as a file beside the store.

The store's values are its text and its manifest says in which windows the LM read it, so one more pass over the same
windows, in the same batches, gives what the LM predicted when the keys were made. The file ``lm_log_probs.npy``,
float32 ``[count]`` (4 bytes beside a key's thousand, and the same numbers as in scoring), is written once and found
again by whatever needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypedDict

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_store_model
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.reading import Reader
from knn_lm_eval.make.windows import Window, WindowSettings, batches, chunks, cut_windows, passages
from knn_lm_eval.store.datastore import Datastore, open_array
from knn_lm_eval.store.manifest import Manifest, WindowsRecord, record_derived, recorded_checksums
from knn_lm_eval.store.verification import Expected
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import check_free_space, disk_errors_in, replace_file, write_npy_header
from knn_lm_eval.system.json_schema import Count
from knn_lm_eval.system.locks import DAY, locked

LOG_PROBS = "lm_log_probs.npy"
PROGRESS = "lm_log_probs.progress.json"


class _Notes(TypedDict):
    entries_done: Count


def lm_log_probs(datastore: Datastore, load_lm: Callable[[], CausalHFLM]) -> np.ndarray:
    """The LM's log-probability of each entry's value; computed and kept in the store's folder where it is not there.

    An interrupted computation is gone on with.

    Parameters
    ----------
    load_lm : gives the store's LM; called only where it has to read.

    Returns
    -------
    float32 ``[count]``, memory-mapped.

    Raises
    ------
    UserError
        Where the store has lost its text's order or does not say how the text was read, the LM is not the one that
        made it or gives NaN, or the disk is full.
    """
    path = datastore.path / LOG_PROBS
    # The file of progress says for which keys it is, beside how far it is; it may be the last that is left of a run.
    settings = {"keys_sha256": datastore.keys_checksum}
    states = SavedStates(datastore.path / PROGRESS, settings, nested=False, notes=_Notes)
    if LOG_PROBS not in Manifest.read(datastore.path).derived or states.file.exists():
        datastore.require_text_order("the LM's confidence")
        if datastore.manifest.windows is None:
            raise UserError(
                f"The datastore {datastore.path} was imported and does not say in which windows the LM read its text, "
                f"which the LM's confidence needs; dump the text with dump_datastore, or prune by another method."
            )
        lock = locked(datastore.path / f".{LOG_PROBS}.lock", f"{path}", seconds=DAY)
        with disk_errors_in(datastore.path), lock:
            if LOG_PROBS not in Manifest.read(datastore.path).derived:  # another may just have written it
                done = states.notes()["entries_done"] if states.fits() else 0
                if done < len(datastore) or not path.exists():
                    _write_log_probs(datastore, datastore.manifest.windows, load_lm, states, done)
                record_derived(datastore.path, [LOG_PROBS])
            states.remove()
    log_probs = open_array(path, np.float32, (len(datastore),))
    remedy = f"delete it and take it off the manifest's derived files: {path.name} is made again"
    datastore.verification.check([Expected(path, recorded_checksums(datastore.path).get(LOG_PROBS), remedy=remedy)])
    return log_probs


def _write_log_probs(
    datastore: Datastore, read_in: WindowsRecord, load_lm: Callable[[], CausalHFLM], states: SavedStates, done: int
) -> None:
    """Append the log-probabilities to the first ``done`` ones; the file gets its name when all are there."""
    partial = datastore.path / f"{LOG_PROBS}.part"
    count, windows = len(datastore), WindowSettings.of_store(read_in)
    check_free_space(datastore.path, 4 * (count - done), f"the log-probabilities of {count:,} entries")
    lm = load_lm()
    manifest = datastore.manifest
    model = LanguageModel(lm.model, manifest.key_type, lm.mixed_precision_dtype, manifest.key_module)
    check_store_model(manifest, model, lm.tokenizer, str(lm.pretrained))
    reader = Reader(model, lm.softmax_dtype)
    with (
        open(partial, "r+b" if done else "w+b") as file,
        tqdm(total=count, initial=done, unit=" tokens", unit_scale=True, desc="Reading the store's text") as bar,
    ):
        write_npy_header(file, np.float32, (count,))
        # What was written after the last recorded chunk is computed again.
        file.truncate(file.tell() + 4 * done)
        file.seek(0, os.SEEK_END)
        for chunk in chunks(cut_windows(datastore.document_starts, count, windows), windows):
            if chunk[-1].stop <= done:
                continue
            log_probs = _read_chunk(reader, chunk, windows, datastore.values, read_in["prefix_token_id"], bar)
            file.write(log_probs.tobytes())
            file.flush()
            os.fsync(file.fileno())
            states.note(entries_done=chunk[-1].stop)
    replace_file(partial, datastore.path / LOG_PROBS)


def _read_chunk(
    reader: Reader,
    chunk: list[Window],
    windows: WindowSettings,
    values: np.ndarray,
    prefix_token_id: int,
    bar: tqdm,
) -> np.ndarray:
    """log p of each of a chunk's entries, float32 ``[entries]``; raises UserError where one is NaN."""
    begin = chunk[0].start
    log_probs = np.empty(chunk[-1].stop - begin, dtype=np.float32)
    for batch in batches(chunk, windows):
        read = reader.read(passages(batch, values, prefix_token_id))
        parts = reader.target_log_probs(read).float().split([window.stop - window.start for window in batch])
        for window, part in zip(batch, parts, strict=True):
            log_probs[window.start - begin : window.stop - begin] = part.numpy()
            bar.update(len(part))
    if np.isnan(log_probs).any():
        raise UserError(
            f"The model gives no probability (NaN) for token {begin + int(np.isnan(log_probs).argmax())}; "
            f"check the model's weights and dtype."
        )
    return log_probs
