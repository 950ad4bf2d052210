"""A faiss index: making and opening it, joining its parts, putting it on GPUs, and searching it."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Any, cast

import numpy as np

# faiss tells the root logger which of its builds it tries; lm-eval would print that.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)
import faiss  # noqa: E402

from knn_lm_eval.errors import UserError  # noqa: E402
from knn_lm_eval.search.index_reading import read_index, reason_of  # noqa: E402
from knn_lm_eval.search.selection import cannot_leave_out, check_left_out, search_parameters  # noqa: E402
from knn_lm_eval.search.trial import try_first  # noqa: E402
from knn_lm_eval.store.datastore import Datastore  # noqa: E402
from knn_lm_eval.store.index_files import DEFAULT_INDEX, IndexFiles, IndexPart, find_parts  # noqa: E402
from knn_lm_eval.store.removed import Removed  # noqa: E402
from knn_lm_eval.store.verification import NO_CHECKSUM  # noqa: E402

logger = logging.getLogger(__name__)

DEFAULT_PROBE = 32  # of an index that was not measured: the kNN-LM papers'
WORTH_TELLING = 2**26  # bytes of an index in memory
METRICS = {"l2": faiss.METRIC_L2, "dot": faiss.METRIC_INNER_PRODUCT}
NAMES = {metric: name for name, metric in METRICS.items()}
GPU_MAX_K = 2048  # faiss's own limit
# Of the tables of a search: fast scans (faiss 1.15) crash beyond 2 GiB of them.
MOST_TABLE_BYTES = 2**30
# Of an index without codes, what faiss compares number by number: so many queries, of so many numbers in all.
FEW_QUERIES, FEW_NUMBERS = 16, 2**16


def make_index(factory: str, dimension: int, sim_func: str) -> faiss.Index:
    """An empty index of a factory string; raises UserError where faiss cannot make it for such keys."""
    try:
        index = faiss.index_factory(dimension, factory, METRICS[sim_func])
    except RuntimeError as error:
        raise UserError(
            f"faiss cannot make an index {factory!r} for keys of {dimension} numbers: "
            f"{str(error).strip().splitlines()[-1][:200]}"
        ) from error
    _leave_codewords_unordered(index)
    return index


def _leave_codewords_unordered(index: faiss.Index) -> None:
    """Spare PQ an order of its codewords for searches by Hamming distance, which nobody makes here.

    Factory strings ask for that order ("polysemous training"; Douze et al. 2016), which takes some 1.7 CPU seconds
    for each quantizer, however few the entries. Distances and neighbours are the same without.
    """
    inner: Any = index
    while below := getattr(inner, "base_index", None) or getattr(inner, "index", None):
        inner = faiss.downcast_index(below)
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False


def open_index(datastore: Datastore, name: str = DEFAULT_INDEX) -> tuple[faiss.Index, dict[str, Any]]:
    """Open the index ``name`` of ``datastore``, memory-mapped where faiss can do so for its type.

    Returns
    -------
    index : the faiss index; ``probe`` is not set.
    metadata : the content of the JSON beside it.

    Raises
    ------
    UserError
        Where there is none, it is damaged, or it was built for other keys.
    """
    metadata, parts = find_readable_parts(datastore, name)
    opened = [read_index(part.path) for part in parts]
    index = join_parts(opened, metadata.get("part_ids") == "relative") if "parts" in metadata else opened[0]
    if index.ntotal != len(datastore) or index.d != datastore.dimension:
        raise UserError(
            f"The index {IndexFiles(datastore.path, name).index} holds {index.ntotal} vectors of {index.d} numbers, "
            f"the datastore {len(datastore)} of {datastore.dimension}; build it again."
        )
    if (held := bytes_held(index)) > WORTH_TELLING:
        logger.info(
            "The index %s takes %d MiB of each process's memory: faiss has no mapped form of all it needs.",
            IndexFiles(datastore.path, name).index,
            held >> 20,
        )
    return index, metadata


def find_readable_parts(datastore: Datastore, name: str) -> tuple[dict[str, Any], list[IndexPart]]:
    """As ``find_parts``; what has no checksum was read by a child process first, so that faiss can read all here."""
    metadata, parts = find_parts(datastore, name)
    for part in parts:
        if datastore.verification.found[part.path] == NO_CHECKSUM:
            try_first(part.path, len(datastore) - part.first_id)
    return metadata, parts


def bytes_held(index: faiss.Index) -> int:
    """What an opened index takes of the process's own memory, but for what goes with the number of lists alone.

    It is 0 for what can be mapped whole. The others are lists in blocks below a re-ranking (``...fs,RFlat``),
    fast scans without lists (``PQ64x4fs``), and the table by which IVF with PQ saves work: codewords times lists.
    """
    if isinstance(index, faiss.IndexShards):
        return sum(bytes_held(part) for part, _ in split_parts(index))
    if isinstance(index, faiss.IndexRefine):
        return bytes_held(faiss.downcast_index(index.base_index))
    if isinstance(index, faiss.IndexPreTransform):
        return bytes_held(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexFastScan):
        return index.codes.size()
    held, library = 0, cast(Any, faiss)  # whose type stubs lack some of what is used here
    if isinstance(index, library.IndexIVF):
        if isinstance(library.downcast_InvertedLists(index.invlists), library.BlockInvertedLists):
            held += index.ntotal * (index.code_size + 8)
        if isinstance(index, library.IndexIVFPQ):
            held += 4 * index.precomputed_table.size()
    return held


def add_vectors(index: faiss.Index, vectors: np.ndarray) -> None:
    """Add to a trained index; raises UserError where faiss cannot, as where it wants entries' numbers (``IDMap``)."""
    try:
        index.add(vectors)
    except RuntimeError as error:
        raise UserError(
            f"faiss cannot add keys to {type(index).__name__} ({reason_of(error)}); choose another --factory."
        ) from error


def bytes_per_code(index: faiss.Index) -> int:
    """What a vector takes in an index; of a graph, which faiss calls no code, what it takes in the graph's storage."""
    try:
        return index.sa_code_size()
    except RuntimeError:
        storage: Any = getattr(index, "storage", None)
        return 4 * index.d if storage is None else faiss.downcast_index(storage).sa_code_size()


def join_parts(parts: list[faiss.Index], relative_ids: bool, threaded: bool = False) -> faiss.IndexShards:
    """One index over parts that hold runs of entries in order.

    Parameters
    ----------
    relative_ids : each part numbers its entries from 0; otherwise as the store does.
    threaded : search the parts side by side, each in a thread of its own; for parts on GPUs.
    """
    shards: Any = faiss.IndexShards(parts[0].d, threaded, relative_ids)  # type: ignore[call-arg]
    for part in parts:
        shards.add_shard(part)
    return shards


def inverted_file(index: faiss.Index) -> faiss.IndexIVF | None:
    """The IVF index inside ``index`` (below a pre-transform, say; of several parts the first's), or None."""
    return next(iter(_inverted_files(index)), None)


def below_transform(index: faiss.Index) -> Any:
    """The index below a pre-transform; the index itself where there is none."""
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def transformed(index: faiss.Index, vectors: np.ndarray) -> np.ndarray:
    """What the index below a pre-transform is given of ``vectors``: they themselves, or rotated or projected."""
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            vectors = chain.at(number).apply(vectors)
    return np.asarray(vectors)  # a tensor in a process that has imported faiss.contrib.torch_utils


def set_probe(index: faiss.Index, probe: int) -> None:
    """Set the number of inverted lists that a search visits; nothing to set in an index without lists."""
    for ivf in _inverted_files(index):
        ivf.nprobe = min(probe, ivf.nlist)


def split_parts(index: faiss.Index) -> list[tuple[faiss.Index, int]]:
    """The parts that were joined, each with the entry that it calls 0; the index itself where it is in one."""
    if not isinstance(index, faiss.IndexShards):
        return [(index, 0)]
    shards: Any = index
    parts = [faiss.downcast_index(shards.at(number)) for number in range(shards.count())]
    starts = np.cumsum([0, *(part.ntotal for part in parts[:-1])]).tolist()
    return list(zip(parts, starts if shards.successive_ids else [0] * len(parts), strict=True))


def _inverted_files(index: faiss.Index) -> list[faiss.IndexIVF]:
    found = []
    for part, _ in split_parts(index):
        with suppress(RuntimeError):
            found.append(faiss.extract_index_ivf(part))
    return found


def faiss_gpus() -> int:
    """The number of GPUs that faiss sees; 0 for a faiss without GPU support."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def to_gpus(index: faiss.Index, k: int) -> faiss.Index:
    """Put ``index`` on all visible GPUs in float16: a copy on each, or in shards where a copy does not fit.

    Of several processes on a machine each takes a GPU of its own. An index in parts is spread part by part. With no
    GPU, or for an index type that faiss has for the CPU only, says so once and returns ``index`` as it is.

    Raises
    ------
    UserError
        Where GPUs cannot find ``k`` neighbours.
    """
    if not faiss_gpus():
        logger.warning("knn_gpu=True, but faiss sees no GPU (faiss-gpu needed): searching on the CPU.")
        return index
    gpus = list(range(faiss_gpus()))
    if local_rank := os.environ.get("LOCAL_RANK"):
        gpus = [gpus[int(local_rank) % len(gpus)]]
    try:
        on_gpus = _clone_to(gpus, index)
    except RuntimeError as error:
        logger.warning(
            "knn_gpu=True, but faiss cannot put %s on GPUs (%s): searching on the CPU.",
            type(index).__name__,
            reason_of(error),
        )
        return index
    check_gpu_k(k)
    return on_gpus


def check_gpu_k(k: int) -> None:
    """Raise UserError where GPUs cannot find ``k`` neighbours."""
    if k > GPU_MAX_K:
        raise UserError(f"k={k} is more than faiss finds on GPUs, {GPU_MAX_K}; choose a smaller k, or knn_gpu=False.")


def _clone_to(gpus: list[int], index: faiss.Index) -> faiss.Index:
    if isinstance(index, faiss.IndexShards):
        parts = split_parts(index)
        clones = [_clone_to([gpus[number % len(gpus)]], part) for number, (part, _) in enumerate(parts)]
        return join_parts(clones, index.successive_ids, threaded=True)
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    try:
        return faiss.index_cpu_to_gpus_list(index, options, gpus)
    except RuntimeError:
        if len(gpus) == 1:
            raise
        options.shard = True
        return faiss.index_cpu_to_gpus_list(index, options, gpus)


def search(
    index: faiss.Index, queries: np.ndarray, k: int, probe: int | None = None, removed: Removed | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Search for the ``k`` nearest entries of each query.

    Parameters
    ----------
    queries : float32 ``[n, dimension]``.
    probe : inverted lists that this search visits, whatever is set in the index; None takes what is set, as it must for
        an index on GPUs.
    removed : entries that do not count, as the index numbers them; None where all do.

    Returns
    -------
    distances : float32 ``[n, k]``, the smaller the nearer (squared L2, or the negated inner product);
        infinity in empty slots.
    entries : int64 ``[n, k]``; -1 in empty slots.

    Raises
    ------
    UserError
        Where entries do not count, and faiss cannot leave them out of searches of such an index.
    """
    faiss.cvar.indexIVF_stats.reset()  # type: ignore[attr-defined]
    if (len(queries) >= FEW_QUERIES or queries.size > FEW_NUMBERS) and _compares_all(index):
        return _search_all(index, queries, k, removed)
    if removed is None:
        return _search_by_faiss(index, queries, k, probe, None)
    try:
        found = [
            (_search_by_faiss(part, queries, k, probe, removed.of_part(start)), start)
            for part, start in split_parts(index)
        ]
    except RuntimeError as error:
        raise cannot_leave_out(split_parts(index)[0][0], reason_of(error)) from error
    distances, entries = _merged(index, found)
    check_left_out(index, entries, removed)
    return distances, entries


def _search_by_faiss(
    index: faiss.Index, queries: np.ndarray, k: int, probe: int | None, removed: Removed | None
) -> tuple[np.ndarray, np.ndarray]:
    """As ``search``, by faiss's own; of one part, where entries do not count."""
    # Where somebody imports faiss.contrib.torch_utils, as the published code does, a search that takes no parameters
    # stands in the place of faiss's own, which then has this name.
    search_arrays = getattr(index, "search_numpy", index.search)
    parameters = search_parameters(split_parts(index)[0][0], probe, removed)
    at_once = _queries_at_once(index, probe)
    found = [
        search_arrays(queries[start : start + at_once], k, params=parameters)
        for start in range(0, max(len(queries), 1), at_once)
    ]
    scores, entries = found[0] if len(found) == 1 else (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    distances = -scores if index.metric_type == faiss.METRIC_INNER_PRODUCT else scores
    distances[entries < 0] = np.inf
    return distances, entries


def _queries_at_once(index: faiss.Index, probe: int | None) -> int:
    """How many queries faiss can be given: it makes a table of each and each list that it visits."""
    if (ivf := inverted_file(index)) is None:
        return MOST_TABLE_BYTES
    return max(1, MOST_TABLE_BYTES // (4 * ivf.d * min(probe or ivf.nprobe, ivf.nlist)))


def _compares_all(index: faiss.Index) -> bool:
    """Whether searches on the CPU compare with every vector, as it is: ``Flat``, in parts or behind a transform."""
    if isinstance(index, faiss.IndexPreTransform):
        return _compares_all(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexShards):
        return all(_compares_all(part) for part, _ in split_parts(index))
    return type(index) in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP) and index.metric_type in NAMES


def _search_all(
    index: faiss.Index, queries: np.ndarray, k: int, removed: Removed | None
) -> tuple[np.ndarray, np.ndarray]:
    """As ``search``, of an index that compares all.

    Asked many at once, faiss takes |q|^2 - 2 qx + |x|^2 for (q - x)^2, which loses what is asked for where the vectors
    have a large common part; ``ExactSearch`` takes that off first.
    """
    if isinstance(index, faiss.IndexPreTransform):
        return _search_all(below_transform(index), transformed(index, queries), k, removed)
    if isinstance(index, faiss.IndexShards):
        parts = split_parts(index)
        within = [None if removed is None else removed.of_part(start, start + part.ntotal) for part, start in parts]
        return _merged(
            index, [(_search_all(p, queries, k, of), start) for (p, start), of in zip(parts, within, strict=True)]
        )
    from knn_lm_eval.search.exact import ExactSearch  # with torch, which no other index needs

    flat: Any = index
    vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    distances, entries = np.full((len(queries), k), np.inf, np.float32), np.full((len(queries), k), -1)
    if there := min(k, flat.ntotal if removed is None else removed.kept):
        found_there = ExactSearch(vectors, NAMES[flat.metric_type], removed=removed).search(queries, there)
        distances[:, :there], entries[:, :there] = found_there
    return distances, entries


def _merged(
    index: faiss.Index, found: list[tuple[tuple[np.ndarray, np.ndarray], int]]
) -> tuple[np.ndarray, np.ndarray]:
    """What was found in an index's parts, ``[n, k]``, each with the entry that it calls 0, as faiss merges it."""
    if len(found) == 1 and found[0][1] == 0:
        return found[0][0]
    distances = np.stack([distances for (distances, _), _ in found])  # [parts, n, k]
    entries = np.stack([np.where(part < 0, -1, part + start) for (_, part), start in found])  # [parts, n, k]
    dot = index.metric_type == faiss.METRIC_INNER_PRODUCT
    merge: Any = faiss.merge_knn_results  # so that ties fall as in shards
    scores, entries = merge(-distances if dot else distances, entries, keep_max=dot)
    return (-scores if dot else scores), entries


def vectors_compared(index: faiss.Index, queries: int) -> int:
    """How many vectors the last ``search``, of so many queries, computed distances to."""
    return queries * index.ntotal if inverted_file(index) is None else faiss.cvar.indexIVF_stats.ndis  # type: ignore[attr-defined]
