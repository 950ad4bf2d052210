"""Dumping a datastore: text -> token ids (the values) -> windows -> one forward pass each -> keys.

The token ids are written first and are the values, so that the number of entries, the disk space and the time
left are known before the LM runs, and a resumed dump needs nothing but the folder. Keys are written chunk by chunk
at their place in one file; a chunk is always computed from the same batches, so a dump gives the same bytes however
often it was interrupted and however many processes shared it. How far it is is in ``knn_lm_eval.make.dump_progress``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.fingerprint import check_fingerprint, check_store_model, take_fingerprint
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.projection import Projection
from knn_lm_eval.make.directions import (
    copy_projection,
    sample_of_text,
    sample_size,
    shared_projection,
    write_projection,
)
from knn_lm_eval.make.dump_progress import (
    FAILED,
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
from knn_lm_eval.make.finished_dump import UNFINISHED_KEYS, finish_dump, train_index_of
from knn_lm_eval.make.index_dump import IndexDump
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.key_file import KeyFile
from knn_lm_eval.make.key_reading import KeyReader, ReadBefore
from knn_lm_eval.make.text import Piece
from knn_lm_eval.make.tokens import write_values
from knn_lm_eval.make.windows import Window, WindowSettings, chunks, cut_windows
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import (
    DOCUMENT_STARTS,
    KEYS,
    MANIFEST,
    PROJECTION,
    VALUES,
    ProjectionRecord,
)
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import check_free_space, disk_errors_in
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.processes import Processes


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
    keys: int | Literal["all", "none"] = "all",
    index: IndexPlan | None = None,
    projection_of: str | Path | None = None,
    memory: int | None = None,
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
        ``all`` keeps the LM's hidden states as they are, ``none`` keeps none: they go into an index.
    index : that index; None is the default one.
    projection_of : a datastore of the same model whose projection is taken, instead of one of the text's own.
    memory : bytes that each process may take for that index, with all it has; None takes half of what is available
        beside that. The same index comes of it.
    resume : go on with an unfinished dump in ``output``.
    source, model_args : kept in the manifest.
    processes : those that share this dump and all call this function; None is this one alone.

    Raises
    ------
    UserError
        Where the folder is taken, the text is empty, the disk is full, ``memory`` is too little, ``keys`` is more than
        the model has, or the model gives keys that float16 cannot hold.
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
            index=index,
            projection_of=projection_of,
            memory=memory,
            source=source,
            model_args=model_args,
        )
    )
    with ExitStack() as held:
        processes.first_does(lambda: held.enter_context(one_dump_in(Path(output))))
        rank, count = processes.rank, processes.count
        processes.first_does(lambda: dump.prepare(pieces, resume, count))
        if keys == "none":
            processes.each_does(lambda: dump.read_sample(rank, count))
            processes.first_does(lambda: train_index_of(Path(output)))
        processes.each_does(lambda: dump.write_share(rank, count, show_progress=rank == 0))
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

    Where no keys are kept, two steps come before ``write_share``: ``read_sample`` for each share, and
    ``train_index_of`` once.

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
        keys: int | Literal["all", "none"] = "all",
        index: IndexPlan | None = None,
        projection_of: str | Path | None = None,
        memory: int | None = None,
        source: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        self.lm, self.output, self.max_tokens, self.memory = lm, output, max_tokens, memory
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
        self.shared = None if projection_of is None else Datastore.open(projection_of)
        if self.shared is not None:
            keys = len(shared_projection(self.shared).T)
            settings["projection_sha256"] = self.shared.manifest.files[PROJECTION]["sha256"]
            check_store_model(self.shared.manifest, self.model, lm.tokenizer, self.name)
        elif keys != "all":
            settings["keys"] = keys
        if (index is not None or memory is not None) and keys != "none":
            raise UserError("An index is made where keys=none, which memory is for; with keys, use build_index.")
        self.keeps_keys = keys != "none"
        if not self.keeps_keys:
            plan = index or IndexPlan()
            plan.check()
            settings["index"] = vars(plan)
        self.states = dump_states(output, settings)
        self.fingerprint = take_fingerprint(self.model, lm.tokenizer)
        self.width = len(self.fingerprint["key"])
        self.is_projected, self.dimension = isinstance(keys, int), keys if isinstance(keys, int) else self.width
        if not 1 <= self.dimension <= self.width:
            raise UserError(f"Keys of {self.name} have {self.width} numbers, of which --keys {keys} cannot be kept.")

    def _keys(self, count: int) -> KeyFile:
        return KeyFile(self.output / UNFINISHED_KEYS, count, self.dimension)

    def prepare(self, pieces: Iterable[Piece], resume: bool, shares: int = 1) -> None:
        """Tokenize the text unless that is done, make room for the keys, and note which of them are there.

        Parameters
        ----------
        shares : how many are going to be written side by side.
        """
        output = self.output
        with disk_errors_in(output):
            notes = self._start(resume)
            if notes["runs_done"] is None:
                write_values(self.lm, pieces, output, self.max_tokens)
            if not self.keeps_keys:
                if not (output / MANIFEST).exists():
                    self.states.note(**notes | {"runs_done": notes["runs_done"] or []})
                    IndexDump(output).prepare(shares, self.memory)
                return
            count = len(map_npy(output / VALUES, START_ANEW))
            runs = self._runs_in_place(runs_written(output), count)
            if self.is_projected and not ("projection" in notes and (output / PROJECTION).exists()):
                self.states.note(**notes | {"runs_done": []})
                notes["projection"], runs = self._write_projection(), []
            self.states.note(**notes | {"runs_done": runs})
            for noted in (*output.glob("progress.*.json"), output / FAILED):
                noted.unlink(missing_ok=True)
            if left := count - count_entries(runs):
                keys = self._keys(count)
                check_free_space(output, left * keys.row_bytes, f"the keys of {count:,} tokens")
                keys.make_room(anew=not runs)

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
        return runs if self._keys(count).has_room() else []

    def _write_projection(self) -> ProjectionRecord:
        """Have the LM read a sample of the text, and find the directions to keep; the same ones each time."""
        if self.shared is not None:
            return copy_projection(self.shared, self.output)
        values, starts = self._text()
        reader = KeyReader(self.model, self.lm.prefix_token_id, self.windows, self.width, values)
        sample = sample_of_text(reader, starts, sample_size(self.width), show_progress=True)
        return write_projection(self.output, sample, self.width, self.dimension)

    def _text(self) -> tuple[np.ndarray, np.ndarray]:
        """The values, and where the documents start."""
        return map_npy(self.output / VALUES, START_ANEW), map_npy(self.output / DOCUMENT_STARTS, START_ANEW)

    def read_sample(self, share: int, shares: int) -> None:
        """Read one of ``shares`` parts of the sample that the index is trained on; see ``write_share``."""
        if (self.output / MANIFEST).exists():
            return
        with self._working():
            IndexDump(self.output).read_sample(self._reader(), share, shares)

    def write_share(self, share: int, shares: int, show_progress: bool = False) -> None:
        """Write the keys of one of ``shares`` runs of the chunks that were not done when ``prepare`` ended.

        Where this share was begun before, it goes on.
        """
        if (self.output / MANIFEST).exists():
            return
        with self._working() as notes:
            values, starts = self._text()
            left = len(values) - count_entries(notes["runs_done"])
            if left == 0 and self.keeps_keys:
                return
            with tqdm(
                total=len(values),
                initial=entries_done(self.output),
                unit=" tokens",
                unit_scale=True,
                desc="Dumping keys",
                disable=not show_progress,
            ) as bar:
                if not self.keeps_keys:
                    into = IndexDump(self.output)
                    into.write_share(self._reader(into.sample), share, shares, bar)
                    return
                of_text = chunks(cut_windows(starts, len(values), self.windows), self.windows)
                todo = share_of(not_done(of_text, notes["runs_done"]), left, share, shares)
                self._write_chunks(todo, self._keys(len(values)), share_states(self.output, share), bar)

    @contextmanager
    def _working(self) -> Iterator[dict[str, Any]]:
        """Work on a share, by the notes; the others learn where it fails."""
        with disk_errors_in(self.output):
            notes = self.states.notes()
            self._check_fingerprint(notes)
            try:
                yield notes
            except Exception:
                with suppress(OSError):
                    (self.output / FAILED).touch()
                raise

    def _reader(self, read_before: ReadBefore | None = None) -> KeyReader:
        """What reads the text, with keys as they are kept."""
        model = self.model
        if self.is_projected:
            model = model.projected(Projection(map_npy(self.output / PROJECTION, START_ANEW)))
        return KeyReader(model, self.lm.prefix_token_id, self.windows, self.dimension, self._text()[0], read_before)

    def _write_chunks(self, todo: Iterable[list[Window]], keys: KeyFile, noted: SavedStates, bar: tqdm) -> None:
        """Write the keys of the chunks that ``noted`` does not say are done, each at its place, until one fails."""
        runs: list[Run] = noted.notes().get("runs_done", [])
        reader = self._reader()
        for chunk in todo:
            begin, end = chunk[0].start, chunk[-1].stop
            if runs and end <= runs[-1][1]:
                continue
            if (self.output / FAILED).exists():
                return
            keys.write(begin, reader.of_chunk(chunk, begin, end, bar.update))
            runs = joined([*runs, [begin, end]])
            noted.note(runs_done=runs)
            if not bar.disable:  # with what the others have done
                bar.n = entries_done(self.output)
                bar.refresh()
