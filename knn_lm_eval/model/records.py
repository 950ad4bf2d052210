"""Writing token records: what scoring knew of each token, in Parquet, row group by row group as scoring goes on.

What they hold, and reading them, is ``report/record_files.py``. A file is written under a hidden name and gets its own
when it is whole, and then the JSON beside it says that it counts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.api.instance import Instance

from knn_lm_eval.errors import UserError, shortened
from knn_lm_eval.model.token_figures import TokenFigures
from knn_lm_eval.report.record_files import COLUMNS, FORMAT, FORMAT_VERSION, HEAVIEST, NOT_KNOWN, RUN, read_parts
from knn_lm_eval.system.files import check_free_space, check_writable, disk_errors_in, replace_file, sha256
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.seals import write_sealed_json
from knn_lm_eval.version import __version__

ROWS_PER_GROUP = 2**16  # 80 bytes each in memory
ROW_BYTES = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())
SCHEMA = pa.schema([pa.field(name, pa.from_numpy_dtype(np.dtype(kind))) for name, kind in COLUMNS.items()])

# A text's tokens int64 [n] -> int32 [n]: how many tokens up to and with each stand in the datastore one after the
# other, at most.
Overlaps = Callable[[np.ndarray], np.ndarray]


class Label(NamedTuple):
    """Which request a text is: the number of its task, its document, and its number among the document's."""

    task: int
    document: int
    request: int


class RecordedTexts(NamedTuple):
    """Texts that are scored in windows.

    Attributes
    ----------
    tasks : the names that ``labels`` count.
    labels : one for each text; None for one that was asked for twice, and is recorded once.
    windows : of each text (context, continuation).
    starts : the position of each text's first scored token.
    max_length : tokens that a window reads at most.
    """

    tasks: list[str]
    labels: list[Label | None]
    windows: Sequence[Sequence[tuple[list[int], list[int]]]]
    starts: Sequence[int]
    max_length: int


def label_requests(requests: Sequence[Instance] | None, count: int) -> tuple[list[str], list[Label | None]]:
    """The tasks' names and each request's label; requests that are of no task are numbered.

    Where lm-eval gives several processes their shares, it has those with fewer do their last request again.
    """
    if requests is None:
        return [""], [Label(0, number, 0) for number in range(count)]
    tasks = sorted({request.task_name or "" for request in requests})
    numbers = {task: number for number, task in enumerate(tasks)}
    labels: list[Label | None] = []
    seen: set[int] = set()
    for number, request in enumerate(requests):
        document = number if request.doc_id is None else request.doc_id
        label = Label(numbers[request.task_name or ""], document, request.idx if request.doc_id is not None else 0)
        labels.append(None if id(request) in seen else label)
        seen.add(id(request))
    return tasks, labels


class RecordFolder:
    """Where an LM leaves its records; one process's part of it.

    Parameters
    ----------
    folder : is made. Records of an earlier run with the same settings are replaced as new ones get done.
    about : ``model``, ``settings``, ``tokenizer`` and ``datastore``, as ``PartJSON`` has them.
    process, processes : which this is of those that share the requests.
    overlaps : measures overlaps with the datastore; None leaves them out.

    Raises
    ------
    UserError
        Where the folder cannot be written, or holds records of a run with other settings.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], process: int, processes: int, overlaps: Overlaps | None = None
    ) -> None:
        check_writable(folder / ".trial")
        self.folder, self.about = folder, about
        self.process, self.processes, self.overlaps = process, processes, overlaps
        self._calls: dict[str, int] = {}
        for part in read_parts(folder):
            for name in RUN:
                if part[name] != about[name]:  # type: ignore[literal-required]
                    raise UserError(
                        f"{folder} holds records of a run with another {name}; give another folder, or delete it."
                    )

    @contextmanager
    def writing(self, kind: str, texts: RecordedTexts) -> Iterator[RecordWriter]:
        """A writer for the records of one call; where all goes well they are there afterwards, else nothing is."""
        call = self._calls.get(kind, 0)
        self._calls[kind] = call + 1
        stem = f"{kind}-{call}"
        name = f"{stem}-{self.process:05d}-of-{self.processes:05d}"
        final, said = self.folder / f"{name}.parquet", self.folder / f"{name}.json"
        unfinished = self.folder / f".{name}.unfinished"
        with disk_errors_in(self.folder), locked(self.folder / f".{name}.lock", str(self.folder)):
            self._check_tasks(said, texts.tasks)
            tokens = sum(len(continuation) for of_text in texts.windows for _, continuation in of_text)
            check_free_space(self.folder, ROW_BYTES * tokens, "token records")
            try:
                with RecordWriter(unfinished, texts, self.overlaps) as writer:
                    yield writer
                self._clear(stem, said)
                replace_file(unfinished, final)
                written = {"name": final.name, "bytes": final.stat().st_size, "sha256": sha256(final, progress=False)}
                content = {"format": FORMAT, "format_version": FORMAT_VERSION, "program_version": __version__}
                content |= {"kind": kind, "call": call, "process": self.process, "processes": self.processes}
                write_sealed_json(
                    said, content | {"tasks": texts.tasks, "file": written, "rows": writer.rows} | self.about
                )
            finally:
                unfinished.unlink(missing_ok=True)

    def _check_tasks(self, said: Path, tasks: list[str]) -> None:
        for part in read_parts(said.parent):
            if part["file"]["name"] == f"{said.stem}.parquet" and part["tasks"] != tasks:
                raise UserError(
                    f"{self.folder} holds records of other tasks ({shortened(', '.join(part['tasks']))}); give another "
                    f"folder, or delete it."
                )

    def _clear(self, stem: str, said: Path) -> None:
        """Remove what says that earlier records count, also those that another number of processes left."""
        said.unlink(missing_ok=True)
        if self.process == 0:
            for other in self.folder.glob(f"{stem}-*-of-*.*"):
                if f"-of-{self.processes:05d}." not in other.name:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(other)


class _Begun:
    """A text of which some windows are done.

    Parameters
    ----------
    windows, start, overlaps : as for ``RecordedTexts``, and ``RecordFolder``.

    Attributes
    ----------
    before : int64 ``[windows]``, scored tokens before each.
    overlaps : int32, of all scored tokens; -1 where nobody measures.
    to_come : windows that are not done.
    """

    def __init__(self, windows: Sequence[tuple[list[int], list[int]]], start: int, overlaps: Overlaps | None) -> None:
        lengths = np.array([len(scored) for _, scored in windows])
        self.before, self.to_come = np.cumsum(lengths) - lengths, len(windows)
        if overlaps is None:
            self.overlaps = np.full(lengths.sum(), NOT_KNOWN, dtype=np.int32)
            return
        # In front of a text that is scored from its beginning stands a prefix token, which is none of its own.
        known = windows[0][0] if start else []
        tokens = np.array([*known, *(token for _, scored in windows for token in scored)], dtype=np.int64)
        self.overlaps = overlaps(tokens)[len(known) :]


class RecordWriter:
    """Writes the records of some texts, in the order in which their windows get done.

    Parameters
    ----------
    path : the file.
    texts : what is scored.
    overlaps : as for ``RecordFolder``.

    Attributes
    ----------
    rows : written so far.
    """

    def __init__(self, path: Path, texts: RecordedTexts, overlaps: Overlaps | None = None) -> None:
        self.rows = 0
        self._texts, self._overlaps = texts, overlaps
        self._waiting: list[dict[str, np.ndarray]] = []
        self._rows_waiting = 0
        self._begun: dict[int, _Begun] = {}
        self._file = open(path, "wb")  # noqa: SIM115 (closed on leaving)
        self._parquet = pq.ParquetWriter(self._file, SCHEMA, compression="zstd", write_statistics=False)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write()
            self._parquet.close()
        finally:
            self._file.close()

    def add(self, text: int, place: int, figures: TokenFigures) -> None:
        """The records of a text's window, by their numbers."""
        label = self._texts.labels[text]
        if label is None:
            return
        windows = self._texts.windows[text]
        context, continuation = windows[place]
        count = len(continuation)
        if text not in self._begun:
            self._begun[text] = _Begun(windows, self._texts.starts[text], self._overlaps)
        begun = self._begun[text]
        before = int(begun.before[place])
        read = min(self._texts.max_length + 1, len(context) + count) - count
        steps = np.arange(count)
        columns: dict[str, Any] = {
            "task": np.full(count, label.task),
            "document": np.full(count, label.document),
            "request": np.full(count, label.request),
            "position": steps + self._texts.starts[text] + before,
            "read": steps + read,
            "token": continuation,
            "overlap": begun.overlaps[before : before + count],
        }
        columns |= {name: part.numpy() for name, part in figures._asdict().items() if name in COLUMNS}
        for heaviest in range(HEAVIEST):
            columns[f"entry_{heaviest}"] = figures.entries[:, heaviest].numpy()
            columns[f"weight_{heaviest}"] = figures.weights[:, heaviest].numpy()
        begun.to_come -= 1
        if not begun.to_come:
            del self._begun[text]
        self._waiting.append({name: np.asarray(columns[name], dtype=kind) for name, kind in COLUMNS.items()})
        self._rows_waiting += count
        if self._rows_waiting >= ROWS_PER_GROUP:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        columns = {name: np.concatenate([part[name] for part in self._waiting]) for name in COLUMNS}
        self._parquet.write_table(pa.table(columns, schema=SCHEMA), row_group_size=ROWS_PER_GROUP * 2)
        self.rows += self._rows_waiting
        self._waiting, self._rows_waiting = [], 0
