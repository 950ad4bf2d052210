"""Building a faiss index over a datastore's keys.

It is trained once, on a sample; then segments, each of a run of entries, are filled one by one (or side by side, as
Ray tasks), and at last they are joined list by list, so that a build takes no more memory than it may: see
``IndexBuild``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.choosing import NO_BUDGET, Budget, choose_factory
from knn_lm_eval.search.faiss_index import METRICS
from knn_lm_eval.search.gpu_choice import choose_gpu_factory, obstacle_on_gpus
from knn_lm_eval.search.index_build import IndexBuild, add_keys, write_segment
from knn_lm_eval.search.index_memory import Allowance
from knn_lm_eval.search.probe_choice import fastest_enough
from knn_lm_eval.search.quality import measure_quality
from knn_lm_eval.search.segments import can_be_joined
from knn_lm_eval.search.training import sample_size, train_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX, MOST_PARTS, IndexFiles
from knn_lm_eval.store.key_stream import keys_of
from knn_lm_eval.system.files import disk_errors_in
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.ray_cluster import Head
from knn_lm_eval.system.ray_jobs import Needs, run_jobs
from knn_lm_eval.system.sampling import draw_entries

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300


def build_index(
    datastore: Datastore,
    factory: str = "auto",
    *,
    budget: Budget = NO_BUDGET,
    lm_microseconds: Callable[[Datastore], float] | None = None,
    sim_func: str = "l2",
    name: str = DEFAULT_INDEX,
    train_sample: int | None = None,
    quality_queries: int = 4096,
    k: int = 1024,
    knn_temp: float = 1.0,
    seed: int = 1,
    parts: int | None = None,
    ray: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    hardware: str = "cpu",
    gpu_memory: float | None = None,
    memory: int | None = None,
) -> dict[str, Any]:
    """Build the index ``name`` over all keys of ``datastore`` and write it beside them.

    Parameters
    ----------
    factory : a faiss factory string, or ``auto`` (see ``choose_factory``).
    budget : limits for ``auto`` (bytes per entry), and for the probe that is recommended (slowdown).
    lm_microseconds : measures what the LM that made the datastore takes for a token; called where the budget is a
        slowdown, once the index is built. See ``make.lm_speed``.
    sim_func : what nearness means: ``l2`` or ``dot``.
    train_sample : keys to train on; None takes 64 per inverted list, and at least 65,536.
    quality_queries : held-out queries for the choice of the probe, of which at most 512 are compared with exact
        search; 0 leaves it out.
    k, knn_temp : neighbours and temperature of that comparison.
    seed : of the training sample and the held-out queries.
    parts : make so many files of the index, each of a run of entries; None makes one.
    ray : the address of a Ray cluster (see ``connect``) that fills the parts' segments side by side. Its nodes must
        see the datastore's folder at the same path.
    resume : go on with an interrupted build.
    overwrite : replace a finished index of that name.
    hardware : ``gpu`` has ``auto`` choose what faiss can search on GPUs (see ``choose_gpu_factory``), which is not what
        serves CPUs best.
    gpu_memory : bytes of that GPU's memory; None takes what is free on the one here.
    memory : bytes that the build may take, with all the process has; None takes half of what is available beside that.
        The same index comes of it.

    Returns
    -------
    The index's metadata, as written to ``NAME.json``.

    Raises
    ------
    UserError
        Where faiss does not know the factory string, the index exists, ``memory`` is too little, the disk is full, or a
        Ray task fails.
    """
    datastore.require_keys("building an index")
    datastore.require_all("an index")
    factory = _checked_factory(datastore, factory, sim_func, budget, hardware, gpu_memory)
    _check_budget(budget, quality_queries, lm_microseconds)
    files = IndexFiles(datastore.path, name)
    files.check_new()
    check_parts(len(datastore), parts, ray)
    settings: dict[str, Any] = {
        "factory": factory,
        "sim_func": sim_func,
        "seed": seed,
        "train_sample": train_sample,
        "keys_sha256": datastore.keys_checksum,
        **({} if parts is None else {"parts": parts}),
    }
    build, allowance = IndexBuild(files, settings, len(datastore)), Allowance.of(memory)
    neighbours, queries = min(k, len(datastore)), min(quality_queries, len(datastore))
    allowance.check_quality(queries, neighbours, datastore.dimension)
    lock = files.index.with_name(f".{files.index.name}.lock")
    with disk_errors_in(datastore.path), locked(lock, f"the index {files.index}"):
        if resume and (finished := build.metadata()):
            return build.install(finished)
        _check_place(files, overwrite, build)
        index = build.load() if resume else None
        if index is None:
            with build.timed("train"):
                index = _trained(datastore, factory, sim_func, train_sample, seed, allowance)
            build.begin(index, _segment_size(index, len(datastore), parts, allowance))
        index_type = type(index).__name__
        with build.timed("add"):
            if build.in_memory:
                _fill(datastore, build, index)
            else:
                _write_segments(datastore, build, ray)
        build.note()
        with build.timed("join"):
            build.join()
        index = build.opened()
        metadata: dict[str, Any] = {
            **settings,
            "count": len(datastore),
            "type": index_type,
            "seconds": {stage: round(value, 1) for stage, value in build.seconds.items()},
            "faiss": faiss.__version__,
        }
        if quality_queries:
            metadata |= measure_quality(datastore, index, sim_func, neighbours, knn_temp, quality_queries, seed)
        if budget.slowdown is not None and lm_microseconds is not None:
            limit = (budget.slowdown - 1) * lm_microseconds(datastore)
            metadata |= {"probe": fastest_enough(metadata["quality"], limit), "slowdown": budget.slowdown}
        return build.finish(metadata | build.figures())


def _segment_size(index: faiss.Index, count: int, parts: int | None, allowance: Allowance) -> int | None:
    """How many entries a segment has; None where each part is filled in memory."""
    if can_be_joined(index):
        return allowance.entries_in_segment(index)
    allowance.check_in_memory(index, -(-count // (parts or 1)), parts)
    return None


def _checked_factory(
    datastore: Datastore, factory: str, sim_func: str, budget: Budget, hardware: str, gpu_memory: float | None
) -> str:
    """The factory string, chosen where it is ``auto``; raises UserError where arguments do not fit each other."""
    if sim_func not in METRICS:
        raise UserError(f"sim_func={sim_func!r} is unknown; use l2 or dot.")
    if hardware not in ("cpu", "gpu"):
        raise UserError(f"hardware={hardware!r} is unknown; use cpu or gpu.")
    if gpu_memory is not None and hardware != "gpu":
        raise UserError("A GPU's memory counts for an index that is built for one: add --for gpu.")
    if factory == "auto" and hardware == "gpu":
        return choose_gpu_factory(len(datastore), datastore.dimension, sim_func, gpu_memory, budget)
    if hardware == "gpu" and (obstacle := obstacle_on_gpus(factory, datastore.dimension, sim_func)) is not None:
        raise UserError(f"{factory} is no index for a GPU: {obstacle}; choose another --factory, or leave it out.")
    if factory == "auto":
        return choose_factory(len(datastore), datastore.dimension, sim_func, budget.bytes_per_entry)
    if budget.bytes_per_entry is not None:
        raise UserError(f"A budget in bytes per entry is for --factory auto to choose by; leave out {factory}, or it.")
    return factory


def _check_budget(budget: Budget, quality_queries: int, lm_microseconds: Callable[[Datastore], float] | None) -> None:
    """Raise UserError where a slowdown is asked for that cannot be measured."""
    if budget.slowdown is not None and not quality_queries:
        raise UserError("A slowdown as budget takes a measurement: leave out --quality_queries 0.")
    if budget.slowdown is not None and lm_microseconds is None:
        raise UserError("A slowdown as budget is of the LM's own time: give lm_microseconds as well.")


def _check_place(files: IndexFiles, overwrite: bool, build: IndexBuild) -> None:
    """Raise UserError where the index exists."""
    if (files.index.exists() or files.part(0).exists()) and not overwrite:
        resume = "" if not build.states.file.exists() else " (or --resume, to end what was interrupted)"
        raise UserError(f"The index {files.index} exists already; choose another --name or give --overwrite{resume}.")


def check_parts(count: int, parts: int | None, ray: str | None) -> None:
    """Raise UserError where ``count`` entries do not make so many parts."""
    if ray is not None and parts is None:
        raise UserError("Ray builds an index part by part: say in how many, with --parts.")
    if parts is not None and not 1 <= parts <= min(MOST_PARTS, count):
        raise UserError(f"parts={parts} must be between 1 and {min(MOST_PARTS, count)}.")


def _trained(
    datastore: Datastore, factory: str, sim_func: str, train_sample: int | None, seed: int, allowance: Allowance
) -> faiss.Index:
    """The index, trained on a random sample of the keys."""
    keys, dimension = datastore.require_keys("training an index"), datastore.dimension
    sample = sample_size(factory, dimension, sim_func, len(datastore), train_sample)
    allowance.check_training(factory, dimension, sim_func, sample)
    entries = draw_entries(len(datastore), sample, seed) if sample else np.empty(0, dtype=np.int64)
    return train_index(factory, keys_of(keys, entries), sim_func, seed)


def _fill(datastore: Datastore, build: IndexBuild, index: faiss.Index) -> None:
    """Add the keys that are not in the index yet, in order, with a checkpoint now and then."""
    keys = datastore.require_keys("an index")
    with tqdm(total=len(datastore), initial=index.ntotal, desc="Adding keys", unit=" keys", unit_scale=True) as bar:
        for added in add_keys(index, keys):
            bar.update(added)
            if build.states.is_due(CHECKPOINT_SECONDS) and index.ntotal < len(datastore):
                build.save(index)
    build.save(index)


def _write_segments(datastore: Datastore, build: IndexBuild, ray: str | None) -> None:
    """Write the segments that are not there yet, each in its file."""
    segments = {segment.number: segment for segment in build.unfinished()}
    jobs = {
        number: (datastore.path.resolve(), build.index.resolve(), s.start, s.stop, s.file.resolve())
        for number, s in segments.items()
    }
    there = len(datastore) - sum(segment.stop - segment.start for segment in segments.values())
    with tqdm(total=len(datastore), initial=there, desc="Adding keys", unit=" keys", unit_scale=True) as bar:
        if ray is None:
            for job in jobs.values():
                _write_segment(*job, bar.update)
        else:
            for done in run_jobs(Head(ray), _write_segment, jobs, Needs(whole_node=True)):
                if done is not None:
                    bar.update(segments[done[0]].stop - segments[done[0]].start)


def _write_segment(
    store: Path, trained: Path, start: int, stop: int, output: Path, progress: Callable[[int], object] | None = None
) -> None:
    """Write the segment with the entries from ``start`` to ``stop``; runs in a Ray task as well."""
    keys = Datastore.open(store, verify="never").require_keys("an index")
    write_segment(trained, keys[start:stop], output, progress or (lambda added: None))
