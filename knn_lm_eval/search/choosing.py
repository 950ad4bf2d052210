"""Which index serves kNN-LM best, for so many entries and what it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import faiss

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.faiss_index import inverted_file, make_index

LISTS_PER_ROOT = 4  # inverted lists for each root of the number of entries
ENTRIES_PER_LIST = 2500  # at most, before there are more lists than ``TWO_LEVELS_ABOVE``
# K-means costs lists times sample. Beyond so many lists, on CPUs, it is done in two levels: minutes, not days.
TWO_LEVELS_ABOVE = 4096
GRAPH_FROM = 4096  # lists that a graph finds sooner than a comparison with all


@dataclass(frozen=True)
class Budget:
    """Limits for an index; None is no limit.

    Attributes
    ----------
    bytes_per_entry : of the index on disk, and in memory when all of it is in use.
    slowdown : the time of kNN-LM beside that of the LM alone, such as 1.1.
    """

    bytes_per_entry: float | None = None
    slowdown: float | None = None

    @classmethod
    def parse(cls, texts: list[str]) -> Budget:
        """``["100"]`` is 100 bytes per entry, ``["1.1x"]`` a slowdown, both may stand together.

        Raises
        ------
        UserError
            Where that is neither.
        """
        limits: dict[str, float] = {}
        for text in texts:
            name = "slowdown" if text.endswith("x") else "bytes_per_entry"
            try:
                value = float(text.removesuffix("x"))
            except ValueError as error:
                raise UserError(f"--budget {text} should be bytes per entry (100) or a slowdown (1.1x).") from error
            least = 1 if name == "slowdown" else 0
            if not least < value < math.inf:
                raise UserError(f"--budget {text} must be above {least}.")
            if name in limits:
                raise UserError(f"--budget {' '.join(texts)} gives two limits of one kind.")
            limits[name] = value
        return cls(**limits)


NO_BUDGET = Budget()


def choose_factory(count: int, dimension: int, sim_func: str = "l2", bytes_per_entry: float | None = None) -> str:
    """The faiss factory string that serves kNN-LM best in so many bytes per entry.

    RaBitQ's distance estimates are unbiased, which a softmax over distances needs; they are nearest the truth for
    vectors that are rotated at random first, so that no dimension outweighs the others. What was measured is in
    docs/measurements/indexes.md.

    Parameters
    ----------
    count, dimension : entries of the store, and the width of a key.
    sim_func : ``l2`` or ``dot``.
    bytes_per_entry : the index's size; None is no limit, and takes 1 bit per dimension, which more improve little.

    Raises
    ------
    UserError
        Where nothing is as small as that.
    """
    wanted = min(LISTS_PER_ROOT * math.sqrt(count), max(TWO_LEVELS_ABOVE, count / ENTRIES_PER_LIST))
    lists = 2 ** max(0, round(math.log2(wanted)))
    ivf = f"IVF{lists}" if lists < GRAPH_FROM else f"IVF{lists}_HNSW32"
    codes = [f"RR{dimension},{ivf},RaBitQfs"]
    if bytes_per_entry is not None:
        codes = [f"RR{dimension},{ivf},RaBitQfs{bits}" for bits in (4, 2)] + codes
        if sim_func == "l2":  # a projection leaves distances nearly as they are, but not inner products
            widths = [dimension * eighths // 64 * 8 for eighths in range(7, 0, -1)]
            codes += [f"PCAR{width},{ivf},RaBitQfs" for width in widths if width]
    for code in codes:
        size = estimated_bytes(code, count, dimension, sim_func)
        if bytes_per_entry is None or size <= bytes_per_entry:
            return code
    raise UserError(
        f"No index of {count} keys of {dimension} numbers takes {bytes_per_entry:g} bytes per entry; the smallest, "
        f"{codes[-1]}, takes {size:.0f}. Prune the datastore, or give a larger --budget."
    )


def estimated_bytes(factory: str, count: int, dimension: int, sim_func: str = "l2") -> float:
    """About how many bytes per entry an index will have: code, entry number, and its share of what the lists take."""
    index = make_index(factory, dimension, sim_func)
    if (ivf := inverted_file(index)) is None:
        return index.sa_code_size()
    graph = 2 * 32 * 4 + 16 if "_HNSW32" in factory else 0
    # Fast-scan lists are laid out in blocks of 32 codes, the last of which is half empty on average.
    is_in_blocks = isinstance(faiss.downcast_index(ivf), faiss.IndexIVFFastScan)
    rounding = index.sa_code_size() * 16 if is_in_blocks else 0
    transform = 4 * dimension**2 if isinstance(index, faiss.IndexPreTransform) else 0
    return index.sa_code_size() + 8 + (ivf.nlist * (4 * ivf.d + graph + rounding) + transform) / count
