"""How sure the LM was of each entry of a datastore: log p_LM of the value, as a file beside the store.

The store's values are its text and its manifest says in which windows the LM read it, so one more pass over the same
windows, in the same batches, gives what the LM predicted when the keys were made. The file ``lm_log_probs.npy``,
float32 ``[count]`` (4 bytes beside a key's thousand, and the same numbers as in scoring), is written once and found
again by whatever needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_store_model
from knn_lm_eval.lm.language_model import CausalLM
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.reading import Reader
from knn_lm_eval.make.windows import Window, WindowSettings, batches, chunks, cut_windows, passages
from knn_lm_eval.store.datastore import Datastore, open_array, read_manifest, record_derived
from knn_lm_eval.system.files import (
    check_free_space,
    disk_errors_in,
    read_json,
    replace_file,
    write_json,
    write_npy_header,
)

LOG_PROBS = "lm_log_probs.npy"
PROGRESS = "lm_log_probs.progress.json"


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
    if LOG_PROBS not in read_manifest(datastore.path).get("derived", {}):
        datastore.require_text_order("the LM's confidence")
        if "windows" not in datastore.manifest:
            raise UserError(
                f"The datastore {datastore.path} was imported and does not say in which windows the LM read its text, "
                f"which the LM's confidence needs; dump the text with dump_datastore, or prune by another method."
            )
        with disk_errors_in(datastore.path):
            _write_log_probs(datastore, load_lm)
            record_derived(datastore.path, [LOG_PROBS])
            (datastore.path / PROGRESS).unlink(missing_ok=True)
    return open_array(path, np.float32, (len(datastore),))


def _write_log_probs(datastore: Datastore, load_lm: Callable[[], CausalHFLM]) -> None:
    """Append the log-probabilities that are not there yet; the file gets its name when all are."""
    path, partial = datastore.path / LOG_PROBS, datastore.path / f"{LOG_PROBS}.part"
    progress = read_json(datastore.path / PROGRESS) if (datastore.path / PROGRESS).exists() else {}
    done = progress["entries_done"] if progress.get("keys_sha256") == datastore.keys_checksum else 0
    count = len(datastore)
    if done == count and path.exists():
        return
    manifest = datastore.manifest
    windows = WindowSettings(*(manifest["windows"][name] for name in ("max_length", "stride", "batch_size")))
    prefix_token_id = manifest["windows"]["prefix_token_id"]
    check_free_space(datastore.path, 4 * (count - done), f"the log-probabilities of {count:,} entries")
    lm = load_lm()
    model = CausalLM(lm.model, manifest["key_type"], lm.mixed_precision_dtype, manifest["key_module"])
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
            begin, end = chunk[0].start, chunk[-1].stop
            if end <= done:
                continue
            log_probs = np.empty(end - begin, dtype=np.float32)
            for batch in batches(chunk, windows):
                for window, part in zip(batch, _read(reader, batch, datastore.values, prefix_token_id), strict=True):
                    log_probs[window.start - begin : window.stop - begin] = part
                    bar.update(len(part))
            if np.isnan(log_probs).any():
                raise UserError(
                    f"The model gives no probability (NaN) for token {begin + int(np.isnan(log_probs).argmax())}; "
                    f"check the model's weights and dtype."
                )
            file.write(log_probs.tobytes())
            file.flush()
            os.fsync(file.fileno())
            write_json(datastore.path / PROGRESS, {"keys_sha256": datastore.keys_checksum, "entries_done": end})
    replace_file(partial, path)


def _read(reader: Reader, batch: list[Window], values: np.ndarray, prefix_token_id: int) -> list[np.ndarray]:
    """log p of each window's entries."""
    log_probs = reader.target_log_probs(reader.read(passages(batch, values, prefix_token_id))).float()
    return [part.numpy() for part in log_probs.split([window.stop - window.start for window in batch])]
