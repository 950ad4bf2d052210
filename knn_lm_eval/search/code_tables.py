"""What the codes of an index mean, where they can be looked up byte by byte."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np

from knn_lm_eval.search.faiss_index import below_transform, transformed
from knn_lm_eval.search.rabitq_lists import has_signs


@dataclass(frozen=True)
class CodeTables:
    """What the codes of an index mean.

    Attributes
    ----------
    centroids : float32 ``[lists, dimension]``, of the coarse quantizer.
    codebooks : float32 ``[code bytes, 256, dimension / code bytes]``: what each code byte stands for.
    is_rabitq : whether that is signs, by RaBitQ, and not parts of vectors, by a product quantizer.
    """

    centroids: np.ndarray
    codebooks: np.ndarray
    is_rabitq: bool

    @classmethod
    def of(cls, index: faiss.Index) -> CodeTables | None:
        """Those of an index, or of a part; None for types whose codes cannot be looked up so."""
        ivf = below_transform(index)
        if index.metric_type != faiss.METRIC_L2:
            return None
        if isinstance(ivf, faiss.IndexIVFPQ) and ivf.pq.nbits == 8 and ivf.by_residual:
            is_rabitq = False
            codebooks = faiss.vector_to_array(ivf.pq.centroids).reshape(ivf.pq.M, 256, ivf.pq.dsub)
        elif ivf.d % 8 == 0 and has_signs(ivf):
            is_rabitq = True
            signs = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * 2.0 - 1
            codebooks = np.broadcast_to(signs.astype(np.float32), (ivf.d // 8, 256, 8)).copy()
        else:
            return None
        # A tensor in a process that has imported faiss.contrib.torch_utils.
        return cls(np.asarray(ivf.quantizer.reconstruct_n(0, ivf.nlist)), codebooks, is_rabitq)


def mean_the_same(part: faiss.Index, other: faiss.Index) -> bool:
    """Whether the codes of both parts mean the same."""
    tables, other_tables = CodeTables.of(part), CodeTables.of(other)
    axes = np.eye(part.d, dtype=np.float32)
    return (
        tables is not None
        and other_tables is not None
        and tables.is_rabitq == other_tables.is_rabitq
        and np.array_equal(tables.centroids, other_tables.centroids)
        and np.array_equal(tables.codebooks, other_tables.codebooks)
        and np.array_equal(transformed(part, axes), transformed(other, axes))
    )
