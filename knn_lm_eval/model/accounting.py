"""What a retrieval-augmented LM tells of itself: what results depend on, what was done, what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.store.index_files import EXACT
from knn_lm_eval.system.memory import resident_bytes

REPORTED_COUNTS = ("tokens_scored", "positions_generated", "searches", "entries_compared")
COUNTS_OF_SHARDS = ("restarts", "bytes_sent", "bytes_received")  # of retriever=ray


class Work(NamedTuple):
    """What was done: counts, and seconds by stage."""

    counts: Mapping[str, float]
    seconds: Mapping[str, float]

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(_added(self.counts, other.counts), _added(self.seconds, other.seconds))


def retrieval_work(retriever: Retriever) -> Work:
    """What a retriever did so far."""
    statistics = retriever.statistics
    counts = {
        "searches": statistics.searches,
        "entries_compared": statistics.entries_compared,
        "restarts": statistics.restarts,
        "bytes_sent": statistics.bytes_sent,
        "bytes_received": statistics.bytes_received,
    }
    return Work(counts, dict(statistics.seconds))


def total(works: Sequence[Work]) -> Work:
    """What several processes did together."""
    together = Work({}, {})
    for work in works:
        together = together.plus(work)
    return together


def saved_searches(counts: Mapping[str, float], chooses: bool) -> dict[str, float]:
    """The fraction of searches that was saved, where searches can be, and how many candidates a walk's step had.

    Parameters
    ----------
    chooses : whether the weight decides where to search.
    """
    if "steps" in counts:
        steps = max(1, counts["steps"])
        return {
            "saved_searches": 1 - counts["walk_searches"] / steps,
            "mean_candidates": counts["candidates"] / steps,
        }
    return {"saved_searches": counts["rows_skipped"] / max(1, counts["rows"])} if chooses else {}


def ngram_matches(counts: Mapping[str, float]) -> dict[str, float]:
    """How many tokens before the next one the datastore's text has, on average, where n-grams were looked up."""
    if "ngram_rows" not in counts:
        return {}
    return {"mean_ngram_match": counts["ngram_tokens"] / max(1, counts["ngram_rows"])}


def describe_store(retriever: Retriever) -> dict[str, Any]:
    """The datastore and the index, as they stand in results."""
    store = retriever.datastore
    return {
        "datastore": {
            "path": str(store.path.resolve()),
            "entries": store.kept,
            **({} if store.removed is None else {"removed_documents": len(store.removed.documents)}),
            "dimension": store.dimension,
            **({} if store.projection is None else {"projected_from": store.manifest.width}),
            "keys_sha256": store.keys_checksum,
            "model": store.manifest.model["pretrained"],
            "source": store.manifest.source,
            "verify": store.verification.mode,
            "verified": store.verification.of_files(store.path),
        },
        "index_factory": retriever.factory,
        "index_bytes": retriever.bytes_on_disk,
        "distances": retriever.kind_of_distances,
        "searched_on": retriever.searched_on,
        "memory": _memory(retriever),
    }


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, to the millisecond."""
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _memory(retriever: Retriever) -> dict[str, Any]:
    """Bytes on disk that are mapped, what the index takes of memory itself, and what the process takes."""
    store, reads_keys = retriever.datastore, retriever.recompute_dists or retriever.factory == EXACT
    return {
        "index_on_disk": retriever.bytes_on_disk,
        "index_in_memory": retriever.bytes_held,
        "values_on_disk": store.values.nbytes,
        "keys_on_disk": store.keys.nbytes if reads_keys and store.keys is not None else 0,
        "process": resident_bytes(),
    }


def _added(some: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    return {name: some.get(name, 0) + others.get(name, 0) for name in {**some, **others}}
