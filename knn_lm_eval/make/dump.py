"""Dumping a datastore: text -> token ids (the values) -> windows -> one forward pass each -> keys.

The token ids are written first and are the values, so that the number of entries, the disk space and the time
left are known before the LM runs, and a resumed dump needs nothing but the folder. Keys are written chunk by chunk
at their place in one file; a chunk is always computed from the same batches, so a dump gives the same bytes however
often it was interrupted and however many processes shared it. How far it is is in ``knn_lm_eval.make.dump_progress``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_fingerprint, take_fingerprint
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.projection import Projection
from knn_lm_eval.make.directions import sample_of_text, sample_size, write_projection
from knn_lm_eval.make.dump_progress import (
    START_ANEW,
    Run,
    count_entries,
    dump_states,
    entries_done,
    joined,
    not_done,
    runs_written,
    share_of,
    share_states,
)
from knn_lm_eval.make.text import Piece
from knn_lm_eval.make.tokens import VALUE_DTYPE, write_values
from knn_lm_eval.make.window_keys import keys_of_windows
from knn_lm_eval.make.windows import Window, WindowSettings, batches, chunks, cut_windows
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import (
    DOCUMENT_STARTS,
    KEYS,
    MANIFEST,
    ORDER_OF_DUMPS,
    PROJECTION,
    VALUES,
    Manifest,
    ProjectionRecord,
    file_record,
    now,
)
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import check_free_space, disk_errors_in, replace_file, write_npy_header
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.processes import Processes
from knn_lm_eval.version import __version__

KEY_DTYPE = np.float16
UNFINISHED_KEYS = "keys.npy.part"
# Who fails leaves this file, so that the others stop at their next chunk.
FAILED = "dump.failed"


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
    keys: int | Literal["all"] = "all",
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
    key_type, key_module : see ``LanguageModel``.
    max_length : tokens per window; None takes the model's own limit, at most 1,024.
    stride, batch_size : see ``WindowSettings``; stride None is ``max_length``.
    max_tokens : stop after so many entries.
    keys : the numbers that a key keeps, of a projection to so many directions (``knn_lm_eval.make.directions``);
        ``all`` keeps the LM's hidden states as they are.
    resume : go on with an unfinished dump in ``output``.
    source, model_args : kept in the manifest.
    processes : those that share this dump and all call this function; None is this one alone.

    Raises
    ------
    UserError
        Where the folder is taken, the text is empty, the disk is full, ``keys`` is more than the model has, or the
        model gives keys that float16 cannot hold.
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
            keys=keys,
            source=source,
            model_args=model_args,
        )
    )
    with ExitStack() as held:
        processes.first_does(lambda: held.enter_context(one_dump_in(Path(output))))
        processes.first_does(lambda: dump.prepare(pieces, resume))
        processes.each_does(
            lambda: dump.write_share(processes.rank, processes.count, show_progress=processes.rank == 0)
        )
        processes.first_does(lambda: finish_dump(Path(output)))
    return Datastore.open(output)


@contextmanager
def one_dump_in(output: Path) -> Iterator[None]:
    """Hold the folder ``output`` for this dump, whatever processes share it; raises UserError where another does."""
    with disk_errors_in(output):
        output.mkdir(parents=True, exist_ok=True)
        with locked(output / ".lock", f"the dump in {output}"):
            yield


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
        keys: int | Literal["all"] = "all",
        source: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        self.lm, self.output, self.max_tokens = lm, output, max_tokens
        max_length = max_length or min(lm.max_length, 1024)
        self.windows = WindowSettings(max_length, stride or max_length, batch_size)
        self.model = LanguageModel(lm.model, key_type, lm.mixed_precision_dtype, key_module)
        inner = self.model.inner
        self.name = lm.pretrained if isinstance(lm.pretrained, str) else type(inner).__name__
        settings = {
            "key_type": key_type,
            "windows": {**vars(self.windows), "prefix_token_id": lm.prefix_token_id},
            "max_tokens": max_tokens,
            "source": source or {},
            "model": {
                "pretrained": self.name,
                "args": model_args or {},
                "class": type(inner).__name__,
                "dtype": str(inner.dtype).removeprefix("torch."),
                "vocabulary": self.model.vocabulary_size,
            },
        }
        if keys != "all":
            settings["keys"] = keys
        self.states = dump_states(output, settings)
        self.fingerprint = take_fingerprint(self.model, lm.tokenizer)
        self.width = len(self.fingerprint["key"])
        self.is_projected, self.dimension = keys != "all", self.width if keys == "all" else keys
        if not 1 <= self.dimension <= self.width:
            raise UserError(f"Keys of {self.name} have {self.width} numbers, of which --keys {keys} cannot be kept.")

    @property
    def _row_bytes(self) -> int:
        return self.dimension * np.dtype(KEY_DTYPE).itemsize

    def prepare(self, pieces: Iterable[Piece], resume: bool) -> None:
        """Tokenize the text unless that is done, make room for the keys, and note which of them are there."""
        output = self.output
        with disk_errors_in(output):
            notes = self._start(resume)
            if notes["runs_done"] is None:
                write_values(self.lm, pieces, output, self.max_tokens)
            count = len(map_npy(output / VALUES, START_ANEW))
            runs = self._runs_in_place(runs_written(output), count)
            if self.is_projected and not ("projection" in notes and (output / PROJECTION).exists()):
                self.states.note(**notes | {"runs_done": []})
                notes["projection"], runs = self._write_projection(), []
            self.states.note(**notes | {"runs_done": runs})
            for noted in (*output.glob("progress.*.json"), output / FAILED):
                noted.unlink(missing_ok=True)
            if left := count - count_entries(runs):
                check_free_space(output, left * self._row_bytes, f"the keys of {count:,} tokens")
                self._make_room(count, anew=not runs)

    def _start(self, resume: bool) -> dict[str, Any]:
        """Look at what is in the folder; what was noted so far, with ``runs_done`` None before the text is read."""
        output = self.output
        output.mkdir(parents=True, exist_ok=True)
        begun = self.states.file.exists()
        if (output / MANIFEST).exists() and not (begun and resume):  # it may lack its last step only
            raise UserError(f"{output} already holds a finished datastore; choose another folder or delete it.")
        if not begun:
            if (output / KEYS).exists() or (output / VALUES).exists():
                raise UserError(f"{output} holds arrays that this program did not make; choose another folder.")
            notes = {"key_module": self.model.key_module_name, "fingerprint": self.fingerprint, "runs_done": None}
            self.states.begin(**notes)
            return notes
        if not resume:
            raise UserError(f"{output} holds an unfinished dump; add --resume to go on with it, or delete the folder.")
        if not {"key_module", "fingerprint", "runs_done"} <= self.states.notes().keys():
            raise UserError(f"The dump in {output} was begun by another version of this program; delete the folder.")
        notes = self.states.begin_or_resume(resume)
        self._check_fingerprint(notes)
        return notes

    def _check_fingerprint(self, notes: dict[str, Any]) -> None:
        begun_with, now = notes["fingerprint"], self.fingerprint
        if str(begun_with) != str(now):  # as text NaN, which a model's keys may be, is the same as NaN
            check_fingerprint(begun_with, now, "the dump's model", self.name)

    def _runs_in_place(self, runs: list[Run], count: int) -> list[Run]:
        """``runs``, or none where the file that should hold them is gone or was cut."""
        if count_entries(runs) == count and (self.output / KEYS).exists():
            return runs
        partial = self.output / UNFINISHED_KEYS
        return runs if partial.exists() and partial.stat().st_size >= count * self._row_bytes else []

    def _write_projection(self) -> ProjectionRecord:
        """Have the LM read a sample of the text, and find the directions to keep; the same ones each time."""
        values, starts = self._text()
        keys = sample_size(self.width)
        prefix = self.lm.prefix_token_id
        sample = sample_of_text(self.model, prefix, values, starts, self.windows, keys, show_progress=True)
        return write_projection(self.output, sample, self.width, self.dimension)

    def _text(self) -> tuple[np.ndarray, np.ndarray]:
        """The values, and where the documents start."""
        return map_npy(self.output / VALUES, START_ANEW), map_npy(self.output / DOCUMENT_STARTS, START_ANEW)

    def _make_room(self, count: int, anew: bool) -> None:
        """Make the file of unfinished keys as long as it will be."""
        with open(self.output / UNFINISHED_KEYS, "w+b" if anew else "r+b") as file:
            write_npy_header(file, KEY_DTYPE, (count, self.dimension))
            # All of it at once (disks keep no room for what was never written): each writes at its own place.
            file.truncate(file.tell() + count * self._row_bytes)

    def write_share(self, share: int, shares: int, show_progress: bool = False) -> None:
        """Write the keys of one of ``shares`` runs of the chunks that were not done when ``prepare`` ended.

        Where this share was begun before, it goes on.
        """
        output = self.output
        with disk_errors_in(output):
            notes = self.states.notes()
            self._check_fingerprint(notes)
            values, starts = self._text()
            left = len(values) - count_entries(notes["runs_done"])
            if left == 0:
                return
            todo = not_done(chunks(cut_windows(starts, len(values), self.windows), self.windows), notes["runs_done"])
            bar = tqdm(
                total=len(values),
                initial=entries_done(output),
                unit=" tokens",
                unit_scale=True,
                desc="Dumping keys",
                disable=not show_progress,
            )
            try:
                with bar:
                    self._write_chunks(share_of(todo, left, share, shares), values, share_states(output, share), bar)
            except Exception:
                with suppress(OSError):
                    (output / FAILED).touch()
                raise

    def _write_chunks(self, todo: Iterable[list[Window]], values: np.ndarray, noted: SavedStates, bar: tqdm) -> None:
        """Write the keys of the chunks that ``noted`` does not say are done, each at its place, until one fails."""
        runs: list[Run] = noted.notes().get("runs_done", [])
        path = self.output / UNFINISHED_KEYS
        header = path.stat().st_size - len(values) * self._row_bytes
        model = self._projected_model()
        # For writing only: a network disk that had read a page could write it back over another's keys.
        with open(os.open(path, os.O_WRONLY), "wb") as file:
            for chunk in todo:
                begin, end = chunk[0].start, chunk[-1].stop
                if runs and end <= runs[-1][1]:
                    continue
                if (self.output / FAILED).exists():
                    return
                keys = self._keys_of(model, chunk, values, bar)
                file.seek(header + begin * self._row_bytes)
                file.write(keys.tobytes())
                file.flush()
                os.fsync(file.fileno())
                runs = joined([*runs, [begin, end]])
                noted.note(runs_done=runs)
                if not bar.disable:  # with what the others have done
                    bar.n = entries_done(self.output)
                    bar.refresh()

    def _projected_model(self) -> LanguageModel:
        """The LM, whose keys are as they are kept."""
        if not self.is_projected:
            return self.model
        return self.model.projected(Projection(map_npy(self.output / PROJECTION, START_ANEW)))

    def _keys_of(self, model: LanguageModel, chunk: list[Window], values: np.ndarray, bar: tqdm) -> np.ndarray:
        """The keys of a chunk's entries, float16 ``[entries, dimension]``."""
        begin, end = chunk[0].start, chunk[-1].stop
        keys = np.empty((end - begin, self.dimension), dtype=KEY_DTYPE)
        for batch in batches(chunk, self.windows):
            read = keys_of_windows(model, self.lm.prefix_token_id, values, batch)
            for window, rows in zip(batch, read, strict=True):
                keys[window.start - begin : window.stop - begin] = rows.to(torch.float16).cpu().numpy()
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
        states = dump_states(output)
        if (output / MANIFEST).exists():  # it was interrupted when all was done but this
            states.remove()
            return
        settings, notes = states.settings, states.notes()
        values, starts = (map_npy(output / name, START_ANEW) for name in (VALUES, DOCUMENT_STARTS))
        assert entries_done(output) == len(values), "a share of the keys is missing"
        if (output / UNFINISHED_KEYS).exists():
            replace_file(output / UNFINISHED_KEYS, output / KEYS)
        names = [KEYS, VALUES, DOCUMENT_STARTS] + ([PROJECTION] if notes.get("projection") else [])
        manifest = Manifest(
            count=len(values),
            dimension=map_npy(output / KEYS, START_ANEW).shape[1],
            projection=notes.get("projection"),
            documents=len(starts),
            key_dtype=np.dtype(KEY_DTYPE).name,
            value_dtype=np.dtype(VALUE_DTYPE).name,
            key_type=settings["key_type"],
            windows=settings["windows"],
            max_tokens=settings["max_tokens"],
            source=settings["source"],
            model=settings["model"],
            key_module=notes["key_module"],
            fingerprint=notes["fingerprint"],
            files={name: file_record(output / name) for name in names},
            created=now(),
            versions=_versions(),
            order=ORDER_OF_DUMPS,
        )
        states.note(**notes | {"runs_done": runs_written(output)})  # so that it is all in one file, which goes last
        manifest.write(output)
        states.remove()


def _versions() -> dict[str, str]:
    return {"knn_lm_eval": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
