"""A file of keys that are written at their places, in any order and by several processes at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.files import write_npy_header

KEY_DTYPE = np.float16


@dataclass(frozen=True)
class KeyFile:
    """A .npy file of float16 keys ``[count, dimension]``, as long as it will be from the beginning.

    Attributes
    ----------
    path : the file.
    count, dimension : its shape.
    """

    path: Path
    count: int
    dimension: int

    @property
    def bytes(self) -> int:
        """Of the keys, without the header."""
        return self.count * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of a key."""
        return self.dimension * np.dtype(KEY_DTYPE).itemsize

    def has_room(self) -> bool:
        """Whether the file is there, and as long as it will be."""
        return self.path.exists() and self.path.stat().st_size >= self.bytes

    def make_room(self, anew: bool) -> None:
        """Make the file as long as it will be; where not ``anew``, what is in it stays."""
        with open(self.path, "w+b" if anew else "r+b") as file:
            write_npy_header(file, KEY_DTYPE, (self.count, self.dimension))
            # All of it at once (disks keep no room for what was never written): each writes at its own place.
            file.truncate(file.tell() + self.bytes)

    def write(self, row: int, keys: np.ndarray) -> None:
        """Write keys, float16 ``[n, dimension]``, from a row on; they are safe on the disk when it returns."""
        header = self.path.stat().st_size - self.bytes
        # For writing only: a network disk that had read a page could write it back over another's keys.
        with open(os.open(self.path, os.O_WRONLY), "wb") as file:
            file.seek(header + row * self.row_bytes)
            file.write(keys.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> np.ndarray:
        """The keys, memory-mapped."""
        return map_npy(self.path)
