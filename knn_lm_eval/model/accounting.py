"""What a retrieval-augmented LM tells of itself: what results depend on, what was done, what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import EXACT
from knn_lm_eval.store.joined import JoinedStore
from knn_lm_eval.system.memory import resident_bytes

REPORTED_COUNTS = ("tokens_scored", "positions_generated", "searches", "entries_compared")
COUNTS_OF_SHARDS = ("restarts", "bytes_sent", "bytes_received")  # of retriever=ray


# What came from each of several stores, by the store's number.
NEIGHBOURS_OF, WEIGHT_OF = "neighbours of store", "weight of store"


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
    counts: dict[str, float] = {
        "searches": statistics.searches,
        "entries_compared": statistics.entries_compared,
        "restarts": statistics.restarts,
        "bytes_sent": statistics.bytes_sent,
        "bytes_received": statistics.bytes_received,
    }
    for name, of_stores in (
        (NEIGHBOURS_OF, statistics.neighbours_of_stores),
        (WEIGHT_OF, statistics.weight_of_stores),
    ):
        counts |= {f"{name} {number}": value for number, value in enumerate(of_stores)}
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


def excluded(counts: Mapping[str, float]) -> dict[str, float]:
    """What ``exclude_overlap`` left out, where it is given: a share of the neighbours that were found, pointers among
    them, and so many documents for so many texts."""
    if "neighbours_left_out" not in counts:
        return {}
    return {
        "excluded_neighbours": counts["neighbours_left_out"] / max(1, counts["neighbours_found"]),
        "excluded_documents": counts["documents_left_out"],
        "texts_compared": counts["texts_compared"],
    }


def describe_store(retriever: Retriever, counts: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The datastore and the index, as they stand in results; of several stores each, and what came from it.

    Parameters
    ----------
    counts : of what was done, see ``retrieval_work``.
    """
    store = retriever.datastore
    if isinstance(store, JoinedStore):
        description = _describe_joined(store, retriever, counts or {})
    else:
        description = _describe(store)
    return {
        "datastore": description,
        "index_factory": retriever.factory,
        "index_bytes": retriever.bytes_on_disk,
        "distances": retriever.kind_of_distances,
        "searched_on": retriever.searched_on,
        "memory": _memory(retriever),
    }


def _describe(store: Datastore) -> dict[str, Any]:
    return {
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
    }


def _describe_joined(store: JoinedStore, retriever: Retriever, counts: Mapping[str, float]) -> dict[str, Any]:
    """Several stores: ``path`` is their names, and each is described under ``stores``.

    ``share_of_neighbours`` is of all that searches found, ``share_of_weight`` of their softmax weights.
    """
    shares = {
        said: _shares(counts, name, len(store.stores))
        for said, name in (("share_of_neighbours", NEIGHBOURS_OF), ("share_of_weight", WEIGHT_OF))
    }
    return {
        "path": store.name,
        "entries": store.kept,
        "dimension": store.dimension,
        "keys_sha256": store.keys_checksum,
        "model": store.manifest.model["pretrained"],
        "stores": [
            {
                "name": name,
                "index": part.name,
                "index_factory": part.factory,
                "probe": part.probe,
                "distances": part.kind_of_distances,
                **{said: of_stores[number] for said, of_stores in shares.items()},
                **_describe(part.datastore),
            }
            for number, (name, part) in enumerate(zip(store.names, retriever.of_stores, strict=True))
        ],
    }


def _shares(counts: Mapping[str, float], name: str, stores: int) -> list[float | None]:
    """Each store's share of a count of ``retrieval_work``; None where nothing was counted."""
    of_stores = [counts.get(f"{name} {number}", 0) for number in range(stores)]
    total = sum(of_stores)
    return [round(one / total, 6) if total else None for one in of_stores]


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, to the millisecond."""
    return {stage: round(value, 3) for stage, value in seconds.items()}


def _memory(retriever: Retriever) -> dict[str, Any]:
    """Bytes on disk that are mapped, what the index takes of memory itself, and what the process takes."""
    reading = [part.datastore for part in retriever.of_stores if part.recompute_dists or part.factory == EXACT]
    return {
        "index_on_disk": retriever.bytes_on_disk,
        "index_in_memory": retriever.bytes_held,
        "values_on_disk": sum(part.datastore.values.nbytes for part in retriever.of_stores),
        "keys_on_disk": sum(store.keys.nbytes for store in reading if store.keys is not None),
        "process": resident_bytes(),
    }


def _added(some: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    return {name: some.get(name, 0) + others.get(name, 0) for name in {**some, **others}}
