# mypy: disable-error-code="no-untyped-def"
"""What a distribution over the vocabulary says: its entropy, and the rank of a token.

On CPUs both are compiled, and read a table of half-precision numbers as it is: they are to cost little beside the
softmax that made it. 2^x is the exponent's bits times a polynomial of the mantissa (Schraudolph 1999, corrected).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.compiling import compiled

BLOCK = 1024  # numbers that are at work in the processor's cache
# 2^(m - 1) / m for m in [1, 2], from the constant on: to 1e-5 of its value.
_C0, _C1, _C2, _C3, _C4, _C5 = (
    float(c)
    for c in np.polynomial.Chebyshev.interpolate(lambda m: 2.0 ** (m - 1) / m, 5, domain=[1, 2])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
PER_NAT, ONE = 2.0**23 / np.log(2.0), 127 * 2.0**23  # of a float32's bits as a number: per nat, and those of 1


def entropies(log_probs: Tensor) -> Tensor:
    """The entropy of each row, in nats, to 1e-4 of its value: float32 ``[n]``.

    Parameters
    ----------
    log_probs : ``[n, vocabulary]``, natural logarithms; minus infinity for what cannot be.
    """
    if log_probs.device.type != "cpu":
        wide = log_probs.float()
        return -wide.exp().mul_(wide).nan_to_num_(0.0).sum(dim=-1)
    bits, found = _bits(log_probs), np.empty(len(log_probs), dtype=np.float32)
    _in_parts(lambda some: _entropies(bits[some], found[some]), len(found))
    return torch.from_numpy(found)


def ranks(log_probs: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """The rank of each target in its row: 1 for the most probable token, and for those that tie with it.

    Parameters
    ----------
    log_probs : ``[n, vocabulary]``, none above 0.
    rows, targets : int64 ``[pairs]``, on the same device.

    Returns
    -------
    int32 ``[pairs]``.
    """
    if log_probs.device.type != "cpu":
        above = log_probs[rows] > log_probs[rows, targets][:, None]
        return above.sum(dim=-1, dtype=torch.int32) + 1
    bits, found = _bits(log_probs), np.empty(len(rows), dtype=np.int32)
    at, of = rows.numpy(), targets.numpy()
    _in_parts(lambda some: _ranks(bits, at[some], of[some], found[some]), len(found))
    return torch.from_numpy(found)


def _bits(log_probs: Tensor) -> np.ndarray:
    """The table's numbers as unsigned integers, uint16 for bfloat16, else the uint32 of float32."""
    if log_probs.dtype == torch.bfloat16:
        return log_probs.contiguous().view(torch.int16).numpy().view(np.uint16)
    return log_probs.float().contiguous().view(torch.int32).numpy().view(np.uint32)


def _in_parts(work: Callable[[slice], None], count: int) -> None:
    """Have as many threads as torch uses do their shares of ``count`` rows."""
    threads = min(torch.get_num_threads(), max(1, count // 8))
    if threads == 1:
        work(slice(0, count))
        return
    ends = [count * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, map(slice, ends[:-1], ends[1:])))


# Sums may be taken in any order, and nothing is NaN: that is what lets numbers be taken eight or sixteen at a time.
@compiled(nogil=True, fastmath={"reassoc", "contract", "nsz", "nnan"})
def _entropies(bits, found):
    whole = np.empty(BLOCK, dtype=np.int32)
    number = whole.view(np.float32)
    power_bits = np.empty(BLOCK, dtype=np.int32)
    power = power_bits.view(np.float32)
    mantissa_bits = np.empty(BLOCK, dtype=np.int32)
    mantissa = mantissa_bits.view(np.float32)
    shift = np.uint32(16 if bits.itemsize == 2 else 0)
    per_nat, one = np.float32(PER_NAT), np.float32(ONE)
    c0, c1, c2 = np.float32(_C0), np.float32(_C1), np.float32(_C2)
    c3, c4, c5 = np.float32(_C3), np.float32(_C4), np.float32(_C5)
    for row in range(len(bits)):
        total = np.float64(0.0)
        for begin in range(0, bits.shape[1], BLOCK):
            part = bits[row, begin : begin + BLOCK]
            for j in range(len(part)):
                whole[j] = np.int32(np.uint32(part[j]) << shift)
            for j in range(len(part)):
                x = number[j] if number[j] > np.float32(-100.0) else np.float32(-100.0)  # its share is nothing
                exponent = np.int32(x * per_nat + one)
                power_bits[j] = max(exponent, np.int32(0))
                mantissa_bits[j] = (exponent & np.int32(0x7FFFFF)) | np.int32(0x3F800000)
            of_block = np.float32(0.0)
            for j in range(len(part)):
                x = number[j] if number[j] > np.float32(-100.0) else np.float32(-100.0)
                m = mantissa[j]
                of_block += x * power[j] * (c0 + m * (c1 + m * (c2 + m * (c3 + m * (c4 + m * c5)))))
            total += np.float64(of_block)
        found[row] = -total


# Of numbers that are not positive, the larger one has the smaller bits.
@compiled(nogil=True)
def _ranks(bits, rows, targets, found):
    for i in range(len(rows)):
        of_row = bits[rows[i]]
        own = of_row[targets[i]]
        before = 0
        for begin in range(0, len(of_row), BLOCK):
            part = of_row[begin : begin + BLOCK]
            smaller = np.uint16(0)
            for j in range(len(part)):
                smaller = np.uint16(smaller + np.uint16(part[j] < own))
            before += smaller
        found[i] = before + 1
