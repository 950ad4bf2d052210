"""Dumping a datastore: text -> token ids (the values) -> windows -> one forward pass each -> keys.

The token ids are written first and are the values, so that the number of entries, the disk space and the time
left are known before the LM runs, and a resumed dump needs nothing but the folder. Keys are written chunk by chunk
at their place in one file; a chunk is always computed from the same batches, so a dump gives the same bytes however
often it was interrupted and however many processes shared it.

While a dump is at work its folder holds ``progress.json`` (the settings, and the runs of entries that were done when
the dump was last started) and, for each process, ``progress.N.json`` with the runs that it has done since.
"""

from __future__ import annotations

import datetime
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_fingerprint, take_fingerprint
from knn_lm_eval.lm.language_model import CausalLM
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.text import Piece
from knn_lm_eval.make.tokens import VALUE_DTYPE, write_values
from knn_lm_eval.make.windows import Window, WindowSettings, batches, chunks, cut_windows
from knn_lm_eval.store.datastore import FORMAT, FORMAT_VERSION, MANIFEST, PROGRESS, Datastore, file_record
from knn_lm_eval.system.files import (
    check_free_space,
    disk_errors_in,
    read_json,
    replace_file,
    write_json,
    write_npy_header,
)
from knn_lm_eval.system.processes import Processes

KEY_DTYPE = np.float16
UNFINISHED_KEYS = "keys.npy.part"
# Who fails leaves this file, so that the others stop at their next chunk.
FAILED = "dump.failed"

# Entries [begin, end) that are done.
Run = list[int]


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
    processes: Processes | None = None,
) -> Datastore:
    """Write the datastore of a text.

    Parameters
    ----------
    lm : the loaded LM.
    pieces : the text, from ``knn_lm_eval.make.text``; not read when an unfinished dump's tokens are complete.
    output : the folder to write; made if need be.
    key_type, key_module : see ``CausalLM``.
    max_length : tokens per window; None takes the model's own limit, at most 1,024.
    stride, batch_size : see ``WindowSettings``; stride None is ``max_length``.
    max_tokens : stop after so many entries.
    resume : go on with an unfinished dump in ``output``.
    source, model_args : kept in the manifest.
    processes : those that share this dump and all call this function; None is this one alone.

    Raises
    ------
    UserError
        Where the folder is taken, the text is empty, the disk is full, or the model gives keys that float16
        cannot hold.
    """
    processes = processes or Processes()
    dump = processes.each_does(
        lambda: Dump(
            lm,
            Path(output),
            key_type=key_type,
            key_module=key_module,
            max_length=max_length,
            stride=stride,
            batch_size=batch_size,
            max_tokens=max_tokens,
            source=source,
            model_args=model_args,
        )
    )
    processes.first_does(lambda: dump.prepare(pieces, resume))
    processes.each_does(lambda: dump.write_share(processes.rank, processes.count, show_progress=processes.rank == 0))
    processes.first_does(lambda: finish_dump(Path(output)))
    return Datastore.open(output)


class Dump:
    """A dump in three steps: ``prepare`` once, ``write_share`` for each share of the keys, ``finish_dump`` once.

    Parameters
    ----------
    As for ``dump_datastore``.
    """

    def __init__(
        self,
        lm: CausalHFLM,
        output: Path,
        *,
        key_type: str = "last_ffn_input",
        key_module: str | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 4,
        max_tokens: int | None = None,
        source: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        self.lm, self.output, self.max_tokens = lm, output, max_tokens
        max_length = max_length or min(lm.max_length, 1024)
        self.windows = WindowSettings(max_length, stride or max_length, batch_size)
        self.model = CausalLM(lm.model, key_type, lm.mixed_precision_dtype, key_module)
        inner = self.model.inner
        self.settings: dict[str, Any] = {
            "key_type": key_type,
            "windows": {**vars(self.windows), "prefix_token_id": lm.prefix_token_id},
            "max_tokens": max_tokens,
            "source": source or {},
            "model": {
                "pretrained": lm.pretrained if isinstance(lm.pretrained, str) else type(inner).__name__,
                "args": model_args or {},
                "class": type(inner).__name__,
                "dtype": str(inner.dtype).removeprefix("torch."),
                "vocabulary": self.model.vocabulary_size,
            },
        }
        self.fingerprint = take_fingerprint(self.model, lm.tokenizer)

    @property
    def _row_bytes(self) -> int:
        return len(self.fingerprint["key"]) * np.dtype(KEY_DTYPE).itemsize

    def prepare(self, pieces: Iterable[Piece], resume: bool) -> None:
        """Tokenize the text unless that is done, make room for the keys, and note which of them are there."""
        output = self.output
        with disk_errors_in(output):
            progress = self._start(resume)
            if progress["runs_done"] is None:
                write_values(self.lm, pieces, output, self.max_tokens)
                progress["runs_done"] = []
            count = len(np.load(output / "values.npy", mmap_mode="r"))
            runs = progress["runs_done"] = self._runs_in_place(_runs_noted(output, progress), count)
            write_json(output / PROGRESS, progress)
            for noted in (*output.glob("progress.*.json"), output / FAILED):
                noted.unlink(missing_ok=True)
            if (left := count - _entries(runs)) == 0:
                return
            check_free_space(output, left * self._row_bytes, f"the keys of {count:,} tokens")
            with open(output / UNFINISHED_KEYS, "r+b" if runs else "w+b") as file:
                write_npy_header(file, KEY_DTYPE, (count, len(self.fingerprint["key"])))
                # All of it at once (disks keep no room for what was never written): each writes at its own place.
                file.truncate(file.tell() + count * self._row_bytes)

    def _start(self, resume: bool) -> dict[str, Any]:
        """Look at what is in the folder; the progress so far, with runs_done None before the text is read."""
        output = self.output
        output.mkdir(parents=True, exist_ok=True)
        if (output / MANIFEST).exists():
            raise UserError(f"{output} already holds a finished datastore; choose another folder or delete it.")
        if not (output / PROGRESS).exists():
            if (output / "keys.npy").exists() or (output / "values.npy").exists():
                raise UserError(f"{output} holds arrays that this program did not make; choose another folder.")
            progress: dict[str, Any] = {
                "settings": self.settings,
                "key_module": self.model.key_module_name,
                "fingerprint": self.fingerprint,
                "runs_done": None,
            }
            write_json(output / PROGRESS, progress)
            return progress
        if not resume:
            raise UserError(f"{output} holds an unfinished dump; add --resume to go on with it, or delete the folder.")
        progress = read_json(output / PROGRESS)
        if "runs_done" not in progress:
            raise UserError(f"The dump in {output} was begun by another version of this program; delete the folder.")
        for name, value in self.settings.items():
            if progress["settings"].get(name) != value:
                raise UserError(
                    f"The dump in {output} was begun with {name}={progress['settings'].get(name)}, now it is "
                    f"{value}; give the same settings to resume it, or delete the folder."
                )
        self._check_fingerprint(progress)
        return progress

    def _check_fingerprint(self, progress: dict[str, Any]) -> None:
        begun_with, now = progress["fingerprint"], self.fingerprint
        if str(begun_with) != str(now):  # as text NaN, which a model's keys may be, is the same as NaN
            check_fingerprint(begun_with, now, "the dump's model", self.settings["model"]["pretrained"])

    def _runs_in_place(self, runs: list[Run], count: int) -> list[Run]:
        """``runs``, or none where the file that should hold them is gone or was cut."""
        if _entries(runs) == count and (self.output / "keys.npy").exists():
            return runs
        partial = self.output / UNFINISHED_KEYS
        return runs if partial.exists() and partial.stat().st_size >= count * self._row_bytes else []

    def write_share(self, share: int, shares: int, show_progress: bool = False) -> None:
        """Write the keys of one of ``shares`` runs of the chunks that were not done when ``prepare`` ended.

        Where this share was begun before, it goes on.
        """
        output, noted = self.output, self.output / f"progress.{share}.json"
        with disk_errors_in(output):
            progress = read_json(output / PROGRESS)
            self._check_fingerprint(progress)
            values = np.load(output / "values.npy", mmap_mode="r")
            starts = np.load(output / "document_starts.npy", mmap_mode="r")
            runs: list[Run] = read_json(noted)["runs_done"] if noted.exists() else []
            todo = chunks(cut_windows(starts, len(values), self.windows), self.windows)
            left = len(values) - _entries(progress["runs_done"])
            if left == 0:
                return
            header = (output / UNFINISHED_KEYS).stat().st_size - len(values) * self._row_bytes
            try:
                with (
                    # For writing only: a network disk that had read a page could write it back over another's keys.
                    open(os.open(output / UNFINISHED_KEYS, os.O_WRONLY), "wb") as file,
                    tqdm(
                        total=len(values),
                        initial=entries_done(output),
                        unit=" tokens",
                        unit_scale=True,
                        desc="Dumping keys",
                        disable=not show_progress,
                    ) as bar,
                ):
                    for chunk in _share_of(_not_done(todo, progress["runs_done"]), left, share, shares):
                        begin, end = chunk[0].start, chunk[-1].stop
                        if runs and end <= runs[-1][1]:
                            continue
                        if (output / FAILED).exists():
                            return
                        keys = self._keys_of(chunk, values, bar)
                        file.seek(header + begin * self._row_bytes)
                        file.write(keys.tobytes())
                        file.flush()
                        os.fsync(file.fileno())
                        runs = _joined([*runs, [begin, end]])
                        write_json(noted, {"runs_done": runs})
                        if show_progress:  # with what the others have done
                            bar.n = entries_done(output)
                            bar.refresh()
            except Exception:
                with suppress(OSError):
                    (output / FAILED).touch()
                raise

    def _keys_of(self, chunk: list[Window], values: np.ndarray, bar: tqdm) -> np.ndarray:
        """The keys of a chunk's entries, float16 ``[entries, dimension]``."""
        begin, end = chunk[0].start, chunk[-1].stop
        keys = np.empty((end - begin, len(self.fingerprint["key"])), dtype=KEY_DTYPE)
        for batch in batches(chunk, self.windows):
            read = _read_windows(self.model, self.lm.prefix_token_id, values, batch)
            for window, rows in zip(batch, read, strict=True):
                keys[window.start - begin : window.stop - begin] = rows
                bar.update(window.stop - window.start)
        if not np.isfinite(keys).all():
            bad = begin + int(np.flatnonzero(~np.isfinite(keys).all(axis=1))[0])
            raise UserError(
                f"The model's key for token {bad} is not a finite float16 number (NaN, or beyond 65,504); "
                f"check the model's weights and dtype, or use knn_keytype=last_ffn_input."
            )
        return keys


def finish_dump(output: Path) -> None:
    """Make a datastore of a folder in which all shares' keys are written."""
    with disk_errors_in(output):
        progress = read_json(output / PROGRESS)
        values = np.load(output / "values.npy", mmap_mode="r")
        starts = np.load(output / "document_starts.npy", mmap_mode="r")
        assert _entries(_runs_noted(output, progress)) == len(values), "a share of the keys is missing"
        if (output / UNFINISHED_KEYS).exists():
            replace_file(output / UNFINISHED_KEYS, output / "keys.npy")
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "count": len(values),
            "dimension": len(progress["fingerprint"]["key"]),
            "documents": len(starts),
            "key_dtype": np.dtype(KEY_DTYPE).name,
            "value_dtype": np.dtype(VALUE_DTYPE).name,
            **progress["settings"],
            "key_module": progress["key_module"],
            "fingerprint": progress["fingerprint"],
            "files": {name: file_record(output / name) for name in ("keys.npy", "values.npy", "document_starts.npy")},
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": _versions(),
        }
        write_json(output / MANIFEST, manifest)
        for noted in output.glob("progress.*"):
            noted.unlink()


def entries_in_all(output: Path) -> int | None:
    """How many entries the unfinished dump in ``output`` will have; None before the text is tokenized."""
    if not (output / PROGRESS).exists() or read_json(output / PROGRESS)["runs_done"] is None:
        return None
    return len(np.load(output / "values.npy", mmap_mode="r"))


def entries_done(output: Path) -> int:
    """How many keys the unfinished dump in ``output`` has written; 0 before the text is tokenized."""
    return _entries(_runs_noted(output, read_json(output / PROGRESS)))


def _runs_noted(output: Path, progress: dict[str, Any]) -> list[Run]:
    """All that is done, by ``progress`` and by the shares' own files."""
    shares = [read_json(noted)["runs_done"] for noted in output.glob("progress.*.json")]
    return _joined([*(progress["runs_done"] or []), *(run for runs in shares for run in runs)])


def _joined(runs: list[Run]) -> list[Run]:
    """The same entries in as few runs as can be, in order."""
    joined: list[Run] = []
    for begin, end in sorted(runs):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([begin, end])
    return joined


def _entries(runs: list[Run]) -> int:
    return sum(end - begin for begin, end in runs)


def _not_done(chunks: Iterable[list[Window]], runs: list[Run]) -> Iterator[list[Window]]:
    begins = [begin for begin, _ in runs]
    for chunk in chunks:
        run = bisect_right(begins, chunk[0].start) - 1
        if run < 0 or runs[run][1] < chunk[-1].stop:
            yield chunk


def _share_of(chunks: Iterable[list[Window]], entries: int, share: int, shares: int) -> Iterator[list[Window]]:
    """Share number ``share`` of ``chunks``, which hold so many entries: neighbours in the text, about as many each."""
    before = 0
    for chunk in chunks:
        if before * shares // entries == share:
            yield chunk
        before += chunk[-1].stop - chunk[0].start


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

    from knn_lm_eval.version import __version__

    return {"knn_lm_eval": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
