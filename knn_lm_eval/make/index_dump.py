"""Dumping straight into an index: the LM's keys are added to it segment by segment, and none is kept.

A sample of the text's keys is read first, and the index trained on it. Then come the entries in segments: the keys of
one are written to a file, chunk by chunk, which goes when they are in the segment's index file. In the end the segments
become the index. So the disk has the index, and the keys of the segments that are being worked on.

Each segment is one process's. Its keys are also searched for the exact neighbours of held-out queries, by which the
index is measured in the end: later they are gone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.make.dump_progress import (
    FAILED,
    START_ANEW,
    Run,
    count_entries,
    dump_states,
    entries_done,
    joined,
    runs_noted,
    runs_written,
    states_of_share,
)
from knn_lm_eval.make.index_plan import IndexPlan
from knn_lm_eval.make.key_file import KeyFile
from knn_lm_eval.make.key_reading import KeyReader
from knn_lm_eval.make.sampling import DrawnBatches, TextSample, draw_batches
from knn_lm_eval.make.segment_keys import SegmentKeys
from knn_lm_eval.make.windows import Window, WindowSettings, chunks, cut_windows
from knn_lm_eval.search.choosing import estimated_bytes
from knn_lm_eval.search.index_build import IndexBuild, Segment, write_segment
from knn_lm_eval.search.index_memory import Allowance
from knn_lm_eval.search.passing_keys import NearestOfRuns
from knn_lm_eval.search.quality import EXACT_QUERIES, NOT_MEASURED, HeldOutQueries, compare_with_exact
from knn_lm_eval.search.training import sample_size, train_index
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import IndexFiles
from knn_lm_eval.store.manifest import DOCUMENT_STARTS, VALUES, Manifest, file_record
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import SavedStates
from knn_lm_eval.system.files import check_free_space

SEGMENT_ENTRIES = 2**20
LOOK_EVERY_SECONDS = 5.0  # at how many entries are done, in a file for each segment
SEGMENTS_EACH = 4  # for each of several processes, so that they end at about the same time
WORK = "dump.part"  # the folder, in the dump's, of what goes when it is finished


class IndexDump:
    """A dump into an index, by what lies in its folder once the text is tokenized.

    Its steps are ``prepare`` once, ``read_sample`` by all, ``train`` once, ``write_share`` by all, ``finish`` once.

    Parameters
    ----------
    output : the folder.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.states = output, dump_states(output)
        settings, fingerprint = self.states.settings, self.states.notes()["fingerprint"]
        self.plan = IndexPlan(**settings["index"])
        self.windows = WindowSettings.of_store(settings["windows"])
        self.dimension = len(fingerprint["key"])
        self.values = map_npy(output / VALUES, START_ANEW)
        self.document_starts = map_npy(output / DOCUMENT_STARTS, START_ANEW)
        self.work = output / WORK
        self.saved = SavedStates(self.work / "sample.json", {}, instead=START_ANEW)

    @cached_property
    def build(self) -> IndexBuild:
        """The index under construction."""
        plan, count = self.plan, len(self.values)
        factory = plan.chosen_factory(count, self.dimension)
        settings = {
            "factory": factory,
            "sim_func": plan.sim_func,
            "seed": plan.seed,
            "train_sample": sample_size(factory, self.dimension, plan.sim_func, count),
            "keys_sha256": file_record(self.output / VALUES)["sha256"],
            **({} if plan.parts is None else {"parts": plan.parts}),
        }
        return IndexBuild(IndexFiles(self.output, plan.name), settings, count)

    @cached_property
    def segments(self) -> list[Segment]:
        """What the entries are divided into."""
        self.build.segment = self.states.notes()["segment_entries"]
        return self.build.segments()

    @cached_property
    def sample(self) -> TextSample:
        """The sample that the index is trained on, and that queries are held out of."""
        drawn = DrawnBatches.load(self.saved, "drawn")
        if drawn is None:
            wanted = self.build.states.settings["train_sample"] + self.plan.quality_queries
            drawn = draw_batches(self.document_starts, len(self.values), self.windows, wanted, self.plan.seed)
            self.work.mkdir(exist_ok=True)
            drawn.save(self.saved, "drawn")
        return TextSample(self.work, drawn, self.dimension)

    @property
    def is_trained(self) -> bool:
        """Whether the index is trained, or further than that."""
        return self.build.index.exists() and self.build.states.fits()

    def prepare(self, shares: int, memory: int | None = None) -> None:
        """Draw the sample, divide the entries into segments, see what is there, and whether the disk has room.

        Parameters
        ----------
        shares : processes that are going to share the work.
        memory : bytes that each may take, with all it has; None takes half of what is available beside that.
        """
        notes = self.states.notes()
        noted = notes.get("segment_entries")
        allowed = self._entries_within(memory, noted or key_stream.ADD_CHUNK)
        notes["segment_entries"] = noted or min(allowed, _segment_entries(len(self.values), shares))
        self.states.note(**notes)
        file = self.sample.file
        if self.build.metadata() is not None:
            left = []
        elif self.is_trained:
            left = self.build.unfinished()
        else:
            left = self.segments
        there = joined([*notes.get("sampled", []), *self._sampled_now()])
        runs = self._in_place(runs_written(self.output), left)
        work = {
            "runs_done": runs,
            "segments_left": [one.number for one in left],
            "sampled": there if file.has_room() else [],
        }
        self.states.note(**notes | work)
        for noted in (*self.output.glob("progress.*.json"), *self.work.glob("sampled.*.json"), self.output / FAILED):
            noted.unlink(missing_ok=True)
        if left:
            self._check_space(left, shares)
        if self.build.metadata() is None and not file.has_room():
            file.make_room(anew=True)

    def _entries_within(self, memory: int | None, least: int) -> int:
        """How many entries a segment can have; raises UserError where what is still to be done takes more memory."""
        settings = self.build.states.settings
        return Allowance.of(memory).entries_of_dump(
            settings["factory"],
            self.dimension,
            settings["sim_func"],
            sample=0 if self.is_trained else settings["train_sample"],
            entries=least,
            queries=self.plan.quality_queries,
            k=self._held_out_k,
        )

    def _in_place(self, runs: list[Run], left: list[Segment]) -> list[Run]:
        """The entries of finished segments, and of ``runs`` those of the others whose keys are there."""
        numbers, found = {one.number for one in left}, list[Run]()
        for one in self.segments:
            spool = self._gathering(one).file
            if one.number not in numbers:
                spool.path.unlink(missing_ok=True)
                found.append([one.start, one.stop])
            elif spool.has_room():
                clipped = ([max(begin, one.start), min(end, one.stop)] for begin, end in runs)
                found += [run for run in clipped if run[0] < run[1]]
        return joined(found)

    def _check_space(self, left: list[Segment], shares: int) -> None:
        """Raise UserError where the disk has no room for what is still to be written."""
        settings, count = self.build.states.settings, len(self.values)
        per_entry = estimated_bytes(settings["factory"], count, self.dimension, settings["sim_func"])
        parts = self.plan.parts or 1
        joined_part = 0 if len(self.segments) == parts else -(-count // parts)  # beside its segments
        needed = {
            "index": per_entry * (sum(one.stop - one.start for one in left) + joined_part),
            "sample": 0 if self.sample.file.has_room() else self.sample.file.bytes,
            "keys": sum(self._gathering(one).file.bytes for one in left[: 2 * shares]),
            "nearest": 8 * self._compared_queries * (self._held_out_k + 1) * len(left),
        }
        sizes = {name: f"{size / 2**30:.2f}" for name, size in needed.items()}
        check_free_space(
            self.output,
            int(sum(needed.values())),
            f"the index of {count:,} tokens while it is made ({sizes['index']} GiB), keys of a sample "
            f"({sizes['sample']}) and keys on their way ({sizes['keys']}), with the neighbours of held-out entries,",
        )

    def _sampled_now(self) -> list[Run]:
        """The sample's rows that were read since ``prepare``."""
        return runs_noted(self.work.glob("sampled.*.json"))

    def sample_read(self) -> tuple[int, int]:
        """How many of the sample's keys are there, and how many there will be."""
        runs = joined([*self.states.notes()["sampled"], *self._sampled_now()])
        return count_entries(runs), len(self.sample.drawn)

    def read_sample(self, reader: KeyReader, share: int, shares: int) -> None:
        """Read one of ``shares`` parts of the sample that was not read when ``prepare`` ended."""
        if self.build.metadata() is None:
            noted = states_of_share(self.work / f"sampled.{share}.json")
            done = self.states.notes()["sampled"]
            self.sample.read_share(reader, share, shares, done, noted, self.output / FAILED)

    def train(self) -> None:
        """Train the index on the sample, unless that is done."""
        build = self.build
        if self.is_trained:
            return
        settings = build.states.settings
        with build.timed("train"):
            vectors = self.sample.vectors(self._rows[0])
            trained = train_index(settings["factory"], vectors, settings["sim_func"], settings["seed"])
        build.begin(trained, self.states.notes()["segment_entries"])

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The sample's rows to train on, and to hold out."""
        train = self.build.states.settings["train_sample"]
        return self.sample.divided(train, self.plan.quality_queries, self.plan.seed)

    @property
    def _held_out_k(self) -> int:
        return min(self.plan.k, len(self.values) - 1)

    @property
    def _compared_queries(self) -> int:
        return min(EXACT_QUERIES, self.plan.quality_queries)

    @cached_property
    def _held_out(self) -> HeldOutQueries:
        manifest = Manifest(len(self.values), self.dimension, {})
        store = Datastore(self.output, manifest, None, self.values, self.document_starts)
        entries, keys = self.sample.drawn.entries[self._rows[1]], self.sample.vectors(self._rows[1])
        return HeldOutQueries(store, entries, keys, self._held_out_k, self.plan.knn_temp)

    @cached_property
    def _nearest(self) -> NearestOfRuns | None:
        """What is near some held-out queries; None where the index is not measured."""
        if not self.plan.quality_queries or not self._held_out_k:
            return None
        compared = self._held_out.first(EXACT_QUERIES)
        return NearestOfRuns(self.saved, compared.keys, compared.k + 1, self.plan.sim_func)

    def write_share(self, reader: KeyReader, share: int, shares: int, bar: tqdm) -> None:
        """Write one of ``shares`` parts of the segments that were not there when ``prepare`` ended, until one fails.

        Where this part was begun before, it goes on.

        Parameters
        ----------
        reader : reads the text, and takes the sample's keys over.
        bar : shows how many entries are done.
        """
        notes = self.states.notes()
        numbers = notes["segments_left"]
        begin, end = (len(numbers) * number // shares for number in (share, share + 1))
        mine = [self.segments[number] for number in numbers[begin:end]]
        gathering, looked = {one.number: self._gathering(one) for one in mine}, 0.0
        for one, of_segment in self._with_chunks(mine):
            if one.file.exists():
                continue
            here, after = gathering[one.number], gathering.get(one.number + 1)
            for chunk in of_segment:
                if here.lacks(chunk, notes["runs_done"]):
                    if (self.output / FAILED).exists():
                        return
                    # What a chunk has of the next segment is kept for it, where that is this process's as well.
                    begin, end = max(chunk[0].start, one.start), min(chunk[-1].stop, (after or here).segment.stop)
                    keys = reader.of_chunk(chunk, begin, end, bar.update)
                    for spool in filter(None, (after, here)):
                        spool.take(begin, keys)
                    if not bar.disable and time.monotonic() - looked > LOOK_EVERY_SECONDS:
                        bar.n, looked = entries_done(self.output), time.monotonic()  # with what the others have done
                        bar.refresh()
            self._write_segment(one, here.file)

    def _gathering(self, segment: Segment) -> SegmentKeys:
        return SegmentKeys(self.output, self.work, segment, self.dimension)

    def _write_segment(self, segment: Segment, file: KeyFile) -> None:
        """Write a segment whose keys are all there; they go."""
        keys = file.read()
        if self._nearest is not None:
            self._nearest.take(segment.number, keys)
        write_segment(self.build.index, keys, segment.file)
        file.path.unlink()

    def _with_chunks(self, segments: list[Segment]) -> Iterator[tuple[Segment, Iterator[list[Window]]]]:
        """Each segment with the chunks of the text that have entries of it."""
        upcoming = chunks(cut_windows(self.document_starts, len(self.values), self.windows), self.windows)
        chunk = next(upcoming, None)

        def of_segment(one: Segment) -> Iterator[list[Window]]:
            nonlocal chunk
            while chunk is not None and chunk[-1].stop <= one.start:
                chunk = next(upcoming, None)
            while chunk is not None and chunk[0].start < one.stop:
                yield chunk
                if chunk[-1].stop > one.stop:  # the next segment has the rest
                    return
                chunk = next(upcoming, None)

        for one in segments:
            yield one, of_segment(one)

    def finish(self) -> list[str]:
        """Join the segments, measure the index, and put it in its place; returns the names of its files."""
        build = self.build
        trained = build.load()
        if (metadata := build.metadata()) is None:
            with build.timed("join"):
                build.join()
            index = build.opened()
            metadata = {
                **build.states.settings,
                "count": len(self.values),
                "type": type(trained).__name__,
                "seconds": {stage: round(value, 1) for stage, value in build.seconds.items()},
                "faiss": faiss.__version__,
                **self._quality(index),
                **build.figures(),
            }
            build.note(metadata=metadata)
        return build.put_in_place(metadata)

    def _quality(self, index: faiss.Index) -> dict[str, Any]:
        if self._nearest is None:
            return NOT_MEASURED if self.plan.quality_queries else {}
        held_out, starts = self._held_out, (one.start for one in self.segments)
        return compare_with_exact(index, held_out, held_out.first(EXACT_QUERIES), self._nearest.found(starts))

    def remove(self) -> None:
        """Remove what is of no use when the dump is finished, but for the dump's own notes."""
        self.build.states.remove()
        shutil.rmtree(self.work, ignore_errors=True)


def _segment_entries(count: int, shares: int) -> int:
    """Entries in a segment: whole runs of keys that are added to an index at once."""
    wanted = SEGMENT_ENTRIES if shares == 1 else min(SEGMENT_ENTRIES, -(-count // (shares * SEGMENTS_EACH)))
    return -(-wanted // key_stream.ADD_CHUNK) * key_stream.ADD_CHUNK
