"""What index a dump without keys goes into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import faiss

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.choosing import choose_factory
from knn_lm_eval.search.faiss_index import METRICS, make_index
from knn_lm_eval.search.indexing import check_parts
from knn_lm_eval.search.segments import can_be_joined
from knn_lm_eval.store.index_files import DEFAULT_INDEX, IndexFiles


@dataclass(frozen=True)
class IndexPlan:
    """The index that a dump without keys goes into, and how it is measured; see ``build_index``.

    Attributes
    ----------
    factory : a faiss factory string of an index with inverted lists, or ``auto``.
    name : the index's.
    sim_func : ``l2`` or ``dot``.
    parts : files that it is in; None is one.
    seed : of the sample that it is trained on.
    quality_queries : held-out queries that the probe is chosen by; 0 leaves it out.
    k, knn_temp : neighbours and temperature of that measurement.
    trained : the name of a file in the dump's folder, of such an index that is trained and empty, as ``factory`` and
        ``sim_func`` say; None trains one.
    """

    factory: str = "auto"
    name: str = DEFAULT_INDEX
    sim_func: str = "l2"
    parts: int | None = None
    seed: int = 1
    quality_queries: int = 4096
    k: int = 1024
    knn_temp: float = 1.0
    trained: str | None = None

    def check(self) -> None:
        """Raise UserError for mistakes that show without a model and a text."""
        IndexFiles(Path(), self.name).check_new()
        if self.sim_func not in METRICS:
            raise UserError(f"sim_func={self.sim_func!r} is unknown; use l2 or dot.")
        if self.factory != "auto":
            try:
                faiss.index_factory(64, self.factory, METRICS[self.sim_func])
            except RuntimeError as error:  # others depend on the width of the keys
                if "could not parse" in str(error):
                    raise UserError(f"faiss knows no index {self.factory!r}; choose another --factory.") from error

    def chosen_factory(self, count: int, dimension: int) -> str:
        """The factory string for so many keys; raises UserError where it, or the parts, are not for them."""
        check_parts(count, self.parts, None)
        factory = self.factory
        if factory == "auto":
            factory = choose_factory(count, dimension, self.sim_func)
        if not can_be_joined(make_index(factory, dimension, self.sim_func)):
            raise UserError(
                f"A dump without keys fills its index segment by segment, and {factory} cannot be joined from such; "
                f"choose a --factory that ends with inverted lists, such as IVF1024,SQ8, or keep the keys."
            )
        return factory
