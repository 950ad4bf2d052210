"""Exact nearest neighbours among a datastore's keys, without an index: one pass over the keys for all queries.

The same code runs on CPUs and GPUs. Keys may have a large common part, beside which their differences are lost in
single precision: both keys and queries are centred, which changes no distance and no order. ``key_blocks`` brings the
keys, ``nearest`` keeps what is near.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import torch
from tqdm import tqdm

from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.key_blocks import KeyBlocks, centre_of
from knn_lm_eval.search.nearest import MOST_ENTRIES, Compared, nearest_on, pair_distances
from knn_lm_eval.store.removed import KeptKeys, Keys, Removed, run_of

SCORE_BYTES = 2**22  # of scores at a time
GPU_SCORE_BYTES = 2**29

Device = torch.device | str


class ExactSearch:
    """Finds the nearest of all keys.

    What searches keep in memory between them is said in ``KeyBlocks``.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]``, may be memory-mapped.
    sim_func : ``l2`` (squared) or ``dot``.
    device : where keys and queries are compared. Of several each has a run of the entries, and all work at once.
    removed : the keys that do not count; None where all do. What is found is what is found among the others alone, to
        the last bit, but for the entries' numbers.

    Attributes
    ----------
    streams : whether each search reads keys from the disk, because there is no room for them in memory.

    Raises
    ------
    UserError
        In searches, where a key is not finite.
    """

    def __init__(
        self,
        keys: np.ndarray,
        sim_func: str,
        device: Device | Sequence[Device] = "cpu",
        removed: Removed | None = None,
    ) -> None:
        self.keys, self.sim_func, self._removed = keys, sim_func, removed
        compared: Keys = keys if removed is None else KeptKeys(keys, removed)
        self._count = len(compared)
        devices = [device] if isinstance(device, (str, torch.device)) else device
        self._devices = [torch.device(one) for one in devices]
        self._centre = centre_of(compared)  # [dimension]
        sample = compared[:: max(1, self._count // 2**10)].astype(np.float64) - self._centre
        length = float(np.sqrt(np.square(sample).sum(1).mean()))
        self._key_length = length if 0 < length < np.inf else 1.0
        # Runs as even as can be: one per device, or several where entries would not fit in 32 bits.
        runs = len(self._devices) * -(-self._count // (len(self._devices) * MOST_ENTRIES))
        self._starts = np.linspace(0, self._count, min(runs, self._count) + 1).astype(np.int64)
        self._runs = [
            KeyBlocks(run_of(compared, start, stop), self._centre, self._devices[number % len(self._devices)])
            for number, (start, stop) in enumerate(zip(self._starts, self._starts[1:], strict=False))
        ]

    @property
    def bytes_held(self) -> int:
        """Of this process's own memory, that stay taken between searches."""
        return sum(run.bytes_held for run in self._runs)

    @property
    def streams(self) -> bool:
        return any(run.streams for run in self._runs)

    def search(self, queries: np.ndarray, k: int, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` nearest keys of each query, nearest first; of equally near ones that of the smaller number.

        All queries are compared with a block of keys before the next is read: the keys are read once, whatever the
        number of queries. Memory: 28 bytes a query and neighbour, and the blocks'.

        Parameters
        ----------
        queries : float32 ``[n, dimension]``.
        k : at most the number of keys that count.
        progress : whether to show a bar.

        Returns
        -------
        distances : float32 ``[n, k]``, squared L2 or negated inner products, each within float32's rounding.
        entries : int64 ``[n, k]``. Both are of empty slots (infinity, -1) for a query that is not finite.
        """
        compared, lock = Compared(queries, self._centre, self.sim_func, self._key_length), Lock()
        with tqdm(
            total=self._count, desc="Searching all keys", unit=" entries", unit_scale=True, disable=not progress
        ) as bar:

            def search_run(run: KeyBlocks) -> tuple[np.ndarray, np.ndarray]:
                nearest = nearest_on(run.device, compared, min(k, len(run)))
                # As many queries at a time as there is room for their scores, but no few of them in the last batch.
                most = GPU_SCORE_BYTES if run.device.type == "cuda" else SCORE_BYTES
                batches = -(-max(1, len(queries)) * 4 * min(run.size, len(run)) // most)
                for block in run:
                    nearest.take(block, -(-max(1, len(queries)) // batches))
                    with lock:
                        bar.update(len(block.keys))
                return nearest.found()

            if len(self._runs) == 1:
                distances, found = search_run(self._runs[0])
            else:
                with ThreadPoolExecutor(len(self._devices)) as pool:
                    distances, found = self._merged(list(pool.map(search_run, self._runs)), k)
        if self._removed is not None:
            found = np.where(found < 0, -1, self._removed.kept_entries(found))
        return distances, found

    def distances(self, queries: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """The distances of queries to given entries, see ``exact_distances``.

        Keys that a search has left in a GPU's memory are gathered there, all others in the file.

        Parameters
        ----------
        queries : float32 ``[n, dimension]``.
        entries : int64 ``[n, m]``; -1 in empty slots.

        Returns
        -------
        float32 ``[n, m]``; infinity in empty slots.
        """
        if all(run.resident is None for run in self._runs):
            return exact_distances(self.keys, queries, entries, self.sim_func)
        gathered, rest = np.full(entries.shape, np.inf, dtype=np.float32), entries
        places = entries if self._removed is None else self._removed.ranks(entries)
        for run, start in zip(self._runs, self._starts, strict=False):
            if run.resident is not None:
                is_here = (places >= start) & (places < start + len(run))
                rows, slots = is_here.nonzero()
                pairs = torch.from_numpy(np.stack([rows, places[rows, slots] - start])).to(run.device)
                own = torch.from_numpy(queries).to(run.device)
                constant = torch.zeros(len(own), dtype=torch.float64, device=run.device)
                found = pair_distances(own, constant, run.resident, pairs[0], pairs[1], self.sim_func == "dot")
                gathered[rows, slots] = found.cpu().numpy()
                rest = np.where(is_here, -1, rest)
        if (rest < 0).all():
            return gathered
        return np.where(rest < 0, gathered, exact_distances(self.keys, queries, rest, self.sim_func))

    def _merged(self, found: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` nearest of what was found in each run."""
        distances = np.concatenate([distances for distances, _ in found], axis=1)  # [n, runs k]
        entries = np.concatenate(
            [np.where(of_run < 0, -1, of_run + start) for (_, of_run), start in zip(found, self._starts, strict=False)],
            axis=1,
        )
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]  # of equal ones the earlier run's come first
        return np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)
