"""Building a faiss index over a datastore's keys.

Keys are streamed in chunks; a checkpoint is written now and then, so an interrupted build goes on from there.
An index in parts is trained once; its parts, each of a run of entries, are then built one by one (or side by side,
as Ray tasks), so that a build takes no more memory than one part.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.choosing import NO_BUDGET, TWO_LEVELS_ABOVE, Budget, choose_factory
from knn_lm_eval.search.faiss_index import (
    METRICS,
    add_vectors,
    bytes_held,
    faiss_gpus,
    inverted_file,
    join_parts,
    make_index,
    read_index,
)
from knn_lm_eval.search.gpu_choice import choose_gpu_factory, obstacle_on_gpus
from knn_lm_eval.search.kmeans import two_level_kmeans
from knn_lm_eval.search.probe_choice import fastest_enough
from knn_lm_eval.search.quality import measure_quality
from knn_lm_eval.search.unfinished_index import UnfinishedIndex, write_index
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX, IndexFiles
from knn_lm_eval.store.key_stream import key_chunks, keys_of
from knn_lm_eval.store.manifest import forget_derived, record_derived
from knn_lm_eval.system.files import disk_errors_in, replace_file
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.ray_cluster import run_tasks
from knn_lm_eval.system.sampling import draw_entries
from knn_lm_eval.system.seals import write_sealed_json

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 300
VECTORS_PER_LIST = 64  # training sample; faiss asks for 39 to 256 per inverted list
MOST_PARTS = 1000  # their numbers have three digits


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
    parts : build the index in so many parts, one at a time; None builds it in one piece.
    ray : the address of a Ray cluster (see ``connect``) that builds the parts side by side. Its nodes must see the
        datastore's folder at the same path.
    resume : go on with an interrupted build.
    overwrite : replace a finished index of that name.
    hardware : ``gpu`` has ``auto`` choose what faiss can search on GPUs (see ``choose_gpu_factory``), which is not what
        serves CPUs best.
    gpu_memory : bytes of that GPU's memory; None takes what is free on the one here.

    Returns
    -------
    The index's metadata, as written to ``NAME.json``.

    Raises
    ------
    UserError
        Where faiss does not know the factory string, the index exists, the disk is full, or a Ray task fails.
    """
    datastore.require_keys("building an index")
    factory = _checked_factory(datastore, factory, sim_func, budget, hardware, gpu_memory)
    _check_budget(budget, quality_queries, lm_microseconds)
    files = IndexFiles(datastore.path, name)
    files.check_new()
    _check_parts(len(datastore), parts, ray)
    settings: dict[str, Any] = {
        "factory": factory,
        "sim_func": sim_func,
        "seed": seed,
        "train_sample": train_sample,
        "keys_sha256": datastore.keys_checksum,
        **({} if parts is None else {"parts": parts}),
    }
    unfinished = UnfinishedIndex(files, settings)
    lock = files.index.with_name(f".{files.index.name}.lock")
    with disk_errors_in(datastore.path), locked(lock, f"the index {files.index}"):
        if resume and (finished := unfinished.metadata()):
            return _install(datastore, files, unfinished, finished)
        _check_place(files, overwrite, unfinished)
        index = unfinished.load() if resume else None
        if index is None:
            unfinished.states.remove()
            index = _train(datastore, factory, sim_func, train_sample, seed, unfinished.seconds)
        index_type = type(index).__name__
        layout: dict[str, Any] = {}
        if parts is None:
            _add(datastore, index, unfinished)
        else:
            layout = {"parts": _add_in_parts(datastore, index, unfinished, parts, ray), "part_ids": "relative"}
            index = join_parts([read_index(path) for path in unfinished.finished_files()], relative_ids=True)
        metadata: dict[str, Any] = {
            **settings,
            "count": len(datastore),
            "type": index_type,
            "seconds": {stage: round(value, 1) for stage, value in unfinished.seconds.items()},
            "faiss": faiss.__version__,
        }
        if quality_queries:
            neighbours = min(k, len(datastore))
            metadata |= measure_quality(datastore, index, sim_func, neighbours, knn_temp, quality_queries, seed)
        if budget.slowdown is not None and lm_microseconds is not None:
            limit = (budget.slowdown - 1) * lm_microseconds(datastore)
            metadata |= {"probe": fastest_enough(metadata["quality"], limit), "slowdown": budget.slowdown}
        if parts is None:
            write_index(index, unfinished.index)
        written = unfinished.finished_files()
        metadata |= {"bytes": sum(path.stat().st_size for path in written), **layout}
        metadata["bytes_held"] = sum(bytes_held(read_index(path)) for path in written)
        unfinished.states.note(seconds=unfinished.seconds, metadata=metadata)
        return _install(datastore, files, unfinished, metadata)


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


def _check_place(files: IndexFiles, overwrite: bool, unfinished: UnfinishedIndex) -> None:
    """Raise UserError where the index exists."""
    if (files.index.exists() or files.part(0).exists()) and not overwrite:
        resume = "" if not unfinished.states.file.exists() else " (or --resume, to end what was interrupted)"
        raise UserError(f"The index {files.index} exists already; choose another --name or give --overwrite{resume}.")


def _check_parts(count: int, parts: int | None, ray: str | None) -> None:
    """Raise UserError where ``count`` entries do not make so many parts."""
    if ray is not None and parts is None:
        raise UserError("Ray builds an index part by part: say in how many, with --parts.")
    if parts is not None and not 1 <= parts <= min(MOST_PARTS, count):
        raise UserError(f"parts={parts} must be between 1 and {min(MOST_PARTS, count)}.")


def _train(
    datastore: Datastore,
    factory: str,
    sim_func: str,
    train_sample: int | None,
    seed: int,
    seconds: dict[str, float],
) -> faiss.Index:
    index = make_index(factory, datastore.dimension, sim_func)
    if index.is_trained:
        return index
    ivf = inverted_file(index)
    wanted = train_sample or max(2**16, VECTORS_PER_LIST * (ivf.nlist if ivf else 0))
    if ivf is not None and ivf.nlist > len(datastore):
        raise UserError(f"{factory} has more lists than the store has entries ({len(datastore)}); choose fewer.")
    keys = datastore.require_keys("training an index")
    sample = draw_entries(len(datastore), wanted, seed)
    on_gpus = None
    if ivf is not None and faiss_gpus():
        # Only k-means, the slow part of training, moves to the GPUs. faiss does not keep what it is given here alive.
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
        ivf.clustering_index = on_gpus
    start = time.perf_counter()
    with tqdm(total=len(sample), desc=f"Training {factory} on {len(sample):,} keys", unit=" keys") as bar:
        vectors = keys_of(keys, sample)
        if ivf is not None and ivf.nlist > TWO_LEVELS_ABOVE and not faiss_gpus():
            _place_lists(index, ivf, vectors, seed)
        index.train(vectors)
        if ivf is not None:
            ivf.clustering_index = None  # type: ignore[assignment]
        bar.update(len(sample))
    seconds["train"] = time.perf_counter() - start
    return index


def _place_lists(index: faiss.Index, ivf: faiss.IndexIVF, vectors: np.ndarray, seed: int) -> None:
    """Give the inverted lists their centroids by k-means in two levels; ``index.train`` leaves them as they are."""
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            transform = chain.at(number)
            if not transform.is_trained:
                transform.train(vectors)
            vectors = transform.apply(vectors)
    quantizer: Any = faiss.downcast_index(ivf.quantizer)
    quantizer.add(two_level_kmeans(vectors, ivf.nlist, seed, ivf.cp.spherical))


def _add(datastore: Datastore, index: faiss.Index, unfinished: UnfinishedIndex) -> None:
    """Add the keys that are not in the index yet, in order."""
    keys = datastore.require_keys("an index")
    start = time.perf_counter()
    with tqdm(total=len(datastore), initial=index.ntotal, desc="Adding keys", unit=" keys", unit_scale=True) as bar:
        for added in _add_run(index, keys, 0, len(datastore)):
            bar.update(added)
            if unfinished.states.is_due(CHECKPOINT_SECONDS) and index.ntotal < len(datastore):
                unfinished.save(index)
    unfinished.seconds["add"] = unfinished.seconds.get("add", 0.0) + time.perf_counter() - start


def _add_run(index: faiss.Index, keys: np.ndarray, start: int, stop: int) -> Iterator[int]:
    """Add the entries from ``start`` to ``stop`` that the index does not have yet, in chunks; yields their sizes."""
    ivf, assigner = inverted_file(index), None
    # GPUs find each key's list where it is a plain one: fast-scan types take no lists that were found elsewhere, and
    # other indexes than flat ones are looked through for a list on the CPU.
    if faiss_gpus() and isinstance(index, faiss.IndexIVF) and not isinstance(index, faiss.IndexIVFFastScan):
        quantizer = faiss.downcast_index(index.quantizer)
        if isinstance(quantizer, faiss.IndexFlat):
            assigner = faiss.index_cpu_to_all_gpus(quantizer)
    for chunk in key_chunks(keys, start + index.ntotal, stop):
        if assigner is None or ivf is None:
            add_vectors(index, chunk)
        else:
            lists = assigner.search(chunk, 1)[1][:, 0].copy()
            ivf.add_core(len(chunk), faiss.swig_ptr(chunk), None, faiss.swig_ptr(lists))
        yield len(chunk)


def _add_in_parts(
    datastore: Datastore, trained: faiss.Index, unfinished: UnfinishedIndex, parts: int, ray: str | None
) -> list[dict[str, int]]:
    """Build the parts that are not there yet, each in its file; returns what the metadata says of them."""
    if not unfinished.states.fits():
        unfinished.save(trained)
    ends = [len(datastore) * number // parts for number in range(parts + 1)]
    records: dict[int, dict[str, int]] = {}
    jobs: dict[int, tuple[Path, Path, int, int, Path]] = {}
    for number, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
        part = unfinished.part(number).resolve()
        if part.exists():
            records[number] = {"start": start, "stop": stop, "bytes": part.stat().st_size}
        else:
            jobs[number] = datastore.path.resolve(), unfinished.index.resolve(), start, stop, part
    began = time.perf_counter()
    there = sum(record["stop"] - record["start"] for record in records.values())
    with tqdm(total=len(datastore), initial=there, desc="Building parts", unit=" keys", unit_scale=True) as bar:
        if ray is None:
            for number, job in jobs.items():
                records[number] = _build_part(*job, bar)
        else:
            for number, record in run_tasks(ray, _build_part, jobs):
                records[number] = record
                bar.update(record["stop"] - record["start"])
    unfinished.seconds["add"] = time.perf_counter() - began
    return [records[number] for number in range(parts)]


def _build_part(
    store: Path, trained: Path, start: int, stop: int, part: Path, bar: tqdm | None = None
) -> dict[str, int]:
    """Write the part with the entries from ``start`` to ``stop``, numbered from 0; runs in a Ray task as well."""
    keys = Datastore.open(store, verify="never").require_keys("an index")
    index = faiss.read_index(str(trained))
    for added in _add_run(index, keys, start, stop):
        if bar is not None:
            bar.update(added)
    write_index(index, part)
    return {"start": start, "stop": stop, "bytes": part.stat().st_size}


def _install(
    datastore: Datastore, files: IndexFiles, unfinished: UnfinishedIndex, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Give finished files their final names, in the place of an index of that name; returns the metadata.

    The metadata goes last: whoever finds both finds a finished index. Wherever this ends, it can be done again.
    """
    written = unfinished.finished_files()
    finals = [final.name for final in written.values()]
    old = {path.name for path in (files.index, *files.folder.glob(f"{files.name}.[0-9][0-9][0-9].faiss"))}
    forget_derived(datastore.path, [files.metadata.name, *old])
    files.metadata.unlink(missing_ok=True)
    for folder in files.laid_out():  # from the index that is replaced
        shutil.rmtree(folder, ignore_errors=True)
    for finished, final in written.items():
        if finished.exists():
            replace_file(finished, final)
    write_sealed_json(files.metadata, metadata)
    for name in old - set(finals):
        (files.folder / name).unlink(missing_ok=True)
    record_derived(datastore.path, [files.metadata.name, *finals])
    unfinished.states.remove()  # with it, of an index in parts, the trained one
    return metadata
