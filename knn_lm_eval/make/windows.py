"""How a store's text is cut for the forward passes: windows with context, in batches, in chunks.

The dump reads the text so, and so does whatever has to read it again as the dump did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.reading import Passage
from knn_lm_eval.store.manifest import WindowsRecord

# Batches per chunk: a chunk is what an interruption can lose, and what is sorted by length to save padding.
BATCHES_PER_CHUNK = 4


@dataclass(frozen=True)
class WindowSettings:
    """How text is cut for the forward passes.

    Attributes
    ----------
    max_length : tokens per window.
    stride : tokens that each window but a document's first adds; every token is read with at least
        ``max_length - stride`` tokens of context where its document has them.
    batch_size : windows of ``max_length`` tokens per batch; shorter ones are packed to as many tokens.
    """

    max_length: int
    stride: int
    batch_size: int

    @classmethod
    def of_store(cls, windows: WindowsRecord) -> WindowSettings:
        """Those that a store's manifest says."""
        return cls(windows["max_length"], windows["stride"], windows["batch_size"])

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.max_length:
            raise UserError(f"stride={self.stride} must be between 1 and max_length={self.max_length}.")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1.")


@dataclass(frozen=True)
class Window:
    """Entries ``[start, stop)`` and the tokens to read for them: ``[context, stop - 1)``, after a prefix token
    where ``context`` is None (a document's beginning)."""

    context: int | None
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - (self.start if self.context is None else self.context + 1)

    def tokens(self, values: np.ndarray, prefix_token_id: int) -> np.ndarray:
        """What to read, int64 ``[length]``; its last positions predict the entries."""
        begin = self.start if self.context is None else self.context
        prefix = [prefix_token_id] if self.context is None else []
        return np.concatenate([np.array(prefix, dtype=np.int64), values[begin : self.stop - 1]], dtype=np.int64)


def cut_windows(document_starts: np.ndarray, count: int, settings: WindowSettings) -> Iterator[Window]:
    """The windows over all documents, in text order; each entry is in exactly one.

    As lm-eval's rolling windows: the first of a document begins with the prefix token and holds
    ``max_length`` entries, each further one adds ``stride`` and always reads ``max_length`` tokens.
    """
    for begin, end in zip(document_starts.tolist(), [*document_starts[1:].tolist(), count], strict=True):
        stop = min(begin + settings.max_length, end)
        yield Window(None, begin, stop)
        while stop < end:
            start, stop = stop, min(stop + settings.stride, end)
            yield Window(stop - settings.max_length - 1, start, stop)


def chunks(windows: Iterable[Window], settings: WindowSettings) -> Iterator[list[Window]]:
    """Runs of windows in text order, each of some batches."""
    chunk: list[Window] = []
    for window in windows:
        chunk.append(window)
        if chunk[-1].stop - chunk[0].start >= BATCHES_PER_CHUNK * settings.batch_size * settings.stride:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def batches(chunk: list[Window], settings: WindowSettings) -> Iterator[list[Window]]:
    """Batches of windows of similar length, at most ``batch_size * max_length`` tokens with padding."""
    budget = settings.batch_size * settings.max_length
    batch: list[Window] = []
    for window in sorted(chunk, key=lambda window: -window.length):
        if batch and (len(batch) + 1) * batch[0].length > budget:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def passages(windows: list[Window], values: np.ndarray, prefix_token_id: int) -> list[Passage]:
    """What the LM reads for each window, and as continuation the window's entries."""
    return [
        Passage(window.tokens(values, prefix_token_id).tolist(), [values[window.start : window.stop].tolist()])
        for window in windows
    ]
