"""Where ``knn_gpu=True`` searches: the best place for the keys, the index and the memory at hand, and why it is that.

In this order: keys in GPU memory, exact; an index of a type that faiss has on GPUs; exact, with keys streamed to the
GPU; the CPU. And which index to build so that faiss can hold it on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import faiss
import torch

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.choosing import LISTS_PER_ROOT, NO_BUDGET, Budget, estimated_bytes
from knn_lm_eval.search.exact_retriever import find_devices
from knn_lm_eval.search.faiss_index import GPU_MAX_K, faiss_gpus, make_index

IN_MEMORY, INDEX, STREAMED, CPU = "gpu exact", "gpu index", "gpu exact streamed", "cpu"
WORKING_BYTES = 2**31  # of a GPU's memory, left for what a search needs beside keys or index
# faiss keeps a query's table of a list in the memory that a block of threads shares: 2 bytes a codeword and quantizer.
SHARED_BYTES = 48 * 2**10
PQ_CODE_LENGTHS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
LEAST_CODE = 64  # dimensions a byte; codes that say less of a key are of no use
SQ_TYPES = ("QT_8bit", "QT_8bit_direct", "QT_8bit_uniform", "QT_4bit", "QT_4bit_uniform", "QT_fp16")


@dataclass(frozen=True)
class Gpus:
    """What a process may use.

    Attributes
    ----------
    free : bytes of memory that are free on each GPU on which PyTorch compares keys; none where it has no GPU for that.
    faiss : how many faiss sees.
    """

    free: tuple[int, ...]
    faiss: int


@dataclass(frozen=True)
class IndexAtHand:
    """An index that could be searched.

    Attributes
    ----------
    bytes : of its files.
    obstacle : why faiss has no such index on GPUs; None where it has.
    """

    bytes: int
    obstacle: str | None


@dataclass(frozen=True)
class Choice:
    """Where to search (``IN_MEMORY``, ``INDEX``, ``STREAMED`` or ``CPU``), and why not at a better place."""

    place: str
    reason: str


def choose_place(gpus: Gpus, key_bytes: int | None, index: IndexAtHand | None, k: int) -> Choice:
    """The best place to search.

    Parameters
    ----------
    key_bytes : of the keys in the store's own type, in which they would be kept; None where exact search is not
        wanted or the store has no keys.
    index : None where no index is wanted or there is none.
    k : neighbours per query.
    """
    least, count = min(gpus.free, default=0), len(gpus.free)
    free = f"the GPU's {_mib(least)} that are free" if count == 1 else f"{count} GPUs with {_mib(least)} free on each"
    if not count:
        exact = "PyTorch has no GPU to compare keys on"
    elif key_bytes is None:
        exact = "there are no keys to compare, or an index was named"
    elif -(-key_bytes // count) + WORKING_BYTES <= least:  # a run of them on each
        return Choice(IN_MEMORY, f"the keys, {_mib(key_bytes)}, fit in {free}")
    else:
        exact = f"the keys, {_mib(key_bytes)}, do not fit in {free}"
    if index is None:
        by_index = "there is no index to search"
    elif not gpus.faiss:
        by_index = "faiss sees no GPU (faiss-gpu needed)"
    elif index.obstacle is not None:
        by_index = index.obstacle
    elif k > GPU_MAX_K:
        by_index = f"k={k} is more than faiss finds on GPUs, {GPU_MAX_K}"
    elif count and index.bytes + WORKING_BYTES > least * gpus.faiss:
        by_index = f"the index, {_mib(index.bytes)}, does not fit in the memory of {gpus.faiss} GPU(s)"
    else:
        return Choice(INDEX, exact)
    if count and key_bytes is not None:
        return Choice(STREAMED, f"{exact}; {by_index}")
    return Choice(CPU, f"{exact}; {by_index}")


def visible_gpus(knn_device: str | None = None) -> Gpus:
    """What this process may use, here and now; exact search those GPUs that ``find_devices`` finds."""
    gpus = [device for device in find_devices(knn_device) if device.type == "cuda"]
    return Gpus(tuple(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus), faiss_gpus())


def obstacle_on_gpus(factory: str, dimension: int, sim_func: str) -> str | None:
    """Why faiss cannot put an index of this factory string on GPUs; None where it can, or that is unknown.

    As faiss-gpu 1.15's cloner and its GPU indexes say: Flat, IVF with Flat lists, scalar quantizers, or product
    quantizers of 8 bits and some code lengths; also behind a linear transform, but not with a graph over the lists.
    """
    try:
        index = make_index(factory, dimension, sim_func)
    except UserError:
        return None
    return _obstacle(index)


def _obstacle(index: Any) -> str | None:
    library = cast(Any, faiss)  # whose type stubs lack some of what is used here
    if isinstance(index, faiss.IndexPreTransform):
        return _obstacle(faiss.downcast_index(index.index))
    if type(index) in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP):
        return None
    if type(index) not in (library.IndexIVFFlat, library.IndexIVFPQ, library.IndexIVFScalarQuantizer):
        return f"faiss has no {type(index).__name__} on GPUs"
    quantizer = faiss.downcast_index(index.quantizer)
    if type(quantizer) not in (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP):
        return f"faiss has no lists found by {type(quantizer).__name__} on GPUs"
    if isinstance(index, library.IndexIVFPQ):
        pq = index.pq
        if pq.nbits != 8:
            return f"faiss's product quantizers on GPUs have 8 bits, and not {pq.nbits}"
        if pq.M not in PQ_CODE_LENGTHS or 2 * pq.M * pq.ksub > SHARED_BYTES:
            return f"faiss has no product quantizer of {pq.M} bytes on GPUs (of {', '.join(map(str, PQ_CODE_LENGTHS))})"
    if isinstance(index, library.IndexIVFScalarQuantizer):
        if index.sq.qtype not in [getattr(faiss.ScalarQuantizer, name) for name in SQ_TYPES]:
            return "faiss has scalar quantizers of 4, 8 and 16 bits (SQ4, SQ8, SQfp16) on GPUs alone"
        if 8 * index.d >= SHARED_BYTES:
            return f"faiss's scalar quantizers on GPUs have fewer than {SHARED_BYTES // 8} dimensions"
    return None


def choose_gpu_factory(
    count: int, dimension: int, sim_func: str, memory: float | None, budget: Budget = NO_BUDGET
) -> str:
    """The faiss factory string of an index that fits on a GPU: IVF with scalar quantizers, or with product quantizers.

    The more bits, the nearer are its distances to the keys': 8 or 4 bits a dimension where there is room for them,
    then as many bytes of a product quantizer as there is room for, behind a rotation that is learnt.

    Parameters
    ----------
    count, dimension : entries of the store, and the width of a key.
    sim_func : ``l2`` or ``dot``.
    memory : bytes of the GPU's memory; None takes what is free on this process's GPU, of several the least.
    budget : of which the bytes per entry count here, too.

    Raises
    ------
    UserError
        Where nothing is as small as that, or no GPU is there to ask for its memory.
    """
    if memory is None and (memory := min(visible_gpus().free, default=None)) is None:
        raise UserError("PyTorch sees no GPU to build an index for: say how much memory it has, with --gpu_memory.")
    per_entry = (memory - WORKING_BYTES) / count
    if budget.bytes_per_entry is not None:
        per_entry = min(per_entry, budget.bytes_per_entry)
    lists = f"IVF{2 ** max(0, round(math.log2(LISTS_PER_ROOT * math.sqrt(count))))}"
    codes = [f"{lists},SQ8", f"{lists},SQ4"]
    least = min(dimension // LEAST_CODE, 64)
    lengths = [length for length in PQ_CODE_LENGTHS if dimension % length == 0 and least <= length < dimension]
    codes += [f"OPQ{length},{lists},PQ{length}" for length in reversed(lengths)]
    possible = [code for code in codes if obstacle_on_gpus(code, dimension, sim_func) is None]
    sizes = [estimated_bytes(code, count, dimension, sim_func) for code in possible]
    for code, size in zip(possible, sizes, strict=True):
        if size <= per_entry:
            return code
    smallest = f"; the smallest, {possible[-1]}, takes {sizes[-1]:.0f}" if sizes else ""
    raise UserError(
        f"No index that faiss has on GPUs takes {per_entry:.3g} bytes per entry, of {count} keys of {dimension} "
        f"numbers{smallest}. Prune the datastore, or give more memory."
    )


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"
