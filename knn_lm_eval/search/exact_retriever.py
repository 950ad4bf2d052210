"""Neighbours without an index: all keys are compared with every query."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.search.exact_distances import filled_slots
from knn_lm_eval.search.retriever import EntryDistances, SearchSettings, StoreRetriever
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import EXACT
from knn_lm_eval.store.key_stream import finite_keys
from knn_lm_eval.system.timing import now

NEEDS_KEYS = "exact search, as where a store has no index,"
WORTH_A_BAR = 2**12  # queries at once: those of many texts, which are searched for together
BETWEEN_DEVICES = "+"  # lm-eval splits its arguments at commas and at =
SAMPLE_BYTES = 2**25  # of keys, on which the time of a search is measured


class ExactRetriever(StoreRetriever):
    """As ``Retriever``, by comparing all keys.

    Parameters
    ----------
    datastore : an opened datastore with keys.
    k : neighbours per query.
    sim_func : ``l2`` (squared) or ``dot``; None is ``l2``.
    device : where queries and keys are compared, see ``find_devices``.

    Attributes
    ----------
    devices : each compares a run of the keys.

    Raises
    ------
    UserError
        Where the store has no keys, a setting does not fit it, or there is no such device.
    """

    def __init__(
        self, datastore: Datastore, k: int = 1024, sim_func: str | None = None, device: str | None = None
    ) -> None:
        super().__init__(datastore, EXACT, SearchSettings(k, None, sim_func or "l2"))
        self._keys = datastore.require_keys(NEEDS_KEYS)
        self.devices = find_devices(device)
        self.on_gpus = any(one.type != "cpu" for one in self.devices)
        self.searched_on = BETWEEN_DEVICES.join(map(str, self.devices))
        self._search = ExactSearch(self._keys, self.sim_func, self.devices, datastore.removed)

    def _checked(self, settings: SearchSettings) -> SearchSettings:
        return replace(super()._checked(settings), probe=None)

    @property
    def factory(self) -> str:
        """``exact``."""
        return EXACT

    @property
    def bytes_on_disk(self) -> int:
        """0: the keys are the datastore's."""
        return 0

    @property
    def bytes_held(self) -> int:
        """Of few keys, which stay in memory from the second search on."""
        return self._search.bytes_held

    @property
    def kind_of_distances(self) -> str:
        """``exact``."""
        return EXACT

    @property
    def first_of_more_are_fewer(self) -> bool:
        """True."""
        return True

    @property
    def streams(self) -> bool:
        """Whether each search reads keys from the disk, because there is no room for them in memory."""
        return self._search.streams

    def identity(self) -> dict[str, Any]:
        """That there is no index."""
        return {"index_type": EXACT}

    def checksums(self) -> dict[str, str]:
        """None."""
        return {}

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``Retriever.find``."""
        start = now()
        found = self._search.search(queries, self.k, progress=len(queries) >= WORTH_A_BAR)
        self.statistics.searches += len(queries)
        self.statistics.entries_compared += len(queries) * self.datastore.kept
        self.statistics.seconds["search"] += now() - start
        return found

    def with_distances(self) -> tuple[ExactRetriever, EntryDistances]:
        """This retriever, and exact distances, on the GPU where the keys are there."""
        search = self._search

        def exact(queries: np.ndarray, entries: np.ndarray, counts: np.ndarray) -> np.ndarray:
            return search.distances(queries, filled_slots(entries, counts))

        return self, exact

    def microseconds(self, queries: int) -> float:
        """About what a query takes, of so many at once: measured on some of the keys, and thought on to all.

        Part of it, keeping the nearest, does not grow with the store: two sizes tell the parts from each other.
        """
        some = min(len(self._keys), max(self.k, SAMPLE_BYTES // (self._keys.shape[1] * self._keys.itemsize)))
        sizes = [some] if some == len(self._keys) else [max(self.k, some // 2), some]
        asked = finite_keys(self._keys[:: max(1, len(self._keys) // queries)][:queries])
        searches = [ExactSearch(self._keys[:size], self.sim_func, self.devices) for size in sizes]
        seconds = []
        for search in searches:
            search.search(asked, self.k)  # loads what is compiled; few keys stay in memory for the next search
            start = time.perf_counter()
            search.search(asked, self.k)
            seconds.append(time.perf_counter() - start)
        rest = len(self._keys) - some
        per_key = 0.0 if sizes[0] == some else max(0.0, seconds[1] - seconds[0]) / (some - sizes[0])
        return 1e6 * (seconds[-1] + rest * per_key) / len(asked)


def find_devices(names: str | None) -> list[torch.device]:
    """Where exact search compares keys.

    Parameters
    ----------
    names : such as ``cuda:1``, or several, ``cuda:0+cuda:1``; None is all GPUs, or the one of this process where
        several were started (``LOCAL_RANK``), or the CPU.

    Raises
    ------
    UserError
        Where one is no device, or is not here.
    """
    if names is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = [torch.device("cuda", number) for number in range(count)]
        if gpus and (rank := os.environ.get("LOCAL_RANK")):
            return [gpus[int(rank) % count]]
        return gpus or [torch.device("cpu")]
    try:
        devices = [torch.device(name) for name in str(names).split(BETWEEN_DEVICES)]
        for device in devices:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"knn_device={names} cannot be used here ({reason}); give cpu or cuda:0, say, or several, cuda:0+cuda:1."
        ) from error
    return devices
