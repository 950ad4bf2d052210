"""Neighbours by an index: what such retrievers have in common, and the one that has the index in this process."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import replace
from typing import Any, TypeVar

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.search.code_distances import CodeDistances
from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.factory_strings import first_of_more_are_fewer, has_exact_distances
from knn_lm_eval.search.faiss_index import (
    DEFAULT_PROBE,
    bytes_held,
    check_gpu_k,
    find_readable_parts,
    inverted_file,
    open_index,
    search,
    set_probe,
    to_gpus,
    vectors_compared,
)
from knn_lm_eval.search.retriever import EntryDistances, SearchSettings, StoreRetriever
from knn_lm_eval.search.sign_codes import SignSearch
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX, index_checksums
from knn_lm_eval.system.timing import now

logger = logging.getLogger(__name__)

AnyIndexRetriever = TypeVar("AnyIndexRetriever", bound="IndexRetriever")


class IndexRetriever(StoreRetriever):
    """As ``Retriever``, by an index.

    Parameters
    ----------
    datastore : an opened datastore with an index.
    index : the index's name.
    k : neighbours per query.
    probe : inverted lists visited per query; None takes what the index was found to need.
    sim_func : ``l2`` (squared) or ``dot``; None takes the index's. Another than the index's needs
        ``recompute_dists``.
    recompute_dists : compute the neighbours' distances from the keys on disk, exactly, instead of taking the
        index's approximation.
    gpu : search on all visible GPUs.

    Attributes
    ----------
    metadata : the content of the index's JSON.
    parts : the files of the index.

    Raises
    ------
    UserError
        Where there is no such index, or a setting does not fit it or the store.
    """

    _lists: int | None = None  # of the index, once it is open

    def __init__(
        self,
        datastore: Datastore,
        index: str,
        k: int,
        probe: int | None,
        sim_func: str | None,
        recompute_dists: bool,
        gpu: bool = False,
    ) -> None:
        self.metadata, self.parts = find_readable_parts(datastore, index)
        wanted = self.metadata.get("probe") or DEFAULT_PROBE if probe is None else probe
        settings = SearchSettings(k, wanted, sim_func or self.metadata["sim_func"], recompute_dists, gpu)
        super().__init__(datastore, index, settings)
        self._lists = self._open(settings)
        self._settings = self._checked(settings)

    @abstractmethod
    def _open(self, settings: SearchSettings) -> int | None:
        """Get ready to search; returns how many inverted lists the index has, None for one without."""

    def _checked(self, settings: SearchSettings) -> SearchSettings:
        settings = super()._checked(settings)
        if settings.sim_func != self.metadata["sim_func"] and not settings.recompute_dists:
            raise UserError(
                f"knn_sim_func={settings.sim_func} does not fit the index {self.name!r}, which ranks by "
                f"{self.metadata['sim_func']}; build one with --sim_func {settings.sim_func}, or add "
                f"recompute_dists=True."
            )
        if self._lists is None or settings.probe is None:
            return replace(settings, probe=None)
        return replace(settings, probe=min(settings.probe, self._lists))

    @property
    def factory(self) -> str:
        """The index's factory string."""
        return self.metadata["factory"]

    @property
    def bytes_on_disk(self) -> int:
        """Of the index's files."""
        return self.metadata["bytes"]

    @property
    def kind_of_distances(self) -> str:
        """As ``Retriever.kind_of_distances``."""
        return "exact" if self.recompute_dists or has_exact_distances(self.factory) else "approximate"

    @property
    def first_of_more_are_fewer(self) -> bool:
        """As ``Retriever.first_of_more_are_fewer``; False where it is unknown."""
        return first_of_more_are_fewer(self.factory)

    def identity(self) -> dict[str, Any]:
        """The index's metadata, and its files' checksums."""
        return {"index_type": self.metadata, "index_files": self.checksums()}

    def checksums(self) -> dict[str, str]:
        """Of the index's files."""
        return index_checksums(self.datastore, self.name)

    @property
    @abstractmethod
    def cpu_index(self) -> faiss.Index:
        """The whole index, in this process: what codes are laid out from. Set to visit the lists that the retriever
        visits that was opened first."""

    @property
    @abstractmethod
    def index(self) -> faiss.Index:
        """The index that the published code is given: the one that is searched, if that is in this process."""

    @abstractmethod
    def distances_to(self, codes: CodeDistances | None) -> EntryDistances:
        """Distances to given entries: by the index's codes, or exact ones where ``codes`` is None."""

    def with_distances(self: AnyIndexRetriever) -> tuple[AnyIndexRetriever, EntryDistances]:
        """As ``Retriever.with_distances``."""
        if self.recompute_dists:
            return self, self.distances_to(None)
        codes = CodeDistances.open(self.datastore, self.cpu_index, self.name)
        if codes is not None:
            return self, self.distances_to(codes)
        retriever = self
        if self.factory != "Flat":
            logger.info(
                "RetoMaton has no distances by the codes of %s: exact ones are used for searches and pointers "
                "(recompute_dists=True).",
                self.factory,
            )
            self.datastore.require_keys(f"RetoMaton with the index {self.factory}")
            retriever = self.with_settings(recompute_dists=True)
        return retriever, retriever.distances_to(None)


class LocalRetriever(IndexRetriever):
    """As ``IndexRetriever``, with the index in this process, mapped from disk where that can be done."""

    def __init__(
        self,
        datastore: Datastore,
        k: int = 1024,
        probe: int | None = None,
        sim_func: str | None = None,
        recompute_dists: bool = False,
        gpu: bool = False,
        index: str = DEFAULT_INDEX,
    ) -> None:
        super().__init__(datastore, index, k, probe, sim_func, recompute_dists, gpu)

    def _open(self, settings: SearchSettings) -> int | None:
        self._cpu_index, _ = open_index(self.datastore, self.name)
        assert settings.probe is not None
        set_probe(self._cpu_index, settings.probe)
        if settings.gpu:
            self.datastore.require_all("a search of an index on GPUs")
        self._index = to_gpus(self._cpu_index, settings.k) if settings.gpu else self._cpu_index
        self.on_gpus = self._index is not self._cpu_index
        # Beside faiss's own search, which any other index has.
        self._signs = None if self.on_gpus else SignSearch.open(self.datastore, self._cpu_index, self.name)
        ivf = inverted_file(self._cpu_index)
        return None if ivf is None else ivf.nlist

    def with_settings(
        self, *, k: int | None = None, probe: int | None = None, recompute_dists: bool | None = None
    ) -> LocalRetriever:
        """As ``Retriever.with_settings``; an index on GPUs, which has its probe set, is opened again for another."""
        other = super().with_settings(k=k, probe=probe, recompute_dists=recompute_dists)
        if self.on_gpus:
            check_gpu_k(other.k)
            if other.probe != self.probe:
                other._open(other.settings)
        return other

    @property
    def cpu_index(self) -> faiss.Index:
        """The index as it was opened, with the probe of the retriever that opened it."""
        return self._cpu_index

    @property
    def index(self) -> faiss.Index:
        """The same, or its copy on GPUs."""
        return self._index

    @property
    def bytes_held(self) -> int:
        """What the index takes of this process's own memory; see ``faiss_index.bytes_held``."""
        return bytes_held(self._cpu_index)

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``Retriever.find``."""
        statistics, start = self.statistics, now()
        if self._signs is not None and self.probe is not None:
            distances, entries, compared = self._signs.search(queries, self.k, self.probe, self.datastore.removed)
        else:
            distances, entries = search(
                self._index, queries, self.k, None if self.on_gpus else self.probe, self.datastore.removed
            )
            compared = vectors_compared(self._index, len(queries))
        statistics.searches += len(queries)
        statistics.entries_compared += compared
        statistics.seconds["search"] += now() - start
        if self.recompute_dists:
            start = now()
            keys = self.datastore.require_keys("recompute_dists=True")
            distances = exact_distances(keys, queries, entries, self.sim_func)
            statistics.seconds["distances"] += now() - start
        return distances, entries

    def distances_to(self, codes: CodeDistances | None) -> EntryDistances:
        """As ``IndexRetriever.distances_to``."""
        return self._exact_distances(f"RetoMaton with the index {self.factory}") if codes is None else codes
