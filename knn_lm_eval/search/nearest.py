# mypy: disable-error-code="no-untyped-def"
"""The nearest entries of each query so far, while a pass over the keys goes on.

A product of matrices tells roughly how near each key is; what may be among the nearest by it has its distance computed
anew, pair by pair, at once, since its key is at hand. What is kept is ranked by those distances and, of equal ones, by
the entry: so it is the same whatever the blocks and batches are.

Distance and entry are one int64: the distance's bits above, in an order that integers have, and the entry below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.compiling import compiled
from knn_lm_eval.search.key_blocks import Block

MOST_ENTRIES = 2**31  # in a run: an entry has the lower 32 bits
EMPTY = np.iinfo(np.int64).max
GATHERED_BYTES = 2**28  # of keys and queries gathered at a time for distances, where they are not compiled


class Compared:
    """Queries as they are multiplied with centred keys: a score below a limit says what may be near enough.

    The score of a key x of a query q is (1 - 4e) |x|^2 / 2 - qx for ``l2``, and -4e |x|^2 / 2 - qx for ``dot``, with q
    scaled to the keys' length. e bounds the rounding of a product relative to |q||x|, and so to (|q|^2 + |x|^2) / 2.

    Parameters
    ----------
    queries : float32 ``[n, dimension]``.
    centre : of the keys, float32 ``[dimension]``.
    sim_func : ``l2`` or ``dot``.
    key_length : about the length of a centred key.

    Attributes
    ----------
    factors : float32 ``[n, dimension]``, what the keys are multiplied with.
    own : float32 ``[n, dimension]``, what distances are computed from: centred for ``l2``.
    constant : float64 ``[n]``, what of a distance does not depend on the key: 0 for ``l2``, -qc for ``dot``.
    of_halves : what half a key's squared length counts for in a score.
    slope, offset : float64 ``[n]``; a key whose distance is below d has a score of at most
        ``slope * (d + rounding * |d|) + offset``.
    rounding : of distances, relative.
    """

    def __init__(self, queries: np.ndarray, centre: np.ndarray, sim_func: str, key_length: float) -> None:
        error = 2 * (queries.shape[1] + 16) * 2.0**-24
        self.is_dot = sim_func == "dot"
        if self.is_dot:
            lengths = np.linalg.norm(queries.astype(np.float64), axis=1)  # [n]
            scale = np.divide(key_length, lengths, out=np.ones_like(lengths), where=lengths > 0)  # [n]
            self.own, self.constant = queries, -(queries.astype(np.float64) @ centre)
            self.factors = (queries * scale[:, None]).astype(np.float32)
            self.slope, self.rounding = scale, 2.0**-22
            self.offset = -self.constant * scale + 4 * error * key_length**2
            self.of_halves = -4 * error
        else:
            self.own = self.factors = queries - centre
            squares = np.square(self.own, dtype=np.float64).sum(1)  # [n]
            self.constant, self.slope = np.zeros(len(queries)), np.full(len(queries), 0.5)
            self.offset = (4 * error - 0.5) * squares
            self.of_halves, self.rounding = 1 - 4 * error, error

    def __len__(self) -> int:
        return len(self.own)


class Nearest(ABC):
    """The ``k`` nearest entries of each query among those that were taken in.

    Parameters
    ----------
    compared : the queries.
    k : at most the number of entries.
    device : where all is.
    """

    def __init__(self, compared: Compared, k: int, device: torch.device) -> None:
        self.compared, self.k, self.device = compared, k, device
        self._factors = torch.from_numpy(compared.factors).to(device)

    def take(self, block: Block, batch: int) -> None:
        """Take in a block's keys, ``batch`` queries at a time."""
        halves = block.halves * self.compared.of_halves
        for first in range(0, len(self.compared), batch):
            rows = slice(first, first + batch)
            self._take(rows, scores_of(self._factors[rows], block.keys, halves), block)

    @abstractmethod
    def _take(self, rows: slice, scores: Tensor, block: Block) -> None:
        """Take in what is near by the ``scores`` ``[rows, block]`` of some queries."""

    @abstractmethod
    def _packed(self) -> np.ndarray:
        """Distances and entries, int64 ``[n, k]``, ascending; ``EMPTY`` where nothing was near."""

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances float32 ``[n, k]``, infinity in empty slots, and entries int64, -1 there; nearest first."""
        packed = self._packed()
        bits = (packed >> 32).astype(np.int32)
        distances = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32)
        entries = packed & 0xFFFFFFFF
        is_empty = packed == EMPTY
        distances[is_empty], entries[is_empty] = np.inf, -1
        return distances, entries


def nearest_on(device: torch.device, compared: Compared, k: int) -> Nearest:
    """The form that is fast there."""
    return CompiledNearest(compared, k, device) if device.type == "cpu" else TensorNearest(compared, k, device)


def scores_of(factors: Tensor, keys: Tensor, halves: Tensor) -> Tensor:
    """``halves`` less the products of queries and keys, float32 ``[queries, keys]``."""
    if keys.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
        return scores_by_halves(factors, keys, halves, _half_product)
    return torch.addmm(halves, factors, keys.T, alpha=-1)


def scores_by_halves(factors: Tensor, keys: Tensor, halves: Tensor, product) -> Tensor:
    """As ``scores_of``, by products of half-precision numbers: each number is split into two of 11 bits.

    The product of the two smaller parts, of 2^-22, is left out.
    """
    first, second, unit = _split(factors)
    of_keys, rest_of_keys, unit_of_keys = _split(keys)
    large = product(first, of_keys)
    small = product(torch.cat([first, second], 1), torch.cat([rest_of_keys, of_keys], 1))
    return torch.addcmul(halves, large.add_(small, alpha=2.0**-11), unit * unit_of_keys, value=-1)


def _half_product(some: Tensor, others: Tensor) -> Tensor:
    return torch.mm(some, others.T, out_dtype=torch.float32)


def _split(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half-precision parts a and b, and a unit u: the numbers are u (a + b / 2048)."""
    unit = torch.exp2(numbers.abs().amax().clamp(min=1e-30).log2().ceil())
    numbers = numbers / unit
    first = numbers.half()
    return first, ((numbers - first.float()) * 2048).half(), unit


class CompiledNearest(Nearest):
    """On CPUs, compiled: a buffer per query takes what is near, and keeps the ``k`` best whenever it is full."""

    def __init__(self, compared: Compared, k: int, device: torch.device) -> None:
        super().__init__(compared, k, device)
        count = len(compared)
        self._buffers = np.empty((count, k + max(k, 64)), dtype=np.int64)
        self._filled = np.zeros(count, dtype=np.int64)
        self._limits = np.full(count, np.inf, dtype=np.float32)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)  # starts threads when it is given work

    def _take(self, rows: slice, scores: Tensor, block: Block) -> None:
        compared, keys = self.compared, block.keys.numpy()
        parts = np.array_split(np.arange(rows.start, rows.start + len(scores)), min(self._threads, len(scores)))

        def take(part: np.ndarray) -> None:
            some = slice(part[0], part[-1] + 1)
            of_queries = compared.own, compared.constant, compared.slope, compared.offset
            _take(
                scores[some.start - rows.start : some.stop - rows.start].numpy(),
                keys,
                block.start,
                *(array[some] for array in of_queries),
                *(array[some] for array in (self._limits, self._filled, self._buffers)),
                self.k,
                compared.rounding,
                compared.is_dot,
            )

        if len(parts) == 1:
            take(parts[0])
        else:
            list(self._pool.map(take, parts))

    def _packed(self) -> np.ndarray:
        packed = np.empty((len(self._buffers), self.k), dtype=np.int64)
        for row, (buffer, filled) in enumerate(zip(self._buffers, self._filled, strict=True)):
            buffer[filled:] = EMPTY
            packed[row] = np.partition(buffer, self.k - 1)[: self.k]
        packed.sort(axis=1)
        return packed


# Sums may be taken in any order: that is what lets them be taken sixteen numbers at a time.
@compiled(fastmath={"reassoc", "contract"}, nogil=True)
def _take(scores, keys, start, own, constant, slope, offset, limits, filled, buffers, k, rounding, is_dot):
    distance = np.empty(1, dtype=np.float32)
    bits = distance.view(np.int32)
    near = np.empty(scores.shape[1], dtype=np.int32)
    for row in range(len(scores)):
        limit, count, buffer, query, of_row = limits[row], filled[row], buffers[row], own[row], scores[row]
        for place in range(_columns_below(of_row, limit, near)):
            column = near[place]
            if not of_row[column] <= limit:
                continue
            key = keys[column]
            if is_dot:
                # All may lie near a large common number, and differ in what single precision leaves out.
                product = constant[row]
                for j in range(len(query)):
                    product -= np.float64(query[j]) * np.float64(key[j])
                distance[0] = product + 0.0
            else:
                square = np.float32(0.0)
                for j in range(len(query)):
                    difference = query[j] - key[j]
                    square += difference * difference
                distance[0] = square
            upper = bits[0] if bits[0] >= 0 else bits[0] ^ 0x7FFFFFFF
            buffer[count] = (np.int64(upper) << 32) | np.int64(start + column)
            count += 1
            if count == len(buffer):
                worst = _keep_smallest(buffer, count, k)
                count = k
                bits[0] = worst >> 32 if worst >= 0 else (worst >> 32) ^ 0x7FFFFFFF
                far = np.float64(distance[0])
                limit = np.float32(slope[row] * (far + rounding * abs(far)) + offset[row])
        limits[row], filled[row] = limit, count


@compiled(nogil=True)
def _columns_below(of_row, limit, near):
    """Note in ``near`` the columns of the scores up to ``limit``, and return how many they are: mostly few."""
    found = 0
    for begin in range(0, len(of_row), 32):
        end = min(begin + 32, len(of_row))
        here = np.int32(0)
        for column in range(begin, end):
            here += np.int32(of_row[column] <= limit)
        if here > 0:
            for column in range(begin, end):
                near[found] = column
                found += of_row[column] <= limit
    return found


@compiled(nogil=True)
def _keep_smallest(numbers, count, k):
    """Bring the ``k`` smallest of the first ``count`` numbers, all different, to the front; returns the largest."""
    low, high, place = 0, count - 1, k - 1
    while low < high:
        middle = (low + high) // 2
        first, second, third = numbers[low], numbers[middle], numbers[high]
        pivot = max(min(first, second), min(max(first, second), third))
        left, right = low, high
        while left <= right:
            while numbers[left] < pivot:
                left += 1
            while numbers[right] > pivot:
                right -= 1
            if left <= right:
                numbers[left], numbers[right] = numbers[right], numbers[left]
                left += 1
                right -= 1
        if place <= right:
            high = right
        elif place >= left:
            low = left
        else:
            break
    return numbers[place]


class TensorNearest(Nearest):
    """With tensors on any device: what a block has of near keys is merged with what was kept."""

    def __init__(self, compared: Compared, k: int, device: torch.device) -> None:
        super().__init__(compared, k, device)

        def there(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        self._own = there(compared.own)
        self._constant, self._slope, self._offset = map(there, (compared.constant, compared.slope, compared.offset))
        self._limits = torch.full((len(compared),), torch.inf, device=device)
        self._kept = torch.full((len(compared), k), EMPTY, dtype=torch.int64, device=device)

    def _take(self, rows: slice, scores: Tensor, block: Block) -> None:
        limits = self._limits[rows]
        if scores.shape[1] > self.k and bool((limits == torch.inf).any()):
            # No more than the k best of this block, and those that rounding may have put behind them.
            kth = scores.kthvalue(self.k, dim=1).values
            room = 2 * abs(1 - self.compared.of_halves if not self.compared.is_dot else self.compared.of_halves)
            length = self._factors[rows].square().sum(1) / 2
            limits = torch.minimum(limits, kth + room * (block.halves.max() + length))
        row, column = (scores <= limits[:, None]).nonzero(as_tuple=True)  # [found], row by row
        if not len(row):
            return
        near = pair_distances(self._own, self._constant, block.keys, row + rows.start, column, self.compared.is_dot)
        packed = self._pack(near, column + block.start)
        counts = torch.bincount(row, minlength=len(scores))  # [rows]
        slots = torch.arange(len(row), device=self.device) - (counts.cumsum(0) - counts)[row]
        found = torch.full((len(scores), int(counts.max())), EMPTY, dtype=torch.int64, device=self.device)
        found[row, slots] = packed
        kept = torch.cat([self._kept[rows], found], 1).topk(self.k, largest=False, sorted=False).values  # [rows, k]
        self._kept[rows] = kept
        worst = kept.amax(1)
        upper = (worst >> 32).int()
        far = torch.where(upper < 0, upper ^ 0x7FFFFFFF, upper).view(torch.float32).double()
        new_limits = self._slope[rows] * (far + self.compared.rounding * far.abs()) + self._offset[rows]
        self._limits[rows] = torch.where(worst == EMPTY, torch.inf, new_limits).float()

    def _pack(self, distances: Tensor, entries: Tensor) -> Tensor:
        bits = distances.view(torch.int32)
        return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) | entries

    def _packed(self) -> np.ndarray:
        return self._kept.sort(dim=1).values.cpu().numpy()


def pair_distances(
    queries: Tensor, constant: Tensor, keys: Tensor, rows: Tensor, columns: Tensor, is_dot: bool
) -> Tensor:
    """The distances of pairs of a query and a key, both by their numbers; ``GATHERED_BYTES`` are gathered at a time.

    Parameters
    ----------
    queries : float32 ``[n, dimension]``.
    constant : float64 ``[n]``, what is added to the inner products of each; not looked at for ``l2``.
    keys : float16 or float32 ``[count, dimension]``.
    rows, columns : int64 ``[pairs]``.
    is_dot : negated inner products, summed in double precision, instead of squared distances.

    Returns
    -------
    float32 ``[pairs]``, where the keys are.
    """
    distances = torch.empty(len(rows), device=keys.device)
    step = max(1, GATHERED_BYTES // (16 * keys.shape[1]))
    for first in range(0, len(rows), step):
        some = slice(first, first + step)
        near, own = keys[columns[some]], queries[rows[some]]  # [step, dimension]
        if is_dot:
            distances[some] = (constant[rows[some]] - (own.double() * near.double()).sum(1)).float() + 0.0
        else:
            distances[some] = (own - near).square().sum(1)
    return distances
