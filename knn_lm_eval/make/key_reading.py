"""What the LM gives for a text that was tokenized: the keys of its windows, batch by batch and chunk by chunk.

A batch gives the same bytes whenever it is read, so what was read once can be taken over instead of being read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.make.key_file import KEY_DTYPE
from knn_lm_eval.make.window_keys import keys_of_windows
from knn_lm_eval.make.windows import Window, WindowSettings, batches


class ReadBefore(Protocol):
    """Keys of batches that were read before."""

    def of_batch(self, batch: list[Window]) -> np.ndarray | None:
        """As ``KeyReader.of_batch``; None for a batch that was not."""
        ...


class KeyReader:
    """Reads the text of a dump with its LM.

    Parameters
    ----------
    model : the LM.
    prefix_token_id : what is read before a document's first token.
    windows : how the text is cut.
    dimension : numbers per key.
    values : the text, int32 ``[count]``.
    read_before : what need not be read again.
    """

    def __init__(
        self,
        model: LanguageModel,
        prefix_token_id: int,
        windows: WindowSettings,
        dimension: int,
        values: np.ndarray,
        read_before: ReadBefore | None = None,
    ) -> None:
        self.model, self.prefix_token_id, self.windows = model, prefix_token_id, windows
        self.dimension, self.values, self.read_before = dimension, values, read_before

    def of_chunk(self, chunk: list[Window], begin: int, end: int, advance: Callable[[int], object]) -> np.ndarray:
        """The keys of entries ``[begin, end)`` of a chunk, float16 ``[end - begin, dimension]``.

        Parameters
        ----------
        advance : called with how many more are there.
        """
        keys = np.empty((end - begin, self.dimension), dtype=KEY_DTYPE)
        for batch in batches(chunk, self.windows):
            if all(window.stop <= begin or window.start >= end for window in batch):
                continue
            for window, rows in zip(batch, rows_of_windows(self.of_batch(batch), batch), strict=True):
                first, last = max(window.start, begin), min(window.stop, end)
                if first < last:
                    keys[first - begin : last - begin] = rows[first - window.start : last - window.start]
                    advance(last - first)
        return keys

    def of_batch(self, batch: list[Window]) -> np.ndarray:
        """The keys of a batch's entries, window by window: float16 ``[entries, dimension]``.

        Raises
        ------
        UserError
            Where float16 cannot hold a key.
        """
        if self.read_before is not None and (kept := self.read_before.of_batch(batch)) is not None:
            return kept
        read = list(keys_of_windows(self.model, self.prefix_token_id, self.values, batch))
        keys = torch.cat(read).to(torch.float16).cpu().numpy()
        if not np.isfinite(keys).all():
            entries = np.concatenate([np.arange(window.start, window.stop) for window in batch])
            raise UserError(
                f"The model's key for token {entries[~np.isfinite(keys).all(axis=1)].min()} is not a finite float16 "
                f"number (NaN, or beyond 65,504); check the model's weights and dtype, or use "
                f"knn_keytype=last_ffn_input."
            )
        return keys


def entries_in(windows: list[Window]) -> int:
    """How many entries windows have."""
    return sum(window.stop - window.start for window in windows)


def rows_of_windows(keys: np.ndarray, batch: list[Window]) -> Iterator[np.ndarray]:
    """The keys of each window of a batch, of ``[entries, dimension]``."""
    ends = np.cumsum([window.stop - window.start for window in batch])
    yield from np.split(keys, ends[:-1])
