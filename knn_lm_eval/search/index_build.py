"""An index under construction, step by step: trained once, filled in segments, joined, and put in its place.

Any process can write any segment: it needs the trained index's file and the segment's keys. Each is in a file of its
own when it is full, so that what was interrupted goes on with the next. Kinds of index whose files do not end with
inverted lists are filled part by part in memory instead (``in_memory`` where that is all in one).
"""

from __future__ import annotations

import glob
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import (
    add_vectors,
    bytes_held,
    bytes_per_code,
    faiss_gpus,
    inverted_file,
    join_parts,
    read_index,
)
from knn_lm_eval.search.index_reading import reason_of
from knn_lm_eval.search.list_files import ID_BYTES
from knn_lm_eval.search.segments import join_segments
from knn_lm_eval.store.index_files import IndexFiles, IndexJSON
from knn_lm_eval.store.key_stream import key_chunks
from knn_lm_eval.store.manifest import check_unchanged, forget_derived, record_derived
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import check_free_space, replace_file
from knn_lm_eval.system.json_schema import Positive
from knn_lm_eval.system.seals import write_sealed_json

logger = logging.getLogger(__name__)


class _Begun(TypedDict):
    seconds: dict[str, float]


class _Notes(_Begun, total=False):
    segment: Positive | None
    metadata: IndexJSON


@dataclass(frozen=True)
class Segment:
    """A run of entries, from ``start`` to ``stop``, and the file that it waits in for the others of its part."""

    number: int
    part: int
    start: int
    stop: int
    file: Path


class IndexBuild:
    """What is there of an index of ``count`` entries, beside what it was begun with.

    Parameters
    ----------
    files : where it will lie.
    settings : what it depends on, ready for JSON: ``factory``, ``sim_func``, ``keys_sha256`` and others, and ``parts``
        where it is in several.

    Attributes
    ----------
    index : the file of the trained index, without entries; where it is filled in memory, with those that it has.
    states : with which settings it was begun, and how far it is; there is nothing to go on with without.
    segment : entries in a segment; None where each part is filled in memory.
    seconds : that each stage took so far.
    """

    def __init__(self, files: IndexFiles, settings: dict[str, Any], count: int) -> None:
        self.files, self.count = files, count
        self.index = files.index.with_name(files.index.name + ".part")
        self.segment: int | None = None
        self.seconds: dict[str, float] = {}
        name, digits = glob.escape(files.name), "[0-9]" * 6
        unfinished = [f"{name}{part}.faiss.part" for part in ("", ".[0-9][0-9][0-9]")]
        unfinished += [f"{name}.faiss.{middle}.part" for middle in (digits, "joined")]
        self.states = SavedStates(
            self.index.with_name(self.index.name + ".json"),
            settings,
            what=f"The unfinished index {self.index}",
            notes=_Notes,
            others=[pattern + end for pattern in unfinished for end in ("", ".tmp")],
        )

    @property
    def parts(self) -> int | None:
        return self.states.settings.get("parts")

    @property
    def in_memory(self) -> bool:
        """Whether all of it is filled in memory, in one piece."""
        return self.segment is None and self.parts is None

    def finished_files(self) -> dict[Path, Path]:
        """The files of the index when it is finished, in order, and what each will be called."""
        if self.parts is not None:
            finals = [self.files.part(number) for number in range(self.parts)]
            return {final.with_name(final.name + ".part"): final for final in finals}
        joined = self.files.index.with_name(self.files.index.name + ".joined.part")
        return {self.index if self.in_memory else joined: self.files.index}

    def segments(self) -> list[Segment]:
        """All segments, in order. Each begins a whole number of chunks after its part, so that what is added together
        is the same whatever their size."""
        found: list[Segment] = []
        for part, (finished, (start, stop)) in enumerate(zip(self.finished_files(), self._runs(), strict=True)):
            starts = range(start, stop, self.segment or max(1, stop - start))
            for begin in starts:
                number = len(found)
                of_segment = self.files.index.with_name(f"{self.files.index.name}.{number:06d}.part")
                end = min(begin + starts.step, stop)
                found.append(Segment(number, part, begin, end, finished if len(starts) == 1 else of_segment))
        return found

    def unfinished(self) -> list[Segment]:
        """The segments that are still to be written."""
        is_there = [path.exists() for path in self.finished_files()]
        return [one for one in self.segments() if not is_there[one.part] and not one.file.exists()]

    def metadata(self) -> dict[str, Any] | None:
        """The metadata of an index that is finished and has not got all its names yet; None of any other."""
        notes = self.states.resumed() or {}
        self.segment = notes.get("segment")
        return notes.get("metadata")

    def begin(self, trained: faiss.Index, segment: int | None) -> None:
        """Start anew with a trained index, and so many entries in a segment (None: each part is filled in memory).

        Raises UserError where the disk has no room for the index.
        """
        self.states.remove()
        self.segment = segment
        entries = self.count
        if any(one.file not in self.finished_files() for one in self.segments()):
            entries += max(stop - start for start, stop in self._runs())  # joined beside its segments
        check_free_space(self.index.parent, entries * (bytes_per_code(trained) + ID_BYTES), "the index's entries")
        write_index(trained, self.index)
        self.note()

    def load(self) -> faiss.Index | None:
        """The index to go on with, as in ``index``; None where there is none.

        Raises UserError where it was begun with other settings.
        """
        notes = self.states.resumed() if self.index.exists() else None
        if notes is None:
            return None
        if "segment" not in notes:
            logger.warning("The unfinished index %s is of an earlier version: it is begun anew.", self.index)
            return None
        self.seconds, self.segment = notes["seconds"], notes["segment"]
        index = read_trained(self.index)
        there = index.ntotal if self.in_memory else self.count - sum(s.stop - s.start for s in self.unfinished())
        logger.info("Going on with %s of %s entries.", f"{there:,}", f"{self.count:,}")
        return index

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time that is spent inside for ``stage``."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def note(self, **more: Any) -> None:
        """Note how far it is."""
        self.states.note(seconds=self.seconds, segment=self.segment, **more)

    def save(self, index: faiss.Index) -> None:
        """Keep an index that is filled in memory as it is."""
        write_index(index, self.index)
        self.note()

    def join(self) -> None:
        """Make each part of its segments, where that is not done."""
        for part, finished in enumerate(self.finished_files()):
            files = [one.file for one in self.segments() if one.part == part and one.file != finished]
            if files and not finished.exists():
                join_segments(files, finished)
            for file in files:
                file.unlink(missing_ok=True)

    def opened(self) -> faiss.Index:
        """The finished index, its files mapped where faiss can do so."""
        opened = [read_index(path) for path in self.finished_files()]
        return opened[0] if self.parts is None else join_parts(opened, relative_ids=True)

    def figures(self) -> dict[str, Any]:
        """What the metadata says of the finished files."""
        sizes = [path.stat().st_size for path in self.finished_files()]
        layout: dict[str, Any] = {}
        if self.parts is not None:
            runs = zip(self._runs(), sizes, strict=True)
            parts = [{"start": start, "stop": stop, "bytes": size} for (start, stop), size in runs]
            layout = {"parts": parts, "part_ids": "relative"}
        return {
            "bytes": sum(sizes),
            **layout,
            "bytes_held": sum(map(bytes_held, map(read_index, self.finished_files()))),
        }

    def finish(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Give the index its metadata, and install it."""
        self.note(metadata=metadata)
        return self.install(metadata)

    def install(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Give finished files their final names, in the place of an index of that name; returns the metadata.

        Wherever this ends, it can be done again.
        """
        files = self.files
        check_unchanged(files.folder, metadata["keys_sha256"], f"the index {files.name} was built")
        forget_derived(files.folder, [files.metadata.name, *self._replaced()])
        record_derived(files.folder, self.put_in_place(metadata))
        self.states.remove()  # with it the trained index
        return metadata

    def put_in_place(self, metadata: dict[str, Any]) -> list[str]:
        """As ``install``, of a store whose manifest does not know of an index of that name; returns the files' names.

        The metadata goes last: whoever finds both finds a finished index.
        """
        files, written = self.files, self.finished_files()
        finals, replaced = [final.name for final in written.values()], self._replaced()
        files.metadata.unlink(missing_ok=True)
        for folder in files.laid_out():  # from the index that is replaced
            shutil.rmtree(folder, ignore_errors=True)
        for finished, final in written.items():
            if finished.exists():
                replace_file(finished, final)
        write_sealed_json(files.metadata, metadata)
        for name in replaced - set(finals):
            (files.folder / name).unlink(missing_ok=True)
        return [files.metadata.name, *finals]

    def _replaced(self) -> set[str]:
        """The files that an index of that name has, or had."""
        files = self.files
        return {path.name for path in (files.index, *files.folder.glob(f"{files.name}.[0-9][0-9][0-9].faiss"))}

    def _runs(self) -> list[tuple[int, int]]:
        """The first entry of each part, and the first behind it."""
        parts = self.parts or 1
        ends = [self.count * number // parts for number in range(parts + 1)]
        return list(zip(ends, ends[1:], strict=False))


def write_segment(
    trained: Path, keys: np.ndarray, output: Path, progress: Callable[[int], object] = lambda added: None
) -> None:
    """Write the index file of a segment, or of a part, all at once.

    Parameters
    ----------
    trained : the file ``IndexBuild.index``.
    keys : float16 or float32 ``[n, dimension]``, may be memory-mapped: the segment's, whose first is 0 in the file.
    output : the segment's file.
    progress : is told of how many keys were added, now and then.

    Raises
    ------
    UserError
        Where a key holds NaN or infinity, or the disk is full.
    """
    index = read_trained(trained)
    for added in add_keys(index, keys):
        progress(added)
    write_index(index, output)


def add_keys(index: faiss.Index, keys: np.ndarray) -> Iterator[int]:
    """Add the keys ``[count, dimension]`` that the index does not have yet, in chunks; yields their sizes."""
    ivf, assigner = inverted_file(index), None
    # GPUs find each key's list where it is a plain one: fast-scan types take no lists that were found elsewhere, and
    # other indexes than flat ones are looked through for a list on the CPU.
    if faiss_gpus() and isinstance(index, faiss.IndexIVF) and not isinstance(index, faiss.IndexIVFFastScan):
        quantizer = faiss.downcast_index(index.quantizer)
        if isinstance(quantizer, faiss.IndexFlat):
            assigner = faiss.index_cpu_to_all_gpus(quantizer)
    for chunk in key_chunks(keys, index.ntotal):
        if assigner is None or ivf is None:
            add_vectors(index, chunk)
        else:
            lists = assigner.search(chunk, 1)[1][:, 0].copy()
            ivf.add_core(len(chunk), faiss.swig_ptr(chunk), None, faiss.swig_ptr(lists))
        yield len(chunk)


def read_trained(path: Path) -> faiss.Index:
    """Read an unfinished index file to add to it: into memory, and without the tables of searches.

    Raises UserError where it is damaged.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}); build the index anew, without --resume.") from error


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index file, whole or not at all; raises UserError where there is no room for it."""
    temporary = path.with_name(path.name + ".tmp")
    check_free_space(path.parent, index.ntotal * bytes_per_code(index), "the index's codes")
    try:
        faiss.write_index(index, str(temporary))
    except RuntimeError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write the index to {path.parent}: {str(error).strip().splitlines()[-1]}") from error
    replace_file(temporary, path)
