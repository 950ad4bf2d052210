"""What building an index takes of memory, kept to what it may take, or refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

import faiss

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import bytes_per_code
from knn_lm_eval.search.list_files import ID_BYTES, head_of
from knn_lm_eval.search.training import training_bytes
from knn_lm_eval.store import key_stream
from knn_lm_eval.system.memory import allowed_bytes, resident_bytes, size_text

MOST_IN_SEGMENT = 2**22  # entries
GROWN = 2  # how much more room lists take while they grow
CHUNK_ROWS = 4  # float32 keys for each that is added: itself, checked and transformed
PAIR_BYTES = 80  # for each query and neighbour that are measured


@dataclass(frozen=True)
class Allowance:
    """Memory that a build may take.

    Attributes
    ----------
    free : bytes, beside what the process has already.
    taken : what that is.
    """

    free: int
    taken: int

    @classmethod
    def of(cls, memory: int | None) -> Allowance:
        """Of ``memory`` bytes in all, or of half of what is available."""
        taken = (resident_bytes() or {"anonymous": 0})["anonymous"]
        return cls(allowed_bytes(memory) - (0 if memory is None else taken), taken)

    def check_training(self, factory: str, dimension: int, sim_func: str, sample: int) -> None:
        """Raise UserError where training on so many keys takes more."""
        needed = training_bytes(factory, dimension, sim_func, sample)
        if sample and needed > self.free:
            less = " or a smaller --train_sample"
            self._refuse(f"Training {factory} on {sample:,} keys of {dimension} numbers", needed, less)

    def entries_in_segment(self, trained: faiss.Index) -> int:
        """How many entries a segment of a trained index can have: a whole number of chunks.

        Raises UserError where that is not one.
        """
        chunk = key_stream.ADD_CHUNK
        fixed = len(head_of(trained, 0) or b"") + chunk * CHUNK_ROWS * 4 * trained.d
        each = GROWN * (bytes_per_code(trained) + ID_BYTES)
        if (needed := fixed + chunk * each) > self.free:
            self._refuse("Adding keys to the index", needed)
        return min(MOST_IN_SEGMENT, (self.free - fixed) // each // chunk * chunk)

    def check_in_memory(self, index: faiss.Index, entries: int, parts: int | None) -> None:
        """Raise UserError where so many entries, at a time, do not fit in memory."""
        chunk = min(key_stream.ADD_CHUNK, entries)
        needed = GROWN * entries * (bytes_per_code(index) + ID_BYTES) + chunk * CHUNK_ROWS * 4 * index.d
        if needed > self.free:
            more = " or more --parts" if parts else " or build it in --parts"
            self._refuse(f"{type(index).__name__} is filled in memory: {entries:,} entries at a time", needed, more)

    def check_quality(self, queries: int, k: int, dimension: int) -> None:
        """Raise UserError where comparing so many queries' neighbours takes more."""
        needed = queries * (k * PAIR_BYTES + 4 * 4 * dimension)
        if queries and needed > self.free:
            self._refuse(f"Measuring the index with {queries:,} queries", needed, " or fewer --quality_queries")

    def _refuse(self, what: str, needed: int, instead: str = "") -> None:
        raise UserError(
            f"{what} takes about {size_text(needed)} of memory, and {size_text(max(0, self.free))} may be taken: give "
            f"--memory {size_text(needed + self.taken)} or more{',' if instead else ''}{instead}."
        )
