"""What one search of a faiss index is told: how many lists to visit, and which entries do not count."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.removed import Removed


def search_parameters(
    index: faiss.Index, probe: int | None, removed: Removed | None = None
) -> faiss.SearchParameters | None:
    """What makes one search of ``index``, in one part, visit ``probe`` lists, whatever is set in it, and leave out the
    entries that do not count; None where there is nothing to tell.

    Not for indexes on GPUs, whose copies and shards take no parameters.
    """
    library: Any = faiss  # whose type stubs lack some of what is used here
    selector = None if removed is None else library.IDSelectorBitmap(removed.kept_bits)
    return _parameters(index, probe, selector)


def _parameters(index: Any, probe: int | None, selector: Any) -> Any:
    library: Any = faiss  # whose type stubs lack some of what is used here
    if isinstance(index, faiss.IndexPreTransform):
        below = _parameters(faiss.downcast_index(index.index), probe, selector)
        return below and library.SearchParametersPreTransform(index_params=below)
    if isinstance(index, faiss.IndexRefine):
        below = _parameters(faiss.downcast_index(index.base_index), probe, selector)
        return below and library.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=below)
    if isinstance(index, faiss.IndexIDMap):
        return _parameters(faiss.downcast_index(index.index), probe, selector)
    if isinstance(index, faiss.IndexIVF) and (probe is not None or selector is not None):
        return library.SearchParametersIVF(nprobe=min(probe or index.nprobe, index.nlist), sel=selector)
    if isinstance(index, faiss.IndexHNSW) and selector is not None:
        return library.SearchParametersHNSW(efSearch=index.hnsw.efSearch, sel=selector)
    return None if selector is None else library.SearchParameters(sel=selector)


def cannot_leave_out(index: faiss.Index, reason: str) -> UserError:
    """What to say where faiss cannot leave entries out."""
    return UserError(
        f"faiss cannot leave removed documents out of searches of {type(index).__name__} ({reason}): take them out of "
        f"the files, with compact_datastore, or compare all keys, with index=exact."
    )


def check_left_out(index: faiss.Index, entries: np.ndarray, removed: Removed) -> None:
    """Raise UserError where a search found an entry that does not count: this faiss took no notice."""
    if removed.are_removed(entries).any():
        raise cannot_leave_out(index, "it found some")
