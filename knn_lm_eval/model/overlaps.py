"""How much of a text stands in the datastores word for word, where their suffix arrays tell."""

from __future__ import annotations

import numpy as np

from knn_lm_eval.model.records import Overlaps
from knn_lm_eval.store.joined import Store, stores_of
from knn_lm_eval.store.suffixes import has_suffixes, open_suffixes


def find_overlaps(store: Store) -> Overlaps | None:
    """What measures overlaps with a store, or with several together; None where one has no suffix array."""
    if not all(map(has_suffixes, stores_of(store))):
        return None
    ngrams = open_suffixes(store)

    def overlaps(tokens: np.ndarray) -> np.ndarray:
        return ngrams.overlap_lengths(tokens).astype(np.int32)

    return overlaps
