"""A process on a node of a ``RayNetwork`` that asks for neighbours while links are cut; prints what happened as JSON.

python tests/helpers/ray_asking.py ADDRESS STORE
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from helpers.ray_network import have_done

from knn_lm_eval.errors import UserError
from knn_lm_eval.search import ray_seats
from knn_lm_eval.search.ray_retriever import RayRetriever
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system import ray_cluster

QUERIES = np.random.default_rng(3).standard_normal((64, 16)).astype(np.float32) * 2


def main() -> None:
    address, store = sys.argv[1:]
    ray_seats.SILENT_SECONDS = 8.0
    datastore = Datastore.open(Path(store), verify="never")
    ray = ray_cluster.connect(address)
    while sum(bool(node["Resources"].get("CPU")) for node in ray.nodes()) < 2:
        time.sleep(0.1)
    try:
        cut_the_workers(datastore, address)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(1)


def cut_the_workers(datastore: Datastore, address: str) -> None:
    once, twice = (RayRetriever(datastore, 5, 4, address=address, replicas=replicas) for replicas in (1, 2))
    expected = once.find(QUERIES)

    def tell(retriever: RayRetriever) -> None:
        seconds, found = timed(lambda: retriever.find(QUERIES))
        same = all(np.array_equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        print(json.dumps({"seconds": seconds, "same": same, "restarts": retriever.statistics.restarts}), flush=True)

    tell(twice)
    have_done("cut 2")
    for retriever in (twice, twice, once):
        tell(retriever)
    have_done("cut 3")
    tell(once)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.monotonic()
    result = work()
    return time.monotonic() - start, result


if __name__ == "__main__":
    main()
