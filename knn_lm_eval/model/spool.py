"""Files in which rows of tensors wait: written one after the other, read back anywhere, gone when they are closed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.system.files import disk_errors_in


class WaitingRows:
    """Rows of one dtype and width, in a file without a name: it is gone however the process ends.

    Parameters
    ----------
    folder : on the disk that is to hold it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows = folder, 0
        self._like: Tensor | None = None  # a row's dtype and shape
        with disk_errors_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed on leaving)

    def __enter__(self) -> WaitingRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._rows

    def append(self, rows: Tensor) -> None:
        """Add rows ``[n, width]``, from any device; raises UserError where the disk is full."""
        rows = rows.detach().cpu().contiguous()
        self._like = rows[:0]
        with disk_errors_in(self._folder):
            self._file.seek(0, 2)
            self._file.write(rows.view(torch.uint8).numpy())
            self._file.flush()
        self._rows += len(rows)

    def read(self, start: int, stop: int) -> Tensor:
        """The rows from ``start`` on and before ``stop``, on the CPU."""
        assert self._like is not None, "nothing was appended"
        width = self._like.shape[1] * self._like.element_size()
        content = np.empty((stop - start, width), dtype=np.uint8)
        with disk_errors_in(self._folder):
            self._file.seek(start * width)
            self._file.readinto(content)
        return torch.from_numpy(content).view(self._like.dtype)
