"""Clusters of a datastore's entries on disk: what the folder holds, and opening it.

The clustering called NAME of a datastore is the folder ``clusters/NAME`` inside the datastore's with

- ``cluster_of_entry.npy``: int32 ``[count]``, or int64 where there are more than 2**31 clusters, the cluster of each
  entry; -1 for an entry in no cluster, which only imported clusterings have;
- ``member_starts.npy``: int64 ``[clusters + 1]`` and ``members.npy``: ``[entries in clusters]``, int32, or
  int64 where the datastore has 2**31 entries or more: cluster c's entries, ascending, are
  ``members[member_starts[c] : member_starts[c + 1]]``. A cluster may be empty;
- ``clusters.json``: what made it, the keys it was made from, sizes. Written last: a folder without one is not
  finished.

RetoMaton (Alon et al. 2022) takes the members of a cluster for one state of its automaton.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import checksums_of_derived, recorded_checksums
from knn_lm_eval.store.names import check_plain_name
from knn_lm_eval.store.verification import Expected, Limits
from knn_lm_eval.system.arrays import map_npy
from knn_lm_eval.system.checkpoints import PROGRESS
from knn_lm_eval.system.files import read_json
from knn_lm_eval.system.json_schema import Count, Positive, check_json
from knn_lm_eval.system.seals import check_seal

FORMAT = "knn_lm_eval clusters"
FORMAT_VERSION = 1
METADATA = "clusters.json"
ARRAYS = ("cluster_of_entry", "member_starts", "members")
MOST_IN_INT32 = 2**31
REMEDY = "fetch it or cluster the datastore again"


_Sizes = TypedDict("_Sizes", {"cluster_of_entry.npy": Count, "member_starts.npy": Count, "members.npy": Count})


class ClustersJSON(TypedDict):
    """What ``clusters.json`` holds, as far as it is read."""

    keys_sha256: str
    num_clusters: Positive
    entries_in_clusters: Count
    files: _Sizes


@dataclass(frozen=True)
class Clusters:
    """An opened clustering; its arrays are memory-mapped and read-only.

    Attributes
    ----------
    path : the clustering's folder; its name is the clustering's.
    metadata : the content of ``clusters.json``.
    cluster_of_entry : int32 or int64 ``[count]``; -1 for an entry in no cluster.
    member_starts : int64 ``[clusters + 1]``.
    members : int32 or int64 ``[entries in clusters]``.
    """

    path: Path
    metadata: dict[str, Any]
    cluster_of_entry: np.ndarray
    member_starts: np.ndarray
    members: np.ndarray

    @classmethod
    def open(cls, datastore: Datastore, name: str | None = None) -> Clusters:
        """Open the clustering ``name`` of ``datastore``; None takes the only one.

        Raises
        ------
        UserError
            Where there is none of that name, or several and no name, or its files are damaged, not finished,
            or made for other keys.
        """
        path = clusters_folder(datastore, _only_name(datastore) if name is None else name)
        if not (path / METADATA).is_file():
            if (path / PROGRESS).is_file():
                raise UserError(f"The clusters {path} are not finished; go on with cluster_datastore --resume.")
            names = cluster_names(datastore)
            have = f"it has {', '.join(names)}" if names else "make some with cluster_datastore"
            raise UserError(f"The datastore {datastore.path} has no clusters called {path.name!r}: {have}.")
        metadata = read_json(path / METADATA)
        if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path / METADATA} is not of format {FORMAT!r}, version {FORMAT_VERSION}; cluster the datastore again."
            )
        metadata = check_seal(path / METADATA, metadata, REMEDY)
        check_json(metadata, ClustersJSON, path / METADATA, REMEDY)
        if metadata["keys_sha256"] != datastore.keys_checksum:
            raise UserError(
                f"The clusters {path} were made for other keys than those in {datastore.path}; cluster it again."
            )
        sizes = {name: metadata["files"][f"{name}.npy"] for name in ARRAYS}
        shapes = {
            "cluster_of_entry": (len(datastore),),
            "member_starts": (metadata["num_clusters"] + 1,),
            "members": (metadata["entries_in_clusters"],),
        }
        dtypes: dict[str, type[Any]] = {
            "cluster_of_entry": cluster_dtype(metadata["num_clusters"]),
            "member_starts": np.int64,
            "members": entry_dtype(len(datastore)),
        }
        arrays = {name: _open_array(path / f"{name}.npy", sizes[name], dtypes[name], shapes[name]) for name in ARRAYS}
        if arrays["member_starts"][0] != 0 or arrays["member_starts"][-1] != len(arrays["members"]):
            raise UserError(f"{path / 'member_starts.npy'} is damaged; cluster the datastore again.")
        datastore.verification.check(_expected(datastore, path, arrays))
        return cls(path=path, metadata=metadata, **arrays)

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each of its files, by the files' names: the manifest's, or, where ``clusters.json`` is not
        the one that it records, read."""
        folder = f"clusters/{self.path.name}"
        arrays = [f"{folder}/{name}.npy" for name in ARRAYS]
        return checksums_of_derived(self.path.parent.parent, f"{folder}/{METADATA}", arrays)

    def __len__(self) -> int:
        """The number of clusters."""
        return len(self.member_starts) - 1


def clusters_folder(datastore: Datastore, name: str) -> Path:
    """Where the clustering ``name`` lies; raises UserError where the name is no plain folder name."""
    return datastore.path / "clusters" / check_plain_name(name, "clusters")


def cluster_names(datastore: Datastore) -> list[str]:
    """The names of the finished clusterings of ``datastore``."""
    return sorted(path.parent.name for path in datastore.path.glob(f"clusters/*/{METADATA}"))


def entry_dtype(count: int) -> type[np.signedinteger[Any]]:
    """The integers that name the entries of a datastore of ``count``."""
    return np.int32 if count < MOST_IN_INT32 else np.int64


def cluster_dtype(clusters: int) -> type[np.signedinteger[Any]]:
    """The integers that name so many clusters."""
    return np.int32 if clusters <= MOST_IN_INT32 else np.int64


def _expected(datastore: Datastore, path: Path, arrays: dict[str, np.ndarray]) -> list[Expected]:
    """The clustering's files, and what is to be in them: compiled code follows their numbers unseen."""
    limits = {
        "cluster_of_entry.npy": Limits(-1, len(arrays["member_starts"]) - 1),
        "member_starts.npy": Limits(0, len(arrays["members"]) + 1, ascending=True),
        "members.npy": Limits(0, len(datastore)),
    }
    recorded = recorded_checksums(datastore.path)
    return [
        Expected(path / name, recorded.get(f"clusters/{path.name}/{name}"), limits.get(name), remedy=REMEDY)
        for name in (METADATA, *limits)
    ]


def _only_name(datastore: Datastore) -> str:
    names = cluster_names(datastore)
    if not names:
        raise UserError(f"The datastore {datastore.path} has no clusters; make some with cluster_datastore.")
    if len(names) > 1:
        raise UserError(
            f"The datastore {datastore.path} has several clusterings, {', '.join(names)}; choose one with "
            f"clusters=NAME."
        )
    return names[0]


def _open_array(path: Path, size: int, dtype: type[Any], shape: tuple[int]) -> np.ndarray:
    if not path.is_file():
        raise UserError(
            f"The clusters {path.parent} are incomplete: {path.name} is missing; cluster the datastore again."
        )
    if (actual := path.stat().st_size) != size:
        raise UserError(
            f"The clusters {path.parent} are damaged: {path.name} has {actual} bytes, {METADATA} says "
            f"{size}; copy them or cluster the datastore again."
        )
    array = map_npy(path, "cluster the datastore again")
    if array.dtype != dtype or array.shape != shape:
        raise UserError(
            f"{path} is not what {METADATA} says: it holds {array.dtype} {list(array.shape)}, "
            f"expected {np.dtype(dtype)} {list(shape)}."
        )
    return array
