"""Building a faiss index over a datastore's keys, and measuring how well it serves kNN-LM.

Keys are streamed in chunks; a checkpoint is written now and then, so an interrupted build goes on from there.
An index in parts is trained once; its parts, each of a run of entries, are then built one by one (or side by side,
as Ray tasks), so that a build takes no more memory than one part.

The finished index is compared with exact search on held-out queries (entries of the store, each with itself
taken out of both results), because an index that ranks well can still have distances of no use for a softmax.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from faiss.contrib.exhaustive_search import knn_ground_truth
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.lm_speed import NO_BUDGET, Budget, lm_microseconds
from knn_lm_eval.methods.mixture import knn_log_prob, neighbour_log_weights
from knn_lm_eval.search.faiss_index import (
    DEFAULT_INDEX,
    METRICS,
    IndexFiles,
    bytes_held,
    faiss_gpus,
    inverted_file,
    join_parts,
    read_index,
    search,
    set_probe,
)
from knn_lm_eval.search.retriever import entry_counts
from knn_lm_eval.store.datastore import Datastore, record_derived
from knn_lm_eval.system.files import check_free_space, disk_errors_in, read_json, replace_file, write_json
from knn_lm_eval.system.ray_cluster import run_tasks

logger = logging.getLogger(__name__)

LISTS_PER_ROOT = 4  # inverted lists for each root of the number of entries
EXACT_UP_TO = 2**16  # entries; below, exact search costs less than an approximate index saves
ADD_CHUNK = 2**16  # keys read and added at a time
CHECKPOINT_SECONDS = 300
VECTORS_PER_LIST = 64  # training sample; faiss asks for 39 to 256 per inverted list
# K-means costs lists times sample. Beyond so many lists, on CPUs, it is done in two levels: minutes, not days.
TWO_LEVELS_ABOVE = 4096
MOST_PARTS = 1000  # their numbers have three digits
PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
# The probe recommended is the smallest whose p_kNN error exceeds the largest probe's by at most this share of
# that error, or of the mean p_kNN.
ENOUGH_OF_ERROR, ENOUGH_OF_P_KNN = 0.05, 0.01


def choose_factory(count: int, dimension: int, sim_func: str = "l2", bytes_per_entry: float | None = None) -> str:
    """The faiss factory string that serves kNN-LM best in so many bytes per entry: exact when small, RaBitQ when large.

    RaBitQ's distance estimates are unbiased, which a softmax over distances needs; they are nearest the truth for
    vectors that are rotated at random first, so that no dimension outweighs the others. What was measured is in
    docs/indexes.md.

    Parameters
    ----------
    count, dimension : entries of the store, and the width of a key.
    sim_func : ``l2`` or ``dot``.
    bytes_per_entry : the index's size; None is no limit, and takes 1 bit per dimension, which more improve little.

    Raises
    ------
    UserError
        Where nothing is as small as that.
    """
    if count < EXACT_UP_TO and (bytes_per_entry is None or 4 * dimension <= bytes_per_entry):
        return "Flat"
    lists = 2 ** max(0, round(math.log2(LISTS_PER_ROOT * math.sqrt(count))))
    ivf = f"IVF{lists}" if lists <= TWO_LEVELS_ABOVE else f"IVF{lists}_HNSW32"
    codes = [f"RR{dimension},{ivf},RaBitQfs"]
    if bytes_per_entry is not None:
        codes = [f"RR{dimension},{ivf},RaBitQfs{bits}" for bits in (4, 2)] + codes
        if sim_func == "l2":  # a projection leaves distances nearly as they are, but not inner products
            widths = [dimension * eighths // 64 * 8 for eighths in range(7, 0, -1)]
            codes += [f"PCAR{width},{ivf},RaBitQfs" for width in widths if width]
    for code in codes:
        size = estimated_bytes(code, count, dimension, sim_func)
        if bytes_per_entry is None or size <= bytes_per_entry:
            return code
    raise UserError(
        f"No index of {count} keys of {dimension} numbers takes {bytes_per_entry:g} bytes per entry; the smallest, "
        f"{codes[-1]}, takes {size:.0f}. Prune the datastore, or give a larger --budget."
    )


def estimated_bytes(factory: str, count: int, dimension: int, sim_func: str = "l2") -> float:
    """About how many bytes per entry an index will have: code, entry number, and its share of what the lists take."""
    index = _make(factory, dimension, sim_func)
    if (ivf := inverted_file(index)) is None:
        return index.sa_code_size()
    graph = 2 * 32 * 4 + 16 if "_HNSW32" in factory else 0
    # Fast-scan lists are laid out in blocks of 32 codes, the last of which is half empty on average.
    is_in_blocks = isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFastScan)
    rounding = index.sa_code_size() * 16 if is_in_blocks else 0
    transform = 4 * dimension**2 if isinstance(index, faiss.IndexPreTransform) else 0
    return index.sa_code_size() + 8 + (ivf.nlist * (4 * ivf.d + graph + rounding) + transform) / count


def build_index(
    datastore: Datastore,
    factory: str = "auto",
    *,
    budget: Budget = NO_BUDGET,
    sim_func: str = "l2",
    name: str = DEFAULT_INDEX,
    train_sample: int | None = None,
    quality_queries: int = 512,
    k: int = 1024,
    knn_temp: float = 1.0,
    seed: int = 1,
    parts: int | None = None,
    ray: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build the index ``name`` over all keys of ``datastore`` and write it beside them.

    Parameters
    ----------
    factory : a faiss factory string, or ``auto`` (see ``choose_factory``).
    budget : limits for ``auto`` (bytes per entry), and for the probe that is recommended (slowdown).
    sim_func : what nearness means: ``l2`` or ``dot``.
    train_sample : keys to train on; None takes 64 per inverted list, and at least 65,536.
    quality_queries : held-out queries for the comparison with exact search; 0 leaves it out.
    k, knn_temp : neighbours and temperature of that comparison.
    seed : of the training sample and the held-out queries.
    parts : build the index in so many parts, one at a time; None builds it in one piece.
    ray : the address of a Ray cluster (see ``connect``) that builds the parts side by side. Its nodes must see the
        datastore's folder at the same path.
    resume : go on with an interrupted build.
    overwrite : replace a finished index of that name.

    Returns
    -------
    The index's metadata, as written to ``NAME.json``.

    Raises
    ------
    UserError
        Where faiss does not know the factory string, the index exists, the disk is full, or a Ray task fails.
    """
    if sim_func not in METRICS:
        raise UserError(f"sim_func={sim_func!r} is unknown; use l2 or dot.")
    datastore.require_keys("building an index")
    if factory == "auto":
        factory = choose_factory(len(datastore), datastore.dimension, sim_func, budget.bytes_per_entry)
    elif budget.bytes_per_entry is not None:
        raise UserError(f"A budget in bytes per entry is for --factory auto to choose by; leave out {factory}, or it.")
    if budget.slowdown is not None and not quality_queries:
        raise UserError("A slowdown as budget takes a measurement: leave out --quality_queries 0.")
    files = IndexFiles(datastore.path, name)
    if (files.index.exists() or files.part(0).exists()) and not overwrite:
        raise UserError(f"The index {files.index} exists already; choose another --name or give --overwrite.")
    if ray is not None and parts is None:
        raise UserError("Ray builds an index part by part: say in how many, with --parts.")
    if parts is not None and not 1 <= parts <= min(MOST_PARTS, len(datastore)):
        raise UserError(f"parts={parts} must be between 1 and {min(MOST_PARTS, len(datastore))}.")
    checkpoint = files.folder / f"{name}.faiss.part"
    settings: dict[str, Any] = {
        "factory": factory,
        "sim_func": sim_func,
        "seed": seed,
        "train_sample": train_sample,
        "keys_sha256": datastore.keys_checksum,
    }
    if parts is not None:
        settings["parts"] = parts
    with disk_errors_in(datastore.path):
        index, seconds = _resume(checkpoint, settings) if resume else (None, {})
        if index is None:
            _state(checkpoint).unlink(missing_ok=True)
            index = _train(datastore, factory, sim_func, train_sample, seed, seconds)
        index_type = type(index).__name__
        # Finished files, and what they will be called.
        written = {checkpoint: files.index}
        records = []
        if parts is None:
            _add(datastore, index, checkpoint, settings, seconds)
        else:
            written = {_piece(files, number): files.part(number) for number in range(parts)}
            records = _add_in_parts(datastore, index, files, checkpoint, settings, seconds, ray)
            index = join_parts([read_index(piece) for piece in written], relative_ids=True)
        metadata: dict[str, Any] = {
            **settings,
            "count": len(datastore),
            "type": index_type,
            "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
            "faiss": faiss.__version__,
        }
        if quality_queries:
            metadata |= measure_quality(
                datastore, index, sim_func, min(k, len(datastore)), knn_temp, quality_queries, seed
            )
            if budget.slowdown is not None:
                limit = (budget.slowdown - 1) * lm_microseconds(datastore)
                metadata |= {"probe": fastest_enough(metadata["quality"], limit), "slowdown": budget.slowdown}
        if parts is None:
            _write(index, checkpoint)
            metadata["bytes"] = checkpoint.stat().st_size
        else:
            metadata |= {
                "bytes": sum(part["bytes"] for part in records),
                "parts": records,
                "part_ids": "relative",
            }
        metadata["bytes_held"] = sum(bytes_held(read_index(path)) for path in written)
        # The metadata goes last: whoever finds both finds a finished index.
        files.metadata.unlink(missing_ok=True)
        for old in (files.index, *files.folder.glob(f"{name}.[0-9][0-9][0-9].faiss")):
            old.unlink(missing_ok=True)
        for temporary, final in written.items():
            replace_file(temporary, final)
        write_json(files.metadata, metadata)
        record_derived(datastore.path, [files.metadata.name, *(final.name for final in written.values())])
        checkpoint.unlink(missing_ok=True)  # of an index in parts: the trained one
        _state(checkpoint).unlink(missing_ok=True)
    return metadata


def _state(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".json")


def _resume(checkpoint: Path, settings: dict[str, Any]) -> tuple[faiss.Index | None, dict[str, float]]:
    if not checkpoint.exists() or not _state(checkpoint).exists():
        return None, {}
    state = read_json(_state(checkpoint))
    if state["settings"] != settings:
        raise UserError(
            f"The unfinished index {checkpoint} was begun with {state['settings']}, now it is {settings}; "
            f"give the same settings, or leave out --resume to start anew."
        )
    index = faiss.read_index(str(checkpoint))
    logger.info("Going on with %s.", "the parts that lack" if "parts" in settings else f"{index.ntotal:,} entries")
    return index, state["seconds"]


def _train(
    datastore: Datastore,
    factory: str,
    sim_func: str,
    train_sample: int | None,
    seed: int,
    seconds: dict[str, float],
) -> faiss.Index:
    index = _make(factory, datastore.dimension, sim_func)
    if index.is_trained:
        return index
    ivf = inverted_file(index)
    wanted = train_sample or max(2**16, VECTORS_PER_LIST * (ivf.nlist if ivf else 0))
    if ivf is not None and ivf.nlist > len(datastore):
        raise UserError(f"{factory} has more lists than the store has entries ({len(datastore)}); choose fewer.")
    keys = datastore.require_keys("training an index")
    sample = np.sort(np.random.default_rng(seed).permutation(len(datastore))[: min(wanted, len(datastore))])
    on_gpus = None
    if ivf is not None and faiss_gpus():
        # Only k-means, the slow part of training, moves to the GPUs. faiss does not keep what it is given here alive.
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
        ivf.clustering_index = on_gpus
    start = time.perf_counter()
    with tqdm(total=len(sample), desc=f"Training {factory} on {len(sample):,} keys", unit=" keys") as bar:
        vectors = np.empty((len(sample), datastore.dimension), dtype=np.float32)
        for begin in range(0, len(sample), ADD_CHUNK):
            vectors[begin : begin + ADD_CHUNK] = _finite(keys[sample[begin : begin + ADD_CHUNK]])
        if ivf is not None and ivf.nlist > TWO_LEVELS_ABOVE and not faiss_gpus():
            _place_lists(index, ivf, vectors, seed)
        index.train(vectors)
        if ivf is not None:
            ivf.clustering_index = None  # type: ignore[assignment]
        bar.update(len(sample))
    seconds["train"] = time.perf_counter() - start
    return index


def _make(factory: str, dimension: int, sim_func: str) -> faiss.Index:
    try:
        return faiss.index_factory(dimension, factory, METRICS[sim_func])
    except RuntimeError as error:
        raise UserError(
            f"faiss cannot make an index {factory!r} for keys of {dimension} numbers: "
            f"{str(error).strip().splitlines()[-1][:200]}"
        ) from error


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


def two_level_kmeans(vectors: np.ndarray, count: int, seed: int, spherical: bool = False) -> np.ndarray:
    """About sqrt(count) clusters of the vectors, each cut into a number of clusters that its size earns it.

    (faiss.contrib.clustering has the like, but stops where a cluster is too small to be cut.)

    Parameters
    ----------
    vectors : float32 ``[n, dimension]``, at least ``count`` of them.

    Returns
    -------
    float32 ``[count, dimension]``, the centroids.
    """
    settings = {"seed": seed, "spherical": spherical, "min_points_per_centroid": 1}
    coarse = faiss.Kmeans(vectors.shape[1], round(math.sqrt(count)), max_points_per_centroid=1024, **settings)
    coarse.train(vectors)
    cluster = coarse.assign(vectors)[1]
    sizes = np.bincount(cluster, minlength=coarse.k)
    # Each gets the floor of its share, at least one if it has members; what that leaves or owes, the largest bear.
    shares = np.maximum(sizes * count // len(vectors), sizes > 0)
    while (left := count - shares.sum()) != 0:
        room = sizes - shares if left > 0 else shares - 1
        largest = np.argsort(-sizes, kind="stable")
        largest = largest[room[largest] > 0][: abs(left)]
        shares[largest] += np.sign(left)
    order, ends = np.argsort(cluster, kind="stable"), np.cumsum(sizes)
    centroids = []
    for number in tqdm(np.flatnonzero(shares), desc="K-means within clusters", unit=" clusters"):
        fine = faiss.Kmeans(vectors.shape[1], int(shares[number]), **settings)
        fine.train(vectors[order[ends[number] - sizes[number] : ends[number]]])
        centroids.append(np.asarray(fine.centroids))
    return np.concatenate(centroids)


def _add(
    datastore: Datastore,
    index: faiss.Index,
    checkpoint: Path,
    settings: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Add the keys that are not in the index yet, in order."""
    keys = datastore.require_keys("an index")
    start = saved = time.perf_counter()
    with tqdm(total=len(datastore), initial=index.ntotal, desc="Adding keys", unit=" keys", unit_scale=True) as bar:
        for added in _add_run(index, keys, 0, len(datastore)):
            bar.update(added)
            if time.perf_counter() - saved > CHECKPOINT_SECONDS and index.ntotal < len(datastore):
                _write(index, checkpoint)
                write_json(_state(checkpoint), {"settings": settings, "seconds": seconds})
                saved = time.perf_counter()
    seconds["add"] = seconds.get("add", 0.0) + time.perf_counter() - start


def _add_run(index: faiss.Index, keys: np.ndarray, start: int, stop: int) -> Iterator[int]:
    """Add the entries from ``start`` to ``stop`` that the index does not have yet, in chunks; yields their sizes."""
    ivf, assigner = inverted_file(index), None
    # GPUs find each key's list where it is a plain one: fast-scan types take no lists that were found elsewhere, and
    # other indexes than flat ones are looked through for a list on the CPU.
    if faiss_gpus() and isinstance(index, faiss.IndexIVF) and not isinstance(index, faiss.IndexIVFFastScan):
        quantizer = faiss.downcast_index(index.quantizer)
        if isinstance(quantizer, faiss.IndexFlat):
            assigner = faiss.index_cpu_to_all_gpus(quantizer)
    while (begin := start + index.ntotal) < stop:
        chunk = _finite(keys[begin : min(begin + ADD_CHUNK, stop)])
        if assigner is None or ivf is None:
            index.add(chunk)
        else:
            lists = assigner.search(chunk, 1)[1][:, 0].copy()
            ivf.add_core(len(chunk), faiss.swig_ptr(chunk), None, faiss.swig_ptr(lists))
        yield len(chunk)


def _add_in_parts(
    datastore: Datastore,
    trained: faiss.Index,
    files: IndexFiles,
    checkpoint: Path,
    settings: dict[str, Any],
    seconds: dict[str, float],
    ray: str | None,
) -> list[dict[str, int]]:
    """Build the parts that are not there yet, each in its file ``_piece``; returns what the metadata says of them."""
    parts: int = settings["parts"]
    if not _state(checkpoint).exists():
        for number in range(MOST_PARTS):
            _piece(files, number).unlink(missing_ok=True)
        _write(trained, checkpoint)
        write_json(_state(checkpoint), {"settings": settings, "seconds": seconds})
    ends = [len(datastore) * number // parts for number in range(parts + 1)]
    records: dict[int, dict[str, int]] = {}
    jobs: dict[int, tuple[Path, Path, int, int, Path]] = {}
    for number, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
        piece = _piece(files, number).resolve()
        if piece.exists():
            records[number] = {"start": start, "stop": stop, "bytes": piece.stat().st_size}
        else:
            jobs[number] = datastore.path.resolve(), checkpoint.resolve(), start, stop, piece
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
    seconds["add"] = time.perf_counter() - began
    return [records[number] for number in range(parts)]


def _build_part(
    store: Path, trained: Path, start: int, stop: int, piece: Path, bar: tqdm | None = None
) -> dict[str, int]:
    """Write the part with the entries from ``start`` to ``stop``, numbered from 0; runs in a Ray task as well."""
    keys = Datastore.open(store).require_keys("an index")
    index = faiss.read_index(str(trained))
    for added in _add_run(index, keys, start, stop):
        if bar is not None:
            bar.update(added)
    _write(index, piece)
    return {"start": start, "stop": stop, "bytes": piece.stat().st_size}


def _piece(files: IndexFiles, number: int) -> Path:
    """Where a finished part waits for the others."""
    part = files.part(number)
    return part.with_name(part.name + ".part")


def _write(index: faiss.Index, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    check_free_space(path.parent, index.ntotal * index.sa_code_size(), "the index's codes")
    try:
        faiss.write_index(index, str(temporary))
    except RuntimeError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write the index to {path.parent}: {str(error).strip().splitlines()[-1]}") from error
    replace_file(temporary, path)


def _finite(keys: np.ndarray) -> np.ndarray:
    keys = keys.astype(np.float32)
    if not np.isfinite(keys).all():
        raise UserError("The datastore's keys hold NaN or infinity: the files are damaged; dump it again.")
    return keys


def measure_quality(
    datastore: Datastore, index: faiss.Index, sim_func: str, k: int, knn_temp: float, queries: int, seed: int
) -> dict[str, Any]:
    """Compare the index with exact search on held-out queries, for each probe.

    Returns
    -------
    ``{"probe": the one to use, "quality": [one row per probe]}``; a row has ``recall`` (the share of the exact
    ``k`` neighbours found), ``p_knn_error`` (mean absolute error of p_kNN of the query's own next token),
    ``p_knn`` (its mean by exact search) and ``microseconds`` per query. ``probe`` is None without lists.
    """
    chosen = np.sort(np.random.default_rng(seed + 1).permutation(len(datastore))[:queries])
    all_keys = datastore.require_keys("measuring an index")
    keys, targets = _finite(all_keys[chosen]), torch.from_numpy(datastore.values[chosen].copy())
    k = min(k, len(datastore) - 1)
    if k < 1:
        return {"probe": None, "quality": []}

    def held_out_p_knn(distances: np.ndarray, entries: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """p_kNN of each query's own next token and the entries it rests on, without the query's own entry."""
        order = np.argsort(entries == chosen[:, None], axis=1, kind="stable")[:, :k]
        distances, entries = np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)
        distances[entries == chosen[:, None]] = np.inf
        values = torch.from_numpy(datastore.values[np.maximum(entries, 0)])
        counts = entry_counts(datastore.weights, entries)
        log_weights = neighbour_log_weights(torch.from_numpy(distances), knn_temp, counts)
        return knn_log_prob(log_weights, values, targets).exp(), entries

    chunks = (_finite(all_keys[i : i + ADD_CHUNK]) for i in range(0, len(datastore), ADD_CHUNK))
    bar = tqdm(chunks, total=-(-len(datastore) // ADD_CHUNK), desc="Exact search to compare with", unit=" chunks")
    scores, entries = knn_ground_truth(keys, bar, k + 1, METRICS[sim_func])
    exact_p, exact_entries = held_out_p_knn(-scores if sim_func == "dot" else scores, entries)
    ivf, rows = inverted_file(index), []
    probes: list[int | None] = [p for p in PROBES if p <= ivf.nlist] if ivf is not None else [None]
    for probe in tqdm(probes, desc="Measuring the index", unit=" probe"):
        if probe is not None:
            set_probe(index, probe)
        start = time.perf_counter()
        distances, entries = search(index, keys, k + 1)
        seconds = time.perf_counter() - start
        p, entries = held_out_p_knn(distances, entries)
        found = sum(len(np.intersect1d(a, b)) for a, b in zip(exact_entries, entries, strict=True))
        rows.append(
            {
                "probe": probe,
                "recall": round(found / exact_entries.size, 4),
                "p_knn_error": round(float((p - exact_p).abs().mean()), 6),
                "p_knn": round(float(exact_p.mean()), 6),
                "microseconds": round(1e6 * seconds / len(keys), 1),
            }
        )
    return {"probe": good_enough(rows), "quality_k": k, "quality_knn_temp": knn_temp, "quality": rows}


def good_enough(rows: list[dict[str, Any]]) -> int | None:
    """The smallest probe after which p_kNN comes hardly nearer to that of exact search."""
    best = rows[-1]["p_knn_error"]
    enough = best + max(ENOUGH_OF_ERROR * best, ENOUGH_OF_P_KNN * rows[-1]["p_knn"])
    return next(row["probe"] for row in rows if row["p_knn_error"] <= enough)


def fastest_enough(rows: list[dict[str, Any]], microseconds: float) -> int | None:
    """The smallest good enough probe among those whose search takes at most so long; the fastest where none does."""
    allowed = [row for row in rows if row["microseconds"] <= microseconds]
    if allowed:
        return good_enough(allowed)
    fastest = min(rows, key=lambda row: row["microseconds"])
    logger.warning(
        "No probe keeps to the budget of %.0f us a query; probe=%s takes %.0f us. A smaller k, fewer bytes per entry "
        "or RetoMaton take less.",
        microseconds,
        fastest["probe"],
        fastest["microseconds"],
    )
    return fastest["probe"]
