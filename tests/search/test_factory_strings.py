"""What factory strings say of searches."""

from __future__ import annotations

import numpy as np
import pytest

from knn_lm_eval.search.factory_strings import first_of_more_are_fewer, has_exact_distances
from knn_lm_eval.search.faiss_index import make_index

# Factory string, whether the first of more are fewer, whether distances are exact; as measured below.
INDEXES = [
    ("Flat", True, True),
    ("IVF8,Flat", True, True),
    ("RR16,IVF8,Flat", True, True),
    ("IVF8,SQ8", True, False),
    ("IVF8,PQ4", True, False),
    ("PCAR8,IVF8,Flat", True, False),
    ("OPQ4,IVF8,PQ4", True, False),
    ("IVF8_HNSW4,Flat", True, True),
    ("RR16,IVF8,RaBitQ", True, False),
    ("RR16,IVF8,RaBitQfs", True, False),
    ("RR16,IVF8,RaBitQfs4", False, False),
    ("IVF8,PQ4x4fs", False, False),
    ("IVF8,PQ4x4fs,RFlat", False, True),
    ("HNSW8", False, True),
    ("HNSW8,Flat", False, True),
    ("HNSW8,SQ8", False, False),
]


@pytest.mark.parametrize(("factory", "first_are_fewer", "exact"), INDEXES)
def test_what_a_factory_string_says_holds_for_its_index(factory: str, first_are_fewer: bool, exact: bool) -> None:
    assert (first_of_more_are_fewer(factory), has_exact_distances(factory)) == (first_are_fewer, exact)
    random = np.random.default_rng(0)
    keys = random.standard_normal((1000, 16)).astype(np.float32)
    queries = random.standard_normal((50, 16)).astype(np.float32)
    index = make_index(factory, 16, "l2")
    index.train(keys)
    index.add(keys)
    distances, entries = index.search(queries, 300)
    if first_are_fewer:
        for k in (1, 4, 40):
            np.testing.assert_array_equal(index.search(queries, k)[1], entries[:, :k])
    there = entries >= 0
    of_keys = ((queries[:, None] - keys[entries]) ** 2).sum(-1)  # [50, 300]
    assert np.allclose(distances[there], of_keys[there], rtol=1e-3) == exact


def test_what_is_unknown_is_not_relied_on() -> None:
    for factory in ("IndexOfSomeType", "LSH", "", "IVF8,Unheard"):
        assert not first_of_more_are_fewer(factory) and not has_exact_distances(factory)
