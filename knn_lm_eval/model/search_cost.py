"""Whether exact search takes longer than the LM itself: measured here and now, and said in one sentence."""

from __future__ import annotations

import logging
import time

from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.reading import Passage, Reader
from knn_lm_eval.model.opening import Augmentation
from knn_lm_eval.search.exact_retriever import ExactRetriever

logger = logging.getLogger(__name__)

TOKENS = 64  # that are read at once
QUERIES = 256  # that are searched for at once: a batch has more, which takes less for each
READINGS = 3  # the first ones may load or compile what later ones use


def tell_costly_search(opened: Augmentation, model: LanguageModel) -> None:
    """Warn where exact search without an index takes longer a token than the LM does; see ``ExactRetriever``."""
    exact = [part for part in opened.retriever.of_stores if isinstance(part, ExactRetriever)]
    if not exact or opened.mixture.is_lm_alone:
        return
    tokens = min(TOKENS, getattr(model.inner.config, "max_position_embeddings", TOKENS))
    search = sum(retriever.microseconds(QUERIES) for retriever in exact)
    lm = _lm_microseconds(Reader(model), tokens, search)
    if search > lm:
        store = max((retriever.datastore for retriever in exact), key=len)
        logger.warning(
            "Exact search among %s entries takes about %s us a token here, and the LM %s us: an index takes less, see "
            "`knn-lm-eval build_index --datastore %s`.",
            f"{sum(len(retriever.datastore) for retriever in exact):,}",
            f"{search:,.0f}",
            f"{lm:,.0f}",
            store.path,
        )


def _lm_microseconds(reader: Reader, tokens: int, enough: float) -> float:
    """What the LM takes for a token, by its fastest reading; no better known than that it is ten times ``enough``."""
    passage, least = Passage([0] * tokens, [[0] * tokens]), float("inf")
    for _ in range(READINGS):
        start = time.perf_counter()
        reader.target_log_probs(reader.read([passage]))
        least = min(least, 1e6 * (time.perf_counter() - start) / tokens)
        if least > 10 * enough:
            break
    return least
