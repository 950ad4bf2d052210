"""The keys of an index's segment: on the disk from when the LM reads them until the segment has them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from knn_lm_eval.make.dump_progress import Run, is_covered, joined, share_states
from knn_lm_eval.make.key_file import KeyFile
from knn_lm_eval.make.windows import Window
from knn_lm_eval.search.index_build import Segment


class SegmentKeys:
    """Where the keys of a segment gather.

    Parameters
    ----------
    output : the dump's folder, where what is there is noted.
    work : the folder of their file.
    segment : the segment.
    dimension : numbers per key.
    """

    def __init__(self, output: Path, work: Path, segment: Segment, dimension: int) -> None:
        self.segment = segment
        self.file = KeyFile(work / f"keys.{segment.number:06d}.npy", segment.stop - segment.start, dimension)
        self._noted = share_states(output, segment.number)

    def of_segment(self, begin: int, end: int) -> Run:
        """Which of the entries ``[begin, end)`` are of this segment."""
        return [max(begin, self.segment.start), min(end, self.segment.stop)]

    def lacks(self, chunk: list[Window], done: list[Run]) -> bool:
        """Whether keys of a chunk are neither noted here nor ``done`` before."""
        begin, end = self.of_segment(chunk[0].start, chunk[-1].stop)
        return not is_covered(joined([*done, *self._runs()]), begin, end)

    def take(self, first: int, keys: np.ndarray) -> None:
        """Write and note what of some keys is of this segment: float16 ``[n, dimension]``, from an entry on."""
        begin, end = self.of_segment(first, first + len(keys))
        if begin < end:
            if not self.file.has_room():
                self.file.make_room(anew=True)
            self.file.write(begin - self.segment.start, keys[begin - first : end - first])
            self._noted.note(runs_done=joined([*self._runs(), [begin, end]]))

    def _runs(self) -> list[Run]:
        return self._noted.notes().get("runs_done", [])
