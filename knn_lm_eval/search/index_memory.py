"""What building an index takes of memory, kept to what it may take, or refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

import faiss

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import bytes_per_code, inverted_file, make_index
from knn_lm_eval.search.list_files import ID_BYTES, head_of
from knn_lm_eval.search.training import training_bytes
from knn_lm_eval.store import key_stream
from knn_lm_eval.system.memory import allowed_bytes, resident_bytes, size_text

MOST_IN_SEGMENT = 2**22  # entries
GROWN = 2  # how much more room lists take while they grow
CHUNK_ROWS = 4  # float32 keys for each that is added: itself, checked and transformed
PAIR_BYTES = 80  # for each query and neighbour that are measured
LINK_BYTES = 512  # at most, for each list, where a graph finds the lists


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
            self._refuse(_training(factory, dimension, sample), needed, " or a smaller --train_sample")

    def entries_in_segment(self, trained: faiss.Index) -> int:
        """How many entries a segment of a trained index can have: a whole number of chunks.

        Raises UserError where that is not one.
        """
        head = len(head_of(trained, 0) or b"")
        if (needed := _segment_bytes(trained, head, key_stream.ADD_CHUNK)) > self.free:
            self._refuse("Adding keys to the index", needed)
        return self._most_in_segment(trained, head)

    def entries_of_dump(
        self, factory: str, dimension: int, sim_func: str, *, sample: int, entries: int, queries: int, k: int
    ) -> int:
        """As ``entries_in_segment``, of an index that a dump trains, fills and measures.

        Parameters
        ----------
        sample : keys that it is still to be trained on.
        entries : the fewest that a segment can have.
        queries, k : held-out queries and neighbours of the measurement.

        Raises
        ------
        UserError
            Where one of the three takes more, by what takes most.
        """
        index = make_index(factory, dimension, sim_func)
        ivf = inverted_file(index)
        # Of an index that is not trained: a matrix before the lists, the lists' centroids, and codebooks.
        head = 4 * dimension**2 + (ivf.nlist * (4 * ivf.d + LINK_BYTES) if ivf else 0) + 4 * 256 * dimension
        needs = {
            _training(factory, dimension, sample): sample and training_bytes(factory, dimension, sim_func, sample),
            f"Adding keys to {factory}, {entries:,} at a time,": _segment_bytes(index, head, entries),
            _measuring(queries): _quality_bytes(queries, k, dimension),
        }
        what = max(needs, key=needs.__getitem__)
        if needs[what] > self.free:
            self._refuse(what, needs[what], " or another --factory")
        return self._most_in_segment(index, head)

    def _most_in_segment(self, index: faiss.Index, head: int) -> int:
        chunk, fixed = key_stream.ADD_CHUNK, _segment_bytes(index, head, 0)
        return min(MOST_IN_SEGMENT, (self.free - fixed) // _entry_bytes(index) // chunk * chunk)

    def check_in_memory(self, index: faiss.Index, entries: int, parts: int | None) -> None:
        """Raise UserError where so many entries, at a time, do not fit in memory."""
        chunk = min(key_stream.ADD_CHUNK, entries)
        needed = entries * _entry_bytes(index) + chunk * CHUNK_ROWS * 4 * index.d
        if needed > self.free:
            more = " or more --parts" if parts else " or build it in --parts"
            self._refuse(f"{type(index).__name__} is filled in memory: {entries:,} entries at a time", needed, more)

    def check_quality(self, queries: int, k: int, dimension: int) -> None:
        """Raise UserError where comparing so many queries' neighbours takes more."""
        needed = _quality_bytes(queries, k, dimension)
        if queries and needed > self.free:
            self._refuse(_measuring(queries), needed, " or fewer --quality_queries")

    def _refuse(self, what: str, needed: int, instead: str = "") -> None:
        raise UserError(
            f"{what} takes about {size_text(needed)} of memory, and {size_text(max(0, self.free))} may be taken: give "
            f"--memory {size_text(needed + self.taken)} or more{',' if instead else ''}{instead}."
        )


def _training(factory: str, dimension: int, sample: int) -> str:
    return f"Training {factory} on {sample:,} keys of {dimension} numbers"


def _measuring(queries: int) -> str:
    return f"Measuring the index with {queries:,} queries"


def _quality_bytes(queries: int, k: int, dimension: int) -> int:
    return queries * (k * PAIR_BYTES + 4 * 4 * dimension)


def _segment_bytes(index: faiss.Index, head: int, entries: int) -> int:
    """What a segment of so many entries takes while it is filled, with an index that has so many bytes without them."""
    return head + key_stream.ADD_CHUNK * CHUNK_ROWS * 4 * index.d + entries * _entry_bytes(index)


def _entry_bytes(index: faiss.Index) -> int:
    return GROWN * (bytes_per_code(index) + ID_BYTES)
