"""Clustering a datastore's entries: by k-means of their keys, or by greedy merging.

Each way leads to one number per entry, in a plain array; a counting sort turns it into the lists of members
(see ``knn_lm_eval.store.clusters`` for the files). Keys are streamed in text order, and the state is saved now and
then, so that an interrupted clustering goes on from there and gives the same bytes. Clusters that others published
are taken over by ``knn_lm_eval.make.members``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.cluster_summary import summarize
from knn_lm_eval.make.member_lists import write_arrays
from knn_lm_eval.make.merging import NeighbourSearch, find_absorbers, number_clusters
from knn_lm_eval.search.faiss_index import faiss_gpus
from knn_lm_eval.search.kmeans import (
    LEAST_PER_CLUSTER,
    SAMPLE_PER_CLUSTER,
    check_memory,
    memory_of_kmeans,
    sample_within,
    train_kmeans,
)
from knn_lm_eval.search.two_levels import PROBE, memory_of_two_levels, train_two_levels
from knn_lm_eval.store.clusters import (
    ARRAYS,
    FORMAT,
    FORMAT_VERSION,
    METADATA,
    Clusters,
    cluster_dtype,
    clusters_folder,
    entry_dtype,
)
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.index_files import DEFAULT_INDEX
from knn_lm_eval.store.key_stream import ADD_CHUNK, number_entries
from knn_lm_eval.store.manifest import check_unchanged, forget_derived, now, record_derived
from knn_lm_eval.store.names import check_new_name
from knn_lm_eval.system.checkpoints import PROGRESS, SavedStates
from knn_lm_eval.system.files import (
    check_free_space,
    disk_errors_in,
    replace_file,
)
from knn_lm_eval.system.locks import locked
from knn_lm_eval.system.memory import allowed_bytes
from knn_lm_eval.system.seals import write_sealed_json

ENTRIES_PER_CLUSTER = 100  # on average, by default; Alon et al. 2022, figures 8 and 9
MOST_COMPARED = 2**14  # clusters of which each is compared with each key; beyond, two levels


def cluster_kmeans(
    datastore: Datastore,
    name: str = "kmeans",
    num_clusters: int | None = None,
    sample: int | None = None,
    iterations: int = 20,
    seed: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
) -> Clusters:
    """Cluster the entries by k-means of their keys (Alon et al. 2022); an entry belongs to the nearest
    centroid (exact squared L2).

    Takes all GPUs that faiss sees. The time goes with ``num_clusters * (iterations * sample + count)``. Beyond
    ``MOST_COMPARED`` clusters, it goes with the square root of ``num_clusters``: they are trained in two levels, and a
    key is compared with those nearby only (``knn_lm_eval.search.two_levels``), so that a few keys in a hundred get
    another centroid than the nearest one, which is hardly farther.

    Parameters
    ----------
    name : the clustering's name.
    num_clusters : None takes 1/100 of the entries. Clusters may turn out empty.
    sample : random keys to train on, all in memory as float32; None takes 64 per cluster, or all keys. In two levels,
        in memory in the store's own dtype; None takes 39 per cluster.
    iterations : of k-means on the sample.
    seed : of the sample and the first centroids.
    resume : go on with an interrupted clustering of that name.
    overwrite : replace a finished clustering of that name.
    memory : bytes that it may take; where they are fewer than the default sample needs, that is made smaller, down to
        39 keys per cluster, with a warning. None is 80 % of the machine's memory for the sample as it is.

    Raises
    ------
    UserError
        Where the numbers do not fit the store, the sample does not fit the memory, the name is taken, or the
        disk is full.
    """
    keys = datastore.require_keys("clustering")
    datastore.require_all("clustering")
    datastore.require_text_order("clustering, which is for RetoMaton,")
    count = len(datastore)
    num_clusters = max(1, count // ENTRIES_PER_CLUSTER) if num_clusters is None else num_clusters
    if not 1 <= num_clusters <= count:
        raise UserError(f"num_clusters={num_clusters} must be between 1 and the store's {count:,} entries.")
    two_levels = num_clusters > MOST_COMPARED
    needed = (memory_of_two_levels if two_levels else memory_of_kmeans)(keys, num_clusters)
    per_cluster = LEAST_PER_CLUSTER if two_levels else SAMPLE_PER_CLUSTER
    if sample is None:
        sample = min(per_cluster * num_clusters, count)
        if memory is not None:
            sample = sample_within(memory, sample, needed, num_clusters)
    sample = min(sample, count)
    if sample < num_clusters:
        raise UserError(f"sample={sample} is too small: k-means needs at least one key per cluster ({num_clusters:,}).")
    if iterations < 1:
        raise UserError(f"iterations={iterations} must be at least 1.")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed} must be between 0 and 2,147,483,647.")
    settings = {
        "method": "kmeans",
        "num_clusters": num_clusters,
        "sample": sample,
        "iterations": iterations,
        "seed": seed,
        **({"levels": 2, "probe": PROBE} if two_levels else {}),
    }
    unfinished = UnfinishedClusters(datastore, name, settings, overwrite, resume, memory)
    check_memory(memory, sample, needed, num_clusters)
    with unfinished.begun(num_clusters, cluster_dtype(num_clusters)):
        training = (keys, num_clusters, sample, iterations, seed, unfinished.states)
        nearest = train_two_levels(*training).nearest if two_levels else _nearest_of_all(train_kmeans(*training))

        def assign(clusters: np.ndarray, begin: int, chunk: np.ndarray) -> None:
            clusters[begin : begin + len(chunk)] = nearest(chunk)

        dtype, size = cluster_dtype(num_clusters), ADD_CHUNK if two_levels else None
        cluster_of_entry = number_entries(keys, unfinished.states, dtype, assign, "Assigning keys to clusters", size)
        return unfinished.finish(cluster_of_entry, num_clusters)


def _nearest_of_all(centroids: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The search for the nearest centroid of each key, which compares it with all."""
    index: faiss.Index = faiss.IndexFlatL2(centroids.shape[1])
    if faiss_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(centroids)
    return lambda chunk: index.search(chunk, 1)[1][:, 0]


def cluster_greedy_merge(
    datastore: Datastore,
    name: str = "greedy_merge",
    k: int = 9,
    index: str = DEFAULT_INDEX,
    probe: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
) -> Clusters:
    """Cluster the entries by greedy merging (He et al. 2021): near neighbours of the same value.

    Entries are taken in text order. One that no other has absorbed yet absorbs those of its ``k`` nearest
    neighbours that have its value and have neither been absorbed nor absorbed others. As in the published
    script, ``k`` does not count the entry itself: its first ``k + 1`` search results are looked at, itself
    passed over. (The script goes through the entries in random order.) An entry and what it absorbed are a
    cluster: its members have the same value, and are ``k + 2`` at most. Clusters are numbered in the order of
    the entries that were not absorbed.

    Parameters
    ----------
    name : the clustering's name.
    k : neighbours looked at.
    index : the name of the index to search.
    probe : inverted lists visited per search; None takes what the index was found to need.
    resume : go on with an interrupted clustering of that name.
    overwrite : replace a finished clustering of that name.
    memory : bytes that it may take, the index included; None is half of what is available, beside the index.

    Raises
    ------
    UserError
        Where the store has no such index or fewer than ``k`` other entries, the name is taken, or the disk is
        full.
    """
    datastore.require_keys("clustering")
    datastore.require_all("clustering")
    datastore.require_text_order("clustering, which is for RetoMaton,")
    searched = NeighbourSearch.open(datastore, k, index, probe, memory)
    settings = {"method": "greedy_merge", **searched.settings}
    unfinished = UnfinishedClusters(datastore, name, settings, overwrite, resume, memory)
    entry = entry_dtype(len(datastore))
    with unfinished.begun(len(datastore), entry, entry):  # absorbers, and the clusters by them
        absorber = find_absorbers(searched, unfinished.states)
        cluster_of_entry = np.lib.format.open_memmap(
            unfinished.folder / "clusters.npy.part", "w+", entry, (len(datastore),)
        )
        return unfinished.finish(cluster_of_entry, number_clusters(absorber, cluster_of_entry))


class UnfinishedClusters:
    """A clustering under way: checked to have a place, then begun or gone on with, then finished.

    Attributes
    ----------
    states : what is saved of it now and then.
    folder : the clustering's.
    """

    def __init__(
        self,
        datastore: Datastore,
        name: str,
        settings: dict[str, Any],
        overwrite: bool,
        resume: bool = False,
        memory: int | None = None,
    ) -> None:
        """``memory`` is as for ``cluster_kmeans``. Raises UserError where the name is no name, or is taken."""
        self.folder = clusters_folder(datastore, check_new_name(name, "clusters"))
        self._datastore, self._name, self._overwrite, self._resume = datastore, name, overwrite, resume
        self.memory = memory
        self._settings = {**settings, "keys_sha256": datastore.keys_checksum}
        self.states = SavedStates(
            self.folder / PROGRESS, self._settings, others=["*.npy.tmp", "*.json.tmp", "*.npy.part"]
        )
        self._check_place()

    def _check_place(self) -> None:
        unfinished = self._resume and self.states.file.exists()  # it may lack its last step only
        if (self.folder / METADATA).exists() and not self._overwrite and not unfinished:
            raise UserError(f"The clusters {self.folder} exist already; choose another --name or give --overwrite.")

    @contextmanager
    def begun(self, most_clusters: int, *made_first: type[Any]) -> Iterator[None]:
        """Begin it or go on with it, and hold it: one process at a time is at work on a clustering.

        ``most_clusters`` may come of it, by way of files with numbers of the dtypes ``made_first`` for each entry.

        Raises UserError where it was begun with other settings, another process made it, or the disk is full.
        """
        with disk_errors_in(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / ".lock", f"the clusters {self.folder}"):
                self._check_place()
                self.states.begin_or_resume(self._resume)
                count = len(self._datastore)
                of_entry = sum(
                    np.dtype(n).itemsize for n in (cluster_dtype(most_clusters), entry_dtype(count), *made_first)
                )
                check_free_space(self.folder, of_entry * count + 8 * (most_clusters + 1), "the clusters' arrays")
                yield

    def finish(self, cluster_of_entry: np.ndarray, num_clusters: int, **made_from: Any) -> Clusters:
        """Write the arrays and, last, ``clusters.json``, which says ``made_from`` beside the settings."""
        memory = allowed_bytes(self.memory)
        arrays = write_arrays(self.folder, ".npy.tmp", cluster_of_entry, num_clusters, memory)
        written = {self.folder / f"{name}.npy.tmp": self.folder / f"{name}.npy" for name in arrays}
        names = [f"clusters/{self._name}/{name}" for name in (METADATA, *(path.name for path in written.values()))]
        check_unchanged(self._datastore.path, self._datastore.keys_checksum, f"the clusters {self._name} were made")
        forget_derived(self._datastore.path, names)
        (self.folder / METADATA).unlink(missing_ok=True)
        for temporary, path in written.items():
            replace_file(temporary, path)
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **self._settings,
            **made_from,
            "count": len(cluster_of_entry),
            "num_clusters": num_clusters,
            "entries_in_clusters": len(arrays["members"]),
            "summary": summarize(Clusters(self.folder, {}, **arrays), self._datastore.values),
            "files": {f"{name}.npy": (self.folder / f"{name}.npy").stat().st_size for name in ARRAYS},
            "created": now(),
            "faiss": faiss.__version__,
        }
        write_sealed_json(self.folder / METADATA, metadata)
        record_derived(self._datastore.path, names)
        self.states.remove()
        return Clusters.open(self._datastore, self._name)
