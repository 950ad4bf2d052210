"""How much of a text stands in the datastores word for word, where their suffix arrays tell."""

from __future__ import annotations

import logging

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.model.records import Overlaps
from knn_lm_eval.store.joined import Store, stores_of
from knn_lm_eval.store.suffixes import has_suffixes, open_suffixes

logger = logging.getLogger(__name__)


def find_overlaps(store: Store) -> Overlaps | None:
    """What measures overlaps with a store, or with several together; None where one has no suffix array.

    Where one cannot be used, since the store was changed after it was built, it is None as well, and a warning says so.
    """
    if not all(map(has_suffixes, stores_of(store))):
        return None
    try:
        ngrams = open_suffixes(store)
    except UserError as error:
        logger.warning("The records will not say what overlaps with the datastore. %s", error)
        return None

    def overlaps(tokens: np.ndarray) -> np.ndarray:
        return ngrams.overlap_lengths(tokens).astype(np.int32)

    return overlaps
