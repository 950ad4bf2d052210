"""The clusterings of a store that changes: its new entries assigned, or those that are not kept taken out.

No cluster is made anew. By k-means a new entry belongs to the nearest centroid, which is the mean of the cluster's
members: the ones that k-means ended with are not kept. Where the store has no keys, those count that its index's codes
stand for, as they did when it was clustered. Greedy merging goes through all entries in order, and published
clusters were made elsewhere: there new entries are in no cluster.
"""

from __future__ import annotations

import logging
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from knn_lm_eval.compiling import compiled
from knn_lm_eval.make.cluster_summary import summarize
from knn_lm_eval.make.clustered_keys import ClusteredKeys
from knn_lm_eval.make.member_lists import write_arrays
from knn_lm_eval.search.faiss_index import faiss_gpus
from knn_lm_eval.store.clusters import ARRAYS, METADATA, Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.key_stream import SEARCH_CHUNK, KeyRows, key_chunks
from knn_lm_eval.system.memory import allowed_bytes
from knn_lm_eval.system.seals import write_sealed_json

logger = logging.getLogger(__name__)


def extend_clusters(
    store: Datastore, name: str, new: Datastore, values: np.ndarray, keys_sha256: str, folder: Path
) -> list[str]:
    """Write the clustering ``name`` with new entries, as its folder will be.

    Memory: 8 bytes a centroid's number, and the clustering's arrays.

    Parameters
    ----------
    new : the n new entries, with keys where the store has some, else with an index of the same name.
    values : int32 ``[count + n]``, of all.
    keys_sha256 : of all keys, as they will be.
    folder : the new folder, which is made; what is laid out of codes lies beside it.

    Returns
    -------
    The names of its files.
    """
    clusters = Clusters.open(store, name)
    of_new = np.full(len(new), -1, dtype=clusters.cluster_of_entry.dtype)
    if clusters.metadata.get("method") == "kmeans" and (store.keys is not None or "codes_of" in clusters.metadata):
        folder.mkdir(parents=True)
        keys, new_keys = (_keys(one, folder.parent / place) for one, place in ((store, "old"), (new, "new")))
        _assign(keys, clusters, new_keys, of_new)
    else:
        logger.warning(
            "The new entries are in none of the clusters %r, which take all entries to be made: cluster the datastore "
            "again, with --overwrite, to have them in some.",
            name,
        )
    return _write(clusters, np.concatenate([clusters.cluster_of_entry, of_new]), values, keys_sha256, folder)


def compact_clusters(
    store: Datastore, name: str, kept: np.ndarray, values: np.ndarray, keys_sha256: str, folder: Path
) -> list[str]:
    """Write the clustering ``name`` without the entries that are not kept; as ``extend_clusters``.

    Parameters
    ----------
    kept : bool ``[count]``, may be memory-mapped.
    values : int32 ``[kept ones]``.
    """
    clusters = Clusters.open(store, name)
    return _write(clusters, clusters.cluster_of_entry[kept], values, keys_sha256, folder)


def _write(
    clusters: Clusters, cluster_of_entry: np.ndarray, values: np.ndarray, keys_sha256: str, folder: Path
) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = write_arrays(folder, ".npy", cluster_of_entry, len(clusters), allowed_bytes(None))
    changes = {
        "keys_sha256": keys_sha256,
        "count": len(cluster_of_entry),
        "entries_in_clusters": len(arrays["members"]),
        "summary": summarize(Clusters(folder, {}, **arrays), values),
        "files": {f"{name}.npy": (folder / f"{name}.npy").stat().st_size for name in ARRAYS},
    }
    said = clusters.metadata | {name: value for name, value in changes.items() if name in clusters.metadata}
    write_sealed_json(folder / METADATA, said)
    return [METADATA, *(f"{name}.npy" for name in ARRAYS)]


def _keys(store: Datastore, folder: Path) -> KeyRows:
    """A store's keys, or what its index's codes stand for, which are laid out in a folder."""
    clustered = ClusteredKeys(store)
    folder.mkdir(exist_ok=True)
    clustered.lay_out(folder, None)
    return clustered.keys


def _assign(keys: KeyRows, clusters: Clusters, new_keys: KeyRows, of_new: np.ndarray) -> None:
    """Fill in the cluster of each new key: that whose members' mean is nearest."""
    sums = np.zeros((len(clusters), keys.shape[1]))
    begin = 0
    with tqdm(total=len(keys), desc="Means of the clusters", unit=" keys", unit_scale=True) as bar:
        for chunk in key_chunks(keys):
            _add_up(chunk, clusters.cluster_of_entry[begin : begin + len(chunk)], sums)
            begin += len(chunk)
            bar.update(len(chunk))
    sizes = np.diff(clusters.member_starts)  # [clusters]
    filled = np.flatnonzero(sizes)  # an empty one has no mean
    index: faiss.Index = faiss.IndexFlatL2(keys.shape[1])
    if faiss_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add((sums[filled] / sizes[filled, None]).astype(np.float32))
    begin = 0
    for chunk in key_chunks(new_keys, size=SEARCH_CHUNK):
        of_new[begin : begin + len(chunk)] = filled[index.search(chunk, 1)[1][:, 0]]
        begin += len(chunk)


@compiled
def _add_up(keys: np.ndarray, clusters: np.ndarray, sums: np.ndarray) -> None:
    for row in range(len(keys)):
        if clusters[row] >= 0:
            sums[clusters[row]] += keys[row]
