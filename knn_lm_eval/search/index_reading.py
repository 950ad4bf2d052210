"""Reading index files with faiss alone: what a child process does first with a file that nobody vouches for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.mapped_lists import read_with_mapped_lists


def try_index(path: Path, entries: int | None) -> None:
    """Read and search the index file ``path``, in a process that may die of it.

    Parameters
    ----------
    entries : how many entries the file may name; None where that is not known.

    Raises
    ------
    UserError
        Where faiss cannot read it, or it names others.
    """
    index = read_index(path)
    index.search(np.zeros((1, index.d), dtype=np.float32), 1)
    if entries is not None and index.ntotal and (beyond := _largest_id(index)) >= entries:
        raise UserError(f"The index {path} is damaged: it names entry {beyond:,} of {entries:,}; build it again.")


def _largest_id(index: faiss.Index) -> int:
    """The largest number that an index, or what it is over, has for an entry; a negative one counts as beyond all."""
    library: Any = faiss
    ids = [np.array([index.ntotal - 1], dtype=np.int64)]
    with suppress(RuntimeError):
        ivf: Any = faiss.extract_index_ivf(index)
        lists = range(ivf.nlist)
        ids = [
            faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size)
            for number in lists
            if (size := ivf.invlists.list_size(number))
        ]
    if isinstance(index, library.IndexIDMap):
        ids = [faiss.vector_to_array(index.id_map)]
    return max((int(some.view(np.uint64).max()) for some in ids), default=-1)


def read_index(path: Path) -> faiss.Index:
    """Read an index file, memory-mapped where that can be done; raises UserError where it is none."""
    try:
        return read_with_mapped_lists(path) or faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise UserError(
            f"The index {path} is damaged: faiss cannot read it ({reason_of(error)}); build it or copy it again."
        ) from error


def reason_of(error: RuntimeError) -> str:
    """The point of a faiss error, which begins with the C++ signature and source line."""
    return str(error).strip().splitlines()[0].rpartition(": ")[2][:200]
