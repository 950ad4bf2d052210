"""Several datastores seen as one: their entries one after the other, numbered through, and nothing copied that need not
be.

All are of one LM, and their keys of one kind, so that distances to them compare. What made them lies in each store's
own folder: indexes, clusters, removed documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.clusters import Clusters, cluster_dtype, entry_dtype
from knn_lm_eval.store.datastore import Datastore, Place
from knn_lm_eval.store.manifest import PROJECTION, Manifest
from knn_lm_eval.store.removed import Removed
from knn_lm_eval.system.memory import available_bytes, size_text

BETWEEN = "+"  # names: lm-eval splits its arguments at commas


@dataclass(frozen=True)
class JoinedStore:
    """Datastores of one LM, in an order.

    Attributes
    ----------
    stores : two or more.
    names : what each is called, all different.
    """

    stores: tuple[Datastore, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_same_keys(self.stores)

    def __len__(self) -> int:
        """The number of entries."""
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 ``[stores + 1]``: the number that each store's first entry has here, and that of all entries."""
        return np.cumsum([0, *map(len, self.stores)], dtype=np.int64)

    @property
    def kept(self) -> int:
        """The number of entries that count."""
        return sum(store.kept for store in self.stores)

    @property
    def label(self) -> str:
        """What messages call it."""
        return BETWEEN.join(store.label for store in self.stores)

    @property
    def name(self) -> str:
        """The stores' names."""
        return BETWEEN.join(self.names)

    @property
    def manifest(self) -> Manifest:
        """The first store's: of what they have in common, such as their LM and kind of keys."""
        return self.stores[0].manifest

    @property
    def dimension(self) -> int:
        """The width of a key."""
        return self.stores[0].dimension

    @property
    def projection(self) -> np.ndarray | None:
        """As a store's, all of which have the same."""
        return self.stores[0].projection

    @property
    def keys_checksum(self) -> str:
        """What names the keys of all, whatever their order."""
        checksums = sorted(store.keys_checksum for store in self.stores)
        return hashlib.sha256("\n".join(checksums).encode()).hexdigest()

    @property
    def in_text_order(self) -> bool:
        """Whether all are."""
        return all(store.in_text_order for store in self.stores)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64 ``[documents]``: the entry at which each document begins; each store's first entry begins one."""
        of_stores = [store.document_starts + start for store, start in zip(self.stores, self.starts[:-1], strict=True)]
        return np.union1d(np.concatenate(of_stores), self.starts[:-1])

    @cached_property
    def removed(self) -> Removed | None:
        """The entries that do not count, of all stores; None where all count."""
        if all(store.removed is None for store in self.stores):
            return None
        runs = [(at.removed, start) for at, start in zip(self.stores, self.starts[:-1].tolist(), strict=True)]
        starts = np.concatenate([removed.starts + start for removed, start in runs if removed is not None])
        stops = np.concatenate([removed.stops + start for removed, start in runs if removed is not None])
        if not len(starts):  # of empty documents
            return Removed(starts, stops, len(self))
        apart = starts[1:] != stops[:-1]
        return Removed(starts[np.concatenate([[True], apart])], stops[np.concatenate([apart, [True]])], len(self))

    def place(self, entry: int) -> Place:
        """Where an entry is."""
        number = int(np.searchsorted(self.starts, entry, side="right")) - 1
        return self.stores[number].place(entry - int(self.starts[number]))._replace(name=self.names[number])

    def values(self) -> np.ndarray:
        """int32 ``[count]``: a copy of all values in memory, which raises UserError where that is too small."""
        _check_memory(4 * len(self), self.label)
        return np.concatenate([store.values for store in self.stores])

    def require_keys(self, purpose: str) -> None:
        """Raise UserError where a store has no keys, which ``purpose`` needs."""
        for store in self.stores:
            store.require_keys(purpose)

    def require_text_order(self, purpose: str) -> None:
        """Raise UserError where a store is in no text order, which ``purpose`` needs."""
        for store in self.stores:
            store.require_text_order(purpose)


Store = Datastore | JoinedStore


def stores_of(store: Store) -> tuple[Datastore, ...]:
    """The datastores: one, or several."""
    return store.stores if isinstance(store, JoinedStore) else (store,)


def short_checksum(store: Datastore) -> str:
    """A name for what belongs to a store, which moves with its content and not with its folder."""
    return store.keys_checksum[:16]


class JoinedClusters:
    """The clusterings of one name of several stores, numbered through.

    Parameters
    ----------
    store : the stores.
    clusterings : one of each.

    Attributes
    ----------
    num_clusters : of all.
    """

    def __init__(self, store: JoinedStore, clusterings: Sequence[Clusters]) -> None:
        self._store, self._clusterings = store, clusterings
        self.num_clusters = sum(map(len, clusterings))
        self._first = np.cumsum([0, *map(len, clusterings)], dtype=np.int64)  # [stores + 1]

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each file, by store and name."""
        return {
            f"{short_checksum(store)}/{name}": checksum
            for store, clusters in zip(self._store.stores, self._clusterings, strict=True)
            for name, checksum in clusters.checksums().items()
        }

    @cached_property
    def cluster_of_entry(self) -> np.ndarray:
        """As of ``Clusters``; here and below a copy in memory, which raises UserError where that is too small."""
        dtype = np.dtype(cluster_dtype(self.num_clusters))
        _check_memory(dtype.itemsize * len(self._store), self._store.label)
        whole = np.empty(len(self._store), dtype=dtype)
        ends = self._store.starts
        for clusters, start, stop, first in zip(self._clusterings, ends[:-1], ends[1:], self._first[:-1], strict=True):
            own = clusters.cluster_of_entry
            whole[start:stop] = np.where(own < 0, -1, own + first)
        return whole

    @cached_property
    def member_starts(self) -> np.ndarray:
        """As of ``Clusters``."""
        members = np.cumsum([0, *(len(clusters.members) for clusters in self._clusterings)])
        starts = [
            clusters.member_starts[:-1] + before
            for clusters, before in zip(self._clusterings, members[:-1].tolist(), strict=True)
        ]
        return np.concatenate([*starts, members[-1:]]).astype(np.int64)

    @cached_property
    def members(self) -> np.ndarray:
        """As of ``Clusters``."""
        dtype = np.dtype(entry_dtype(len(self._store)))
        ends = np.cumsum([0, *(len(clusters.members) for clusters in self._clusterings)]).tolist()
        _check_memory(dtype.itemsize * ends[-1], self._store.label)
        whole = np.empty(ends[-1], dtype=dtype)
        before = self._store.starts[:-1].tolist()
        for clusters, start, stop, first in zip(self._clusterings, ends[:-1], ends[1:], before, strict=True):
            np.add(clusters.members, first, out=whole[start:stop], casting="unsafe")
        return whole


def open_clusters(store: Store, name: str | None) -> Clusters | JoinedClusters:
    """The clustering ``name`` of a store, or those of that name of several; raises UserError as ``Clusters.open``."""
    if isinstance(store, JoinedStore):
        return JoinedClusters(store, [Clusters.open(one, name) for one in store.stores])
    return Clusters.open(store, name)


def _check_same_keys(stores: Sequence[Datastore]) -> None:
    """Raise UserError where the stores' keys are not of one kind, so that distances to them do not compare."""
    first, *others = stores
    for other in others:
        for what, of_first, of_other in (
            ("knn_keytype", first.manifest.key_type, other.manifest.key_type),
            ("key_module", first.manifest.key_module, other.manifest.key_module),
            ("numbers per key", first.dimension, other.dimension),
        ):
            if of_first is not None and of_other is not None and of_first != of_other:
                raise _differ(first, other, f"{what} {of_first}", str(of_other))
        if _projection(first) != _projection(other):
            raise _differ(first, other, "keys projected along directions of their own", "other or no directions")
        if other.keys_checksum == first.keys_checksum:
            raise UserError(f"The datastores {first.path} and {other.path} hold the same entries: name one of them.")
    if others:
        _check_same_keys(others)


def _projection(store: Datastore) -> Any:
    record = store.manifest.files.get(PROJECTION)
    return None if record is None else record["sha256"]


def _differ(first: Datastore, other: Datastore, of_first: str, of_other: str) -> UserError:
    return UserError(
        f"The datastores {first.path} and {other.path} cannot be searched together: the first has {of_first}, the "
        f"other {of_other}; dump them alike."
    )


def _check_memory(needed: int, label: str) -> None:
    available = available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"RetoMaton over several datastores keeps values and clusters of {label} in memory, which takes "
            f"{size_text(needed)} and {size_text(available)} are available; use fewer stores, or kNN-LM."
        )
