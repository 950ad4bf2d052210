"""Exact nearest neighbours among a datastore's keys, without an index: blocks of keys against batches of queries.

The same code runs on CPUs and GPUs. Keys may have a large common part, beside which their differences are lost in
single precision: both keys and queries are centred, which changes no distance and no order, and the distances of what
was found are computed anew from the keys.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.store.key_stream import finite_keys

BLOCK_BYTES = 2**23  # of keys as float32 at a time: what a CPU's caches hold
SCORE_BYTES = 2**21  # of distances at a time
GPU_FACTOR = 64  # by which both are larger on GPUs
CENTRE_SAMPLE = 2**10  # keys that the centre is the mean of: near enough, and found in a moment
# Neighbours more than asked for, which are ranked anew: rounding may have put them in each other's places.
MARGIN = 32


class ExactSearch:
    """Finds the nearest of all keys.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]``, may be memory-mapped.
    sim_func : ``l2`` (squared) or ``dot``.
    device : where keys and queries are compared.

    Raises
    ------
    UserError
        In searches, where a key is not finite.
    """

    def __init__(self, keys: np.ndarray, sim_func: str, device: torch.device | str = "cpu") -> None:
        self.keys, self.sim_func, self.device = keys, sim_func, torch.device(device)
        sample = keys[:: max(1, len(keys) // CENTRE_SAMPLE)]
        self._centre = torch.from_numpy(sample.astype(np.float32).mean(0, dtype=np.float64)).float()  # [dimension]

    def search(self, queries: np.ndarray, k: int, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` nearest keys of each query, nearest first; of equally near ones that of the smaller number.

        All queries are compared with a block of keys before the next is read: the keys are read once, whatever the
        number of queries. Memory: 12 bytes a query and neighbour, and what ``BLOCK_BYTES`` says.

        Parameters
        ----------
        queries : float32 ``[n, dimension]``.
        k : at most the number of keys.
        progress : whether to show a bar.

        Returns
        -------
        distances : float32 ``[n, k]``, squared L2 or negated inner products, each within float32's rounding.
        entries : int64 ``[n, k]``.
        """
        candidates = min(k + MARGIN, len(self.keys))
        nearest = _Nearest(len(queries), candidates, self.device)
        centred = torch.from_numpy(queries).to(self.device)
        if self.sim_func == "l2":
            centred = centred - self._centre.to(self.device)
        scale = GPU_FACTOR if self.device.type == "cuda" else 1
        block = max(candidates, scale * BLOCK_BYTES // (4 * self.keys.shape[1]))
        batch = max(1, scale * SCORE_BYTES // (4 * block))
        starts = range(0, len(self.keys), block)
        for start in tqdm(starts, "Searching all keys", unit=" blocks", disable=not progress):
            keys, halves = self._centred(start, start + block)
            for first in range(0, len(queries), batch):
                rows = slice(first, first + batch)
                # Half the squared distance but for what is the query's own; the negated product but for the same.
                scores = torch.addmm(halves, centred[rows], keys.T, alpha=-1)  # [batch, block]
                nearest.take(rows, scores, start)
        return self._ranked(queries, nearest.entries.cpu().numpy(), k)

    def _centred(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Centred keys ``[block, dimension]`` on the device, and half their squared lengths ``[block]`` (l2) or 0."""
        keys = torch.tensor(self.keys[start:stop]).to(self.device).float()
        keys -= self._centre.to(self.device)
        halves = keys.square().sum(1) / 2
        if not halves.isfinite().all():
            finite_keys(self.keys[start:stop])  # says so
        return keys, halves if self.sim_func == "l2" else torch.zeros_like(halves)

    def _ranked(self, queries: np.ndarray, entries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The candidates' own distances, and the ``k`` first by them."""
        entries = np.sort(entries, axis=1)  # [n, candidates]
        distances = exact_distances(self.keys, queries, entries, self.sim_func)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]  # [n, k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(entries, order, 1)


class _Nearest:
    """The best ``width`` entries of each query so far.

    Attributes
    ----------
    scores : float32 ``[n, width]``, in no order; smaller is nearer.
    entries : int64 ``[n, width]``.
    """

    def __init__(self, queries: int, width: int, device: torch.device) -> None:
        self.scores = torch.full((queries, width), torch.inf, device=device)
        self.entries = torch.zeros((queries, width), dtype=torch.int64, device=device)

    def take(self, rows: slice, scores: Tensor, start: int) -> None:
        """Take in what is nearer among a block's ``scores`` ``[queries, block]``, whose first entry is ``start``."""
        width = self.scores.shape[1]
        if start == 0:
            found, entries = scores.topk(width, largest=False, sorted=False)
            self.scores[rows], self.entries[rows] = found, entries
            return
        found, columns = _below(scores, self.scores[rows].amax(1, keepdim=True))
        merged = torch.cat([self.scores[rows], found], 1)  # [queries, width + most found]
        entries = torch.cat([self.entries[rows], columns + start], 1)
        self.scores[rows], order = merged.topk(width, largest=False, sorted=False)
        self.entries[rows] = entries.gather(1, order)


def _below(scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of each row that are below its limit ``[rows, 1]``, and their columns, ``[rows, most of a row]``.

    Few are, after the first blocks: finding them costs less than ranking all would. The rest of a row is infinite.
    """
    places = (scores < limits).view(-1).nonzero().squeeze(1)  # [found], row by row
    of_row = places.div(scores.shape[1], rounding_mode="floor")  # [found]
    counts = torch.bincount(of_row, minlength=len(scores))  # [rows]
    slots = torch.arange(len(places), device=scores.device) - (counts.cumsum(0) - counts)[of_row]  # [found]
    found = scores.new_full((len(scores), int(counts.max())), torch.inf)
    columns = torch.zeros(found.shape, dtype=torch.int64, device=scores.device)
    found[of_row, slots] = scores.view(-1)[places]
    columns[of_row, slots] = places - of_row * scores.shape[1]
    return found, columns
