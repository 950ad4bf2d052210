"""Dumping a datastore: text -> token ids (the values) -> windows -> one forward pass each -> keys.

The token ids are written first and are the values, so that the number of entries, the disk space and the time
left are known before the LM runs, and a resumed dump needs nothing but the folder. Keys are appended chunk by
chunk in text order; a chunk is always computed from the same batches, so a resumed dump gives the same bytes.
"""

from __future__ import annotations

import datetime
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from knn_lm_eval.datastore import FORMAT, FORMAT_VERSION, MANIFEST, PROGRESS, Datastore
from knn_lm_eval.documents import Piece
from knn_lm_eval.errors import UserError
from knn_lm_eval.files import (
    check_free_space,
    disk_errors_in,
    read_json,
    replace_file,
    sha256,
    write_json,
    write_npy_header,
)
from knn_lm_eval.fingerprint import check_fingerprint, take_fingerprint
from knn_lm_eval.language_model import CausalLM
from knn_lm_eval.loading import CausalHFLM

# Batches per chunk: a chunk is what an interruption can lose, and what is sorted by length to save padding.
BATCHES_PER_CHUNK = 4
TOKENIZER_BATCH_CHARACTERS = 2**20
KEY_DTYPE, VALUE_DTYPE = np.float16, np.int32


@dataclass(frozen=True)
class WindowSettings:
    """How text is cut for the forward passes.

    Attributes
    ----------
    max_length : tokens per window.
    stride : tokens that each window but a document's first adds; every token is read with at least
        ``max_length - stride`` tokens of context where its document has them.
    batch_size : windows of ``max_length`` tokens per batch; shorter ones are packed to as many tokens.
    """

    max_length: int
    stride: int
    batch_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.max_length:
            raise UserError(f"stride={self.stride} must be between 1 and max_length={self.max_length}.")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1.")


@dataclass(frozen=True)
class Window:
    """Entries ``[start, stop)`` and the tokens to read for them: ``[context, stop - 1)``, after a prefix token
    where ``context`` is None (a document's beginning)."""

    context: int | None
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - (self.start if self.context is None else self.context + 1)

    def tokens(self, values: np.ndarray, prefix_token_id: int) -> np.ndarray:
        """What to read, int64 ``[length]``; its last positions predict the entries."""
        begin = self.start if self.context is None else self.context
        prefix = [prefix_token_id] if self.context is None else []
        return np.concatenate([np.array(prefix, dtype=np.int64), values[begin : self.stop - 1]], dtype=np.int64)


def cut_windows(document_starts: np.ndarray, count: int, settings: WindowSettings) -> Iterator[Window]:
    """The windows over all documents, in text order; each entry is in exactly one.

    As lm-eval's rolling windows: the first of a document begins with the prefix token and holds
    ``max_length`` entries, each further one adds ``stride`` and always reads ``max_length`` tokens.
    """
    for begin, end in zip(document_starts.tolist(), [*document_starts[1:].tolist(), count], strict=True):
        stop = min(begin + settings.max_length, end)
        yield Window(None, begin, stop)
        while stop < end:
            start, stop = stop, min(stop + settings.stride, end)
            yield Window(stop - settings.max_length - 1, start, stop)


def dump_datastore(
    lm: CausalHFLM,
    pieces: Iterable[Piece],
    output: str | Path,
    *,
    key_type: str = "last_ffn_input",
    key_module: str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    resume: bool = False,
    source: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
) -> Datastore:
    """Write the datastore of a text.

    Parameters
    ----------
    lm : the loaded LM.
    pieces : the text, from ``knn_lm_eval.documents``; not read when an unfinished dump's tokens are complete.
    output : the folder to write; made if need be.
    key_type, key_module : see ``CausalLM``.
    max_length : tokens per window; None takes the model's own limit, at most 1,024.
    stride, batch_size : see ``WindowSettings``; stride None is ``max_length``.
    max_tokens : stop after so many entries.
    resume : go on with an unfinished dump in ``output``.
    source, model_args : kept in the manifest.

    Raises
    ------
    UserError
        Where the folder is taken, the text is empty, the disk is full, or the model gives keys that float16
        cannot hold.
    """
    output = Path(output)
    max_length = max_length or min(lm.max_length, 1024)
    windows = WindowSettings(max_length, stride or max_length, batch_size)
    model = CausalLM(lm.model, key_type, lm.mixed_precision_dtype, key_module)
    settings = {
        "key_type": key_type,
        "windows": {**vars(windows), "prefix_token_id": lm.prefix_token_id},
        "max_tokens": max_tokens,
        "source": source or {},
        "model": {
            "pretrained": lm.pretrained if isinstance(lm.pretrained, str) else type(model.inner).__name__,
            "args": model_args or {},
            "class": type(model.inner).__name__,
            "dtype": str(model.inner.dtype).removeprefix("torch."),
            "vocabulary": model.vocabulary_size,
        },
    }
    fingerprint = take_fingerprint(model, lm.tokenizer)
    with disk_errors_in(output):
        progress = _start(output, settings, fingerprint, resume)
        if progress["entries_done"] is None:
            _write_values(lm, pieces, output, max_tokens)
            progress["entries_done"] = 0
            write_json(output / PROGRESS, progress)
        values = np.load(output / "values.npy", mmap_mode="r")
        starts = np.load(output / "document_starts.npy", mmap_mode="r")
        row_bytes = len(fingerprint["key"]) * np.dtype(KEY_DTYPE).itemsize
        left = len(values) - progress["entries_done"]
        check_free_space(output, left * row_bytes, f"the keys of {len(values):,} tokens")
        _write_keys(model, lm.prefix_token_id, values, starts, windows, output, progress)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "count": len(values),
            "dimension": len(fingerprint["key"]),
            "documents": len(starts),
            "key_dtype": np.dtype(KEY_DTYPE).name,
            "value_dtype": np.dtype(VALUE_DTYPE).name,
            **settings,
            "key_module": model.key_module_name,
            "fingerprint": fingerprint,
            "files": {
                name: {"bytes": (output / name).stat().st_size, "sha256": sha256(output / name)}
                for name in ("keys.npy", "values.npy", "document_starts.npy")
            },
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": _versions(),
        }
        write_json(output / MANIFEST, manifest)
        (output / PROGRESS).unlink()
    return Datastore.open(output)


def _start(output: Path, settings: dict[str, Any], fingerprint: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Look at what is in the folder; the progress so far, with entries_done None before the text is read."""
    output.mkdir(parents=True, exist_ok=True)
    if (output / MANIFEST).exists():
        raise UserError(f"{output} already holds a finished datastore; choose another folder or delete it.")
    if not (output / PROGRESS).exists():
        if (output / "keys.npy").exists() or (output / "values.npy").exists():
            raise UserError(f"{output} holds arrays that this program did not make; choose another folder.")
        progress: dict[str, Any] = {"settings": settings, "fingerprint": fingerprint, "entries_done": None}
        write_json(output / PROGRESS, progress)
        return progress
    if not resume:
        raise UserError(f"{output} holds an unfinished dump; add --resume to go on with it, or delete the folder.")
    progress = read_json(output / PROGRESS)
    for name, value in settings.items():
        if progress["settings"].get(name) != value:
            raise UserError(
                f"The dump in {output} was begun with {name}={progress['settings'].get(name)}, now it is "
                f"{value}; give the same settings to resume it, or delete the folder."
            )
    check_fingerprint(progress["fingerprint"], fingerprint, "the dump's model", settings["model"]["pretrained"])
    return progress


def _write_values(lm: CausalHFLM, pieces: Iterable[Piece], output: Path, max_tokens: int | None) -> None:
    """Tokenize the text into ``values.npy`` and ``document_starts.npy``."""
    starts, count = array("q"), 0
    temporary = output / "values.npy.tmp"
    with open(temporary, "wb") as file, tqdm(unit=" tokens", unit_scale=True, desc="Tokenizing") as bar:
        write_npy_header(file, VALUE_DTYPE, (0,))
        header_length = file.tell()
        for batch in _batch_pieces(pieces):
            for begins, ids in zip((begins for begins, _ in batch), _tokenize(lm, batch), strict=True):
                if max_tokens is not None:
                    ids = ids[: max_tokens - count]
                if ids:
                    if begins:
                        starts.append(count)
                    file.write(np.asarray(ids, dtype=VALUE_DTYPE).tobytes())
                    count += len(ids)
                    bar.update(len(ids))
            if max_tokens is not None and count >= max_tokens:
                break
        file.seek(0)
        write_npy_header(file, VALUE_DTYPE, (count,))
        assert file.tell() == header_length, "a .npy header's length changed with its shape"
    if count == 0:
        temporary.unlink()
        raise UserError("The text is empty: no tokens to make a datastore of.")
    with open(output / "document_starts.npy.tmp", "wb") as file:
        np.save(file, np.frombuffer(starts, dtype=np.int64))
    replace_file(output / "document_starts.npy.tmp", output / "document_starts.npy")
    replace_file(temporary, output / "values.npy")


def _batch_pieces(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= TOKENIZER_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(lm: CausalHFLM, pieces: list[Piece]) -> list[list[int]]:
    """Token ids as HFLM.tok_encode gives them for scoring; special tokens only where a document begins."""
    bos = lm.tokenizer.decode(lm.prefix_token_id)
    at_beginning = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
    encoded: list[list[int]] = [[] for _ in pieces]
    for is_beginning, special in ((True, at_beginning), (False, {"add_special_tokens": False})):
        chosen = [i for i, (begins, text) in enumerate(pieces) if (begins and not text.startswith(bos)) == is_beginning]
        if chosen:
            ids = lm.tokenizer([pieces[i][1] for i in chosen], verbose=False, **special)["input_ids"]
            for i, piece_ids in zip(chosen, ids, strict=True):
                encoded[i] = piece_ids
    return encoded


def _write_keys(
    model: CausalLM,
    prefix_token_id: int,
    values: np.ndarray,
    starts: np.ndarray,
    settings: WindowSettings,
    output: Path,
    progress: dict[str, Any],
) -> None:
    """Append the keys of the entries that are not done yet; ``keys.npy`` appears when all are there."""
    partial, done = output / "keys.npy.part", progress["entries_done"]
    if done == len(values) and (output / "keys.npy").exists():
        return
    dimension = len(progress["fingerprint"]["key"])
    with open(partial, "r+b" if done else "w+b") as file:
        write_npy_header(file, KEY_DTYPE, (len(values), dimension))
        # What was written after the last recorded chunk is computed again.
        file.truncate(file.tell() + done * dimension * np.dtype(KEY_DTYPE).itemsize)
        file.seek(0, os.SEEK_END)
        bar = tqdm(total=len(values), initial=done, unit=" tokens", unit_scale=True, desc="Dumping keys")
        for chunk in chunks(cut_windows(starts, len(values), settings), settings):
            begin, end = chunk[0].start, chunk[-1].stop
            if end <= done:
                continue
            keys = np.empty((end - begin, dimension), dtype=KEY_DTYPE)
            for batch in batches(chunk, settings):
                for window, rows in zip(batch, _read_windows(model, prefix_token_id, values, batch), strict=True):
                    keys[window.start - begin : window.stop - begin] = rows
                    bar.update(window.stop - window.start)
            if not np.isfinite(keys).all():
                bad = begin + int(np.flatnonzero(~np.isfinite(keys).all(axis=1))[0])
                raise UserError(
                    f"The model's key for token {bad} is not a finite float16 number (NaN, or beyond 65,504); "
                    f"check the model's weights and dtype, or use knn_keytype=last_ffn_input."
                )
            file.write(keys.tobytes())
            file.flush()
            os.fsync(file.fileno())
            write_json(output / PROGRESS, progress | {"entries_done": end})
        bar.close()
    replace_file(partial, output / "keys.npy")


def chunks(windows: Iterable[Window], settings: WindowSettings) -> Iterator[list[Window]]:
    """Runs of windows in text order, each of some batches."""
    chunk: list[Window] = []
    for window in windows:
        chunk.append(window)
        if chunk[-1].stop - chunk[0].start >= BATCHES_PER_CHUNK * settings.batch_size * settings.stride:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def batches(chunk: list[Window], settings: WindowSettings) -> Iterator[list[Window]]:
    """Batches of windows of similar length, at most ``batch_size * max_length`` tokens with padding."""
    budget = settings.batch_size * settings.max_length
    batch: list[Window] = []
    for window in sorted(chunk, key=lambda window: -window.length):
        if batch and (len(batch) + 1) * batch[0].length > budget:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _read_windows(model: CausalLM, prefix: int, values: np.ndarray, batch: list[Window]) -> Iterator[np.ndarray]:
    """The keys of each window's entries."""
    input_ids = torch.zeros(len(batch), max(window.length for window in batch), dtype=torch.long)
    for row, window in zip(input_ids, batch, strict=True):
        row[: window.length] = torch.from_numpy(window.tokens(values, prefix))
    keys = model.encode(input_ids)[0].to(torch.float16).cpu().numpy()
    for row_keys, window in zip(keys, batch, strict=True):
        yield row_keys[window.length - (window.stop - window.start) : window.length]


def _versions() -> dict[str, str]:
    import transformers

    from knn_lm_eval import __version__

    return {"knn_lm_eval": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
