"""A run of a datastore's keys, centred and block by block on one device: kept there where they fit, else streamed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.store.key_stream import finite_keys
from knn_lm_eval.store.removed import Keys, is_mapped
from knn_lm_eval.system.memory import available_bytes

BLOCK_BYTES = 2**23  # of keys as float32 at a time: what a CPU's caches hold
GPU_BLOCK_BYTES = 2**28
KEPT_BYTES = 2**28  # of keys as float32 that stay in a CPU's memory between searches
GPU_ROOM = 2**32  # bytes of a GPU's free memory that kept keys leave to all else
CENTRE_SAMPLE = 2**10  # keys that the centre is the mean of: near enough, and found in a moment
PAGE = 4096


class Block(NamedTuple):
    """Consecutive keys.

    Attributes
    ----------
    start : the first one's entry, counted from the run's first.
    keys : float32 ``[block, dimension]`` on the device, centred.
    halves : float32 ``[block]``, half their squared lengths.
    """

    start: int
    keys: Tensor
    halves: Tensor


def centre_of(keys: Keys) -> np.ndarray:
    """Near the mean of the keys, float32 ``[dimension]``, in numbers of 11 bits.

    So few bits that a float16 key less the centre is nearly always exact in float32.
    """
    sample = keys[:: max(1, len(keys) // CENTRE_SAMPLE)].astype(np.float32)
    mean = np.nan_to_num(sample.mean(0, dtype=np.float64), posinf=0.0, neginf=0.0).astype(np.float32)
    return (mean.view(np.int32) & ~0x1FFF).view(np.float32)


class KeyBlocks:
    """The keys of a run of entries as blocks on a device.

    On a GPU with room for them they are uploaded once, as they are in the file. On CPUs few keys stay in memory from
    the second pass on, centred. All others come from ``keys`` in each pass: a thread reads the next block while this
    one is worked on, and for a GPU copies it through one of two pinned buffers, on a stream of its own.

    Parameters
    ----------
    keys : float16 or float32 ``[count, dimension]`` of the run, may be memory-mapped.
    centre : float32 ``[dimension]``, which is taken off.
    device : where the blocks are wanted.
    """

    def __init__(self, keys: Keys, centre: np.ndarray, device: torch.device) -> None:
        self._keys, self.device = keys, device
        self._centre = torch.from_numpy(centre).to(device)
        self._passes = 0
        self._kept: Block | None = None  # all of them
        self._uploaded: Tensor | None = None  # [count, dimension], not centred

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def size(self) -> int:
        """Keys in a block."""
        is_gpu = self.device.type == "cuda"
        return max(1, (GPU_BLOCK_BYTES if is_gpu else BLOCK_BYTES) // (4 * self._keys.shape[1]))

    @property
    def fit(self) -> bool:
        """Whether the keys stay on the device between passes."""
        if self._uploaded is not None or self._kept is not None:
            return True
        if self.device.type == "cuda":
            return self._keys.nbytes + GPU_ROOM <= torch.cuda.mem_get_info(self.device)[0]
        return 4 * self._keys.size <= KEPT_BYTES

    @property
    def bytes_held(self) -> int:
        """Of this process's own memory, that stay taken between passes."""
        return 0 if self._kept is None else self._kept.keys.nbytes + self._kept.halves.nbytes

    @property
    def resident(self) -> Tensor | None:
        """``[count, dimension]``: all keys on the GPU, as they are in the file, once a pass has uploaded them."""
        return self._uploaded

    @property
    def streams(self) -> bool:
        """Whether each pass has to read keys from the disk, for there is no room for them: in the GPU, or in half of
        the machine's available memory."""
        if self.device.type == "cuda":
            return not self.fit
        available = available_bytes()
        return is_mapped(self._keys) and available is not None and 2 * self._keys.nbytes > available

    def __iter__(self) -> Iterator[Block]:
        """One pass over the keys; raises UserError where one is not finite."""
        self._passes += 1
        keeps = (self.device.type == "cuda" or self._passes == 2) and self.fit
        if keeps and self.device.type == "cuda" and self._uploaded is None:
            self._uploaded = torch.cat([raw for _, raw in self._streamed()])
        if self._uploaded is not None:
            for start in range(0, len(self), self.size):
                yield self._centred(start, self._uploaded[start : start + self.size])
            return
        if keeps and self._kept is None:
            blocks = [self._centred(start, raw) for start, raw in self._streamed()]
            self._kept = Block(0, torch.cat([b.keys for b in blocks]), torch.cat([b.halves for b in blocks]))
            del blocks
        if self._kept is not None:
            for start in range(0, len(self), self.size):
                some = slice(start, start + self.size)
                yield Block(start, self._kept.keys[some], self._kept.halves[some])
            return
        for start, raw in self._streamed():
            yield self._centred(start, raw)

    def _centred(self, start: int, raw: Tensor) -> Block:
        keys = raw.to(torch.float32, copy=True).sub_(self._centre)
        halves = torch.linalg.vecdot(keys, keys) / 2
        if not halves.isfinite().all():
            finite_keys(self._keys[start : start + len(raw)])  # says so
        return Block(start, keys, halves)

    def _streamed(self) -> Iterator[tuple[int, Tensor]]:
        """The keys as they are in the file, block by block, with the first entry of each."""
        starts = range(0, len(self), self.size)
        reader = _PinnedReader(self._keys, self.size, self.device) if self.device.type == "cuda" else None
        reads_ahead = reader is not None or is_mapped(self._keys)
        with ThreadPoolExecutor(1) as thread:

            def begin(number: int) -> Future | None:
                if not reads_ahead or number >= len(starts):
                    return None
                some = slice(starts[number], starts[number] + self.size)
                return thread.submit(reader.read, some) if reader else thread.submit(_touch, self._keys[some])

            upcoming = begin(0)
            for number, start in enumerate(starts):
                read = None if upcoming is None else upcoming.result()
                upcoming = begin(number + 1)
                if reader is not None and read is not None:
                    yield start, reader.ready(read)
                else:
                    yield start, _tensor(self._keys[start : start + self.size]).to(self.device)


def _tensor(keys: np.ndarray) -> Tensor:
    """A tensor of keys, without a copy where torch takes their memory (it warns of what is read-only)."""
    return torch.from_numpy(keys) if keys.flags.writeable else torch.from_numpy(np.array(keys))


def _touch(keys: np.ndarray) -> None:
    """Have the pages of a mapped file read from disk."""
    if keys.flags.c_contiguous:
        keys.reshape(-1).view(np.uint8)[::PAGE].max(initial=0)


class _PinnedReader:
    """Copies blocks of keys to a GPU, by way of two pinned buffers.

    Parameters
    ----------
    keys : as for ``KeyBlocks``.
    size : keys in a block, at most.
    device : the GPU.
    """

    def __init__(self, keys: Keys, size: int, device: torch.device) -> None:
        self._keys, self._device, self._turn = keys, device, 0
        self._stream = torch.cuda.Stream(device)
        shape = min(size, len(keys)), keys.shape[1]
        dtype = torch.from_numpy(np.empty(0, keys.dtype)).dtype
        self._buffers = [torch.empty(shape, dtype=dtype, pin_memory=True) for _ in range(2)]
        self._free = [torch.cuda.Event() for _ in range(2)]  # when the last copy from a buffer is done

    def read(self, some: slice) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy a block; returns where it is going, and what says that it is there."""
        buffer, done = self._buffers[self._turn], self._free[self._turn]
        self._turn = 1 - self._turn
        done.synchronize()
        keys = self._keys[some]
        np.copyto(buffer.numpy()[: len(keys)], keys)
        with torch.cuda.stream(self._stream):
            there = buffer[: len(keys)].to(self._device, non_blocking=True)
            done.record(self._stream)
        return there, done

    def ready(self, copied: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """The block, for use on the current stream."""
        there, done = copied
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        there.record_stream(stream)
        return there
