"""Clusterings: each against a slow oracle, safe against interruptions and against hostile pickles."""

from __future__ import annotations

import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
import scipy.sparse as sp
from helpers.places import SCRIPTS
from helpers.ready import Ready, script
from helpers.stores import change_json
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from knn_lm_eval.errors import UserError
from knn_lm_eval.make import clustering, member_lists
from knn_lm_eval.make.clustering import cluster_greedy_merge, cluster_kmeans
from knn_lm_eval.make.member_lists import count_members, sort_members
from knn_lm_eval.make.members import import_members
from knn_lm_eval.make.merging import merge_neighbours, number_clusters
from knn_lm_eval.make.sparse_pickle import load_sparse_matrix
from knn_lm_eval.search.faiss_index import open_index, search
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store import clusters as store_clusters
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.clusters import Clusters, cluster_dtype
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import FORMAT, FORMAT_VERSION
from knn_lm_eval.system.files import sha256, write_json
from knn_lm_eval.system.sampling import draw_entries

SCRIPT = SCRIPTS / "cluster_datastore.py"
ARRAYS = ("cluster_of_entry.npy", "member_starts.npy", "members.npy")
COUNT = 3000


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """A datastore of random keys in 40 groups, whose values depend on the group, with an exact index."""
    folder = tmp_path_factory.mktemp("clustering") / "store"
    folder.mkdir()
    rng = np.random.default_rng(0)
    group = rng.integers(0, 40, COUNT)
    keys = 2 * rng.standard_normal((40, 16))[group] + rng.standard_normal((COUNT, 16))
    np.save(folder / "keys.npy", keys.astype(np.float16))
    np.save(folder / "values.npy", (group // rng.integers(1, 4, COUNT)).astype(np.int32))
    np.save(folder / "document_starts.npy", np.array([0], dtype=np.int64))
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in folder.glob("*.npy")}
    sizes = {"count": COUNT, "dimension": 16, "files": files}
    write_json(folder / "manifest.json", {"format": FORMAT, "format_version": FORMAT_VERSION, **sizes})
    store = Datastore.open(folder)
    build_index(store, "Flat", quality_queries=0)
    return store


@pytest.fixture
def datastore(tmp_path: Path, pristine: Datastore) -> Datastore:
    """A copy of its own for each test."""
    shutil.copytree(pristine.path, tmp_path / "store")
    return Datastore.open(tmp_path / "store")


def assert_consistent(clusters: Clusters) -> None:
    """The members are the inverse of the entries' clusters, and each entry is in exactly one."""
    lists = np.split(clusters.members, clusters.member_starts[1:-1])
    assert len(lists) == len(clusters)
    for cluster, members in enumerate(lists):
        assert (np.diff(members) > 0).all() and (clusters.cluster_of_entry[members] == cluster).all()
    assert sorted(clusters.members.tolist()) == np.flatnonzero(clusters.cluster_of_entry >= 0).tolist()


@settings(deadline=None)  # the first call compiles
@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(-1, n - 1), max_size=40))),
    st.sampled_from([1, 40, 2**20]),
)
def test_members_are_the_inverse_of_the_entries_clusters(case: tuple[int, list[int]], memory: int) -> None:
    num_clusters, cluster_of_entry = case
    clusters, starts = np.array(cluster_of_entry, dtype=np.int32), np.empty(num_clusters + 1, dtype=np.int64)
    expected = [[i for i, c in enumerate(cluster_of_entry) if c == cluster] for cluster in range(num_clusters)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member_lists, "READ_CHUNK", 7)
        count_members(clusters, starts, memory)
        assert starts[0] == 0
        members = np.empty(starts[-1], dtype=np.int32)
        sort_members(clusters, starts, members, memory)
    assert [part.tolist() for part in np.split(members, starts[1:-1])] == expected


def greedy_merge(values: list[int], neighbours: list[list[int]]) -> list[int]:
    """He et al.'s merging as their script words it: a weight per entry, 0 once another entry absorbed it."""
    weight = [1] * len(values)
    absorbed_by = list(range(len(values)))
    for entry in range(len(values)):
        if weight[entry] == 0:
            continue
        for other in neighbours[entry]:
            if other not in (-1, entry) and weight[other] == 1 and values[other] == values[entry]:
                weight[other] = 0
                weight[entry] += 1
                absorbed_by[other] = entry
    kept = [entry for entry in range(len(values)) if weight[entry] > 0]
    assert sum(weight) == len(values)
    return [kept.index(entry) for entry in absorbed_by]


@st.composite
def merge_cases(draw: st.DrawFn) -> tuple[list[int], list[list[int]], int]:
    count = draw(st.integers(1, 30))
    values = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    row = st.lists(st.integers(-1, count - 1), min_size=4, max_size=4)
    return values, draw(st.lists(row, min_size=count, max_size=count)), draw(st.integers(1, count))


@settings(deadline=None)  # the first call compiles
@given(merge_cases())
def test_greedy_merge_equals_the_sequential_loop(case: tuple[list[int], list[list[int]], int]) -> None:
    values, neighbours, chunk = case
    absorber = np.full(len(values), -1, dtype=np.int32)
    for begin in range(0, len(values), chunk):
        rows = np.array(neighbours[begin : begin + chunk], dtype=np.int64)
        merge_neighbours(absorber, np.array(values, dtype=np.int32), rows, begin)
    cluster_of_entry = np.empty(len(values), dtype=np.int32)
    num_clusters = number_clusters(absorber, cluster_of_entry)
    assert cluster_of_entry.tolist() == greedy_merge(values, neighbours)
    assert num_clusters == cluster_of_entry.max() + 1


def test_greedy_merge_of_a_store(datastore: Datastore, monkeypatch) -> None:
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 700)
    clusters = cluster_greedy_merge(datastore, k=5)
    neighbours = search(open_index(datastore)[0], datastore.keys.astype(np.float32), 6)[1]
    assert clusters.cluster_of_entry.tolist() == greedy_merge(datastore.values.tolist(), neighbours.tolist())
    assert_consistent(clusters)
    sizes = np.diff(clusters.member_starts)
    assert 2 < sizes.max() <= 7 and len(clusters) == len(sizes) < COUNT
    assert clusters.metadata["summary"]["purity"] == 1.0
    assert clusters.metadata["summary"]["mean"] == pytest.approx(COUNT / len(clusters), abs=0.01)
    assert clusters.path == datastore.path / "clusters" / "greedy_merge"
    assert {path.name for path in clusters.path.iterdir()} == {*ARRAYS, "clusters.json"}


@pytest.fixture
def centroids(monkeypatch) -> list[np.ndarray]:
    """What k-means trained, call by call."""
    trained: list[np.ndarray] = []
    train = clustering.train_kmeans
    monkeypatch.setattr(clustering, "train_kmeans", lambda *a: trained.append(train(*a)) or trained[-1])
    return trained


@pytest.mark.parametrize("num_clusters", [None, 1, 57, COUNT])
def test_kmeans_assigns_each_entry_to_its_nearest_centroid(
    datastore: Datastore, num_clusters: int | None, centroids: list[np.ndarray], monkeypatch
) -> None:
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 700)
    clusters = cluster_kmeans(datastore, num_clusters=num_clusters, iterations=5)
    assert len(clusters) == (num_clusters or COUNT // 100) == len(centroids[0])
    assert_consistent(clusters)
    assert len(clusters.members) == COUNT
    distances = cdist(datastore.keys.astype(np.float64), centroids[0].astype(np.float64), "sqeuclidean")
    chosen = distances[np.arange(COUNT), clusters.cluster_of_entry]
    np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-5, atol=1e-4)


def test_very_many_clusters_are_made_in_two_levels(datastore: Datastore, monkeypatch) -> None:
    monkeypatch.setattr(clustering, "MOST_COMPARED", 150)
    assert "levels" not in cluster_kmeans(datastore, "few", num_clusters=150).metadata
    clusters = cluster_kmeans(datastore, "many", num_clusters=151)
    assert clusters.metadata["levels"] == 2 and clusters.metadata["sample"] == COUNT == len(clusters.members)
    assert_consistent(clusters)
    keys = datastore.keys.astype(np.float64)
    means = np.stack([keys[clusters.cluster_of_entry == cluster].mean(axis=0) for cluster in range(151)])
    nearest = cdist(keys, means).argmin(axis=1)
    assert (clusters.cluster_of_entry == nearest).mean() > 0.8


def test_kmeans_is_faiss_kmeans_on_a_random_sample(datastore: Datastore, centroids: list[np.ndarray]) -> None:
    for seed in (1, 2):
        cluster_kmeans(datastore, num_clusters=20, sample=500, iterations=6, seed=seed, overwrite=True)
    sample = draw_entries(COUNT, 500, 1)
    kmeans = faiss.Kmeans(16, 20, niter=6, seed=1, min_points_per_centroid=1)
    kmeans.train(datastore.keys[sample].astype(np.float32))
    np.testing.assert_allclose(centroids[0], kmeans.centroids, rtol=1e-5, atol=1e-5)
    assert not np.allclose(centroids[0], centroids[1])


def test_the_summary_counts_what_it_says(datastore: Datastore, tmp_path: Path) -> None:
    # Clusters {0, 1, 2}, {}, {3}, {4, 5}; the values below make 2 + 1 + 1 of 6 entries most common ones.
    rows, columns = [0, 0, 0, 2, 3, 3], [0, 1, 2, 3, 4, 5]
    values = datastore.values
    expected = max(np.unique(values[:3], return_counts=True)[1]) + 1
    expected += max(np.unique(values[4:6], return_counts=True)[1])
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(sp.csr_matrix(([1] * 6, (rows, columns)))))
    clusters = import_members(datastore, "six", tmp_path / "m.pkl")
    assert clusters.metadata["summary"] == {
        "mean": 2.0,
        "median": 2.0,
        "max": 3,
        "empty": 1,
        "singletons": 0.3333,
        "purity": round(expected / 6, 4),
    }
    assert clusters.metadata["entries_in_clusters"] == 6 and (clusters.cluster_of_entry[6:] == -1).all()


RUN = """
from knn_lm_eval.make import clustering, member_lists
from knn_lm_eval.store import key_stream
from knn_lm_eval.system import checkpoints as states
from knn_lm_eval.store.datastore import Datastore
key_stream.SEARCH_CHUNK, states.CHECKPOINT_SECONDS = 20, 0
run = {"kmeans": clustering.cluster_kmeans, "greedy_merge": clustering.cluster_greedy_merge}[method]
run(Datastore.open(folder), resume=True)
"""


@pytest.mark.parametrize(
    ("method", "kill_at"),
    [
        ("kmeans", [("centroids", "iterations", 3), ("entries", "done", 900)]),
        ("greedy_merge", [("entries", "done", 900)]),
    ],
)
def test_a_killed_clustering_resumes_to_the_same_bytes(
    datastore: Datastore, tmp_path: Path, method: str, kill_at: list[tuple[str, str, int]], monkeypatch
) -> None:
    run = {"kmeans": cluster_kmeans, "greedy_merge": cluster_greedy_merge}[method]
    folder = datastore.path / "clusters" / method
    for state, counter, wanted in kill_at:
        process = Ready(partial(exec, RUN, {"folder": datastore.path, "method": method}))
        part = folder / f"{state}.npz.part"
        while process.poll() is None:
            if part.exists() and np.load(part)[counter] >= wanted:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL
        (folder / f"{state}.npz.part.tmp").write_bytes(b"torn")
        with pytest.raises(UserError, match=f"{method} are not finished; go on with cluster_datastore --resume"):
            Clusters.open(datastore, method)
    done = int(np.load(folder / "entries.npz.part")["done"])
    assert 900 <= done < COUNT
    with pytest.raises(UserError, match="begun with .* now it is .*give the same settings"):
        run(datastore, resume=True, **({"seed": 2} if method == "kmeans" else {"k": 3}))
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 20)
    read, begun_at = key_stream.key_chunks, []
    monkeypatch.setattr(
        key_stream, "key_chunks", lambda keys, start, size: begun_at.append(start) or read(keys, start, size=size)
    )
    resumed = run(datastore, resume=True)
    assert begun_at == [done]
    assert {path.name for path in folder.iterdir()} == {*ARRAYS, "clusters.json"}
    whole = run(datastore, name="whole")
    for name in ARRAYS:
        assert (whole.path / name).read_bytes() == (resumed.path / name).read_bytes(), name


def test_without_resume_an_unfinished_clustering_starts_anew(datastore: Datastore, monkeypatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clustering, "number_entries", interrupted)
        cluster_kmeans(datastore, num_clusters=5)
    assert (datastore.path / "clusters" / "kmeans" / "centroids.npz.part").exists()
    assert len(cluster_kmeans(datastore, num_clusters=7)) == 7


def test_several_clusterings_live_side_by_side(datastore: Datastore) -> None:
    with pytest.raises(UserError, match="has no clusters; make some with cluster_datastore"):
        Clusters.open(datastore)
    with pytest.raises(UserError, match="no clusters called 'a': make some"):
        Clusters.open(datastore, "a")
    cluster_kmeans(datastore, "a", num_clusters=3)
    assert len(Clusters.open(datastore)) == 3
    cluster_kmeans(datastore, "b", num_clusters=4)
    assert len(Clusters.open(datastore, "a")) == 3 and len(Clusters.open(datastore, "b")) == 4
    with pytest.raises(UserError, match="several clusterings, a, b; choose one with clusters=NAME"):
        Clusters.open(datastore)
    with pytest.raises(UserError, match="no clusters called 'c': it has a, b"):
        Clusters.open(datastore, "c")
    with pytest.raises(UserError, match="exist already; choose another --name or give --overwrite"):
        cluster_kmeans(datastore, "a", num_clusters=5)
    assert len(cluster_kmeans(datastore, "a", num_clusters=5, overwrite=True)) == 5
    clusters = Clusters.open(datastore, "b")
    assert isinstance(clusters.members, np.memmap) and not clusters.members.flags.writeable
    assert clusters.metadata["method"] == "kmeans" and clusters.metadata["seed"] == 1


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "members.npy").unlink(), "members.npy is missing"),
        (lambda folder: (folder / "members.npy").write_bytes(b"cut"), "members.npy has 3 bytes"),
        (lambda folder: (folder / "clusters.json").write_text("{"), "not valid JSON"),
        (lambda folder: change(folder, keys_sha256="0"), "made for other keys"),
        (lambda folder: change(folder, format_version=9), "version 1"),
        (lambda folder: change(folder, num_clusters=4), "member_starts.npy is not what clusters.json says"),
        (lambda folder: change(folder, num_clusters=None), "clusters.json is damaged"),
        (lambda folder: change(folder, files={}), "clusters.json is damaged"),
        (lambda folder: np.save(folder / "member_starts.npy", np.arange(4)), "member_starts.npy is damaged"),
        (lambda folder: scramble(folder / "cluster_of_entry.npy"), "not a .npy array"),
    ],
)
def test_damaged_clusters_are_refused(datastore: Datastore, damage, sentence: str) -> None:
    damage(cluster_kmeans(datastore, num_clusters=3).path)
    with pytest.raises(UserError, match=sentence):
        Clusters.open(datastore)


def change(folder: Path, **values: object) -> None:
    change_json(folder / "clusters.json", **values)


def scramble(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (partial(cluster_kmeans, num_clusters=0), "num_clusters=0 must be between 1 and"),
        (partial(cluster_kmeans, num_clusters=COUNT + 1), "must be between 1 and the store's 3,000 entries"),
        (partial(cluster_kmeans, sample=5), "sample=5 is too small"),
        (partial(cluster_kmeans, iterations=0), "iterations=0 must be at least 1"),
        (partial(cluster_kmeans, seed=-1), "seed=-1 must be between 0 and"),
        (partial(cluster_kmeans, name="../x"), "'../x' cannot name clusters"),
        (partial(cluster_kmeans, name=".."), "'..' cannot name clusters"),
        (partial(cluster_greedy_merge, k=0), "k=0 must be at least 1"),
        (partial(cluster_greedy_merge, k=COUNT), "less than the store's 3,000 entries"),
        (partial(cluster_greedy_merge, probe=0), "probe=0 must be at least 1"),
        (partial(cluster_greedy_merge, index="other"), "no index called 'other': it has index"),
        (
            partial(import_members, name="m", pickle_file="missing.pkl"),
            "Cannot read missing.pkl: No such file",
        ),
    ],
)
def test_user_mistakes_are_one_sentence(datastore: Datastore, run, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        run(datastore)
    assert "\n" not in str(error.value)
    assert not (datastore.path / "clusters").exists()


def test_a_sample_beyond_the_memory_is_refused(datastore: Datastore, monkeypatch) -> None:
    sizes = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2**16}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    with pytest.raises(UserError, match=r"choose --sample (\d+) or less") as error:
        cluster_kmeans(datastore, num_clusters=20)
    fits = int(str(error.value).rpartition("--sample ")[2].split()[0])
    assert len(cluster_kmeans(datastore, num_clusters=20, sample=fits)) == 20
    with pytest.raises(UserError, match="choose fewer --num_clusters"):
        cluster_kmeans(datastore, "many", num_clusters=1000)


def test_a_full_disk_and_bad_keys_are_named(datastore: Datastore, monkeypatch) -> None:
    usage = shutil.disk_usage(datastore.path)._replace(free=1000)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="Not enough disk space .* clusters' arrays"),
    ):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        cluster_kmeans(datastore)
    keys = np.load(datastore.path / "keys.npy")
    keys[7, 0] = np.nan
    np.save(datastore.path / "keys.npy", keys)
    with pytest.raises(UserError, match="keys hold NaN or infinity"):
        cluster_greedy_merge(Datastore.open(datastore.path, verify="never"))


# Published members files


def random_matrix(seed: int, columns: int = COUNT) -> tuple[sp.csr_matrix, np.ndarray]:
    """A matrix as the published scripts make it, and the clusters it stands for."""
    cluster_of_entry = np.random.default_rng(seed).integers(-1, 50, columns).astype(np.int32)
    cluster_of_entry[-1] = 49  # so that neither the shape's rows nor its columns end early
    columns_used = np.flatnonzero(cluster_of_entry >= 0)
    rows = cluster_of_entry[columns_used].tolist()
    return sp.csr_matrix(([1] * len(rows), (rows, columns_used.tolist()))), cluster_of_entry


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array])
def test_members_pickled_by_scipy_are_imported(datastore: Datastore, tmp_path: Path, protocol: int, kind) -> None:
    matrix, expected = random_matrix(protocol)
    (tmp_path / "members.pkl").write_bytes(pickle.dumps(kind(matrix), protocol))
    clusters = import_members(datastore, "theirs", tmp_path / "members.pkl")
    assert clusters.cluster_of_entry.tolist() == expected.tolist() and len(clusters) == 50
    assert_consistent(clusters)
    assert clusters.metadata["method"] == "import" and clusters.metadata["file"] == "members.pkl"


def test_members_of_older_scipy_and_numpy_are_imported(datastore: Datastore, tmp_path: Path) -> None:
    matrix, expected = random_matrix(1)
    content = pickle.dumps(matrix, 2)
    for new, old in ((b"scipy.sparse._csr\n", b"scipy.sparse.csr\n"), (b"numpy._core.", b"numpy.core.")):
        content = content.replace(new, old)
    assert b"_csr\n" not in content and b"_core" not in content
    (tmp_path / "members.pkl").write_bytes(content)
    assert import_members(datastore, "theirs", tmp_path / "members.pkl").cluster_of_entry.tolist() == expected.tolist()


def test_members_of_any_numbers_are_imported(datastore: Datastore, tmp_path: Path) -> None:
    matrix, expected = random_matrix(3)
    for dtype in (bool, np.int8, np.uint16, np.float32, ">i4"):
        changed = matrix.copy()
        changed.data = changed.data.astype(dtype)
        changed.indices, changed.indptr = changed.indices.astype(np.int64), changed.indptr.astype(">i8")
        changed._shape = tuple(np.int64(size) for size in changed.shape)
        changed.data[0] = 0  # no element at all, as numpy.nonzero has it
        (tmp_path / "members.pkl").write_bytes(pickle.dumps(changed))
        clusters = import_members(datastore, "theirs", tmp_path / "members.pkl", overwrite=True)
        expected[matrix.indices[0]] = -1
        assert clusters.cluster_of_entry.tolist() == expected.tolist()


def test_a_matrix_that_ends_early_leaves_the_rest_in_no_cluster(datastore: Datastore, tmp_path: Path, caplog) -> None:
    matrix, expected = random_matrix(4, columns=COUNT - 10)
    (tmp_path / "members.pkl").write_bytes(pickle.dumps(matrix))
    clusters = import_members(datastore, "theirs", tmp_path / "members.pkl")
    assert clusters.cluster_of_entry.tolist() == expected.tolist() + [-1] * 10
    assert f"{(expected < 0).sum() + 10} of 3000 entries are in no cluster" in caplog.text


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        (sp.csr_matrix((2, COUNT + 1)), "clusters 3,001 entries, the datastore .* has 3,000"),
        (sp.csr_matrix(([1, 1], ([0, 1], [5, 5]))), "has entry 5 in more than one cluster"),
        (sp.csc_matrix(([1, 1], ([0, 1], [5, 5]))), "has entry 5 in more than one cluster"),
        (sp.coo_matrix(([1], ([0], [5]))), "wants to load scipy.sparse._coo.coo_matrix"),
        (np.arange(3), "holds no scipy CSR or CSC matrix but array"),
        ({0: [1, 2]}, "holds no scipy CSR or CSC matrix but dict"),
        (np.array([[1, 2]]), "is damaged or not a pickle"),
    ],
)
def test_other_contents_are_refused(datastore: Datastore, tmp_path: Path, matrix: object, sentence: str) -> None:
    (tmp_path / "members.pkl").write_bytes(pickle.dumps(matrix))
    with pytest.raises(UserError, match=rf"members.pkl {sentence}"):
        import_members(datastore, "theirs", tmp_path / "members.pkl")
    assert not (datastore.path / "clusters").exists()


def broken(**attributes: object) -> sp.csr_matrix:
    matrix = random_matrix(5)[0]
    vars(matrix).update(attributes)
    return matrix


@pytest.mark.parametrize(
    "matrix",
    [
        broken(indptr=np.arange(7)),
        broken(indptr=np.full(51, -1)),
        broken(indptr=np.linspace(0, 9, 51)),
        broken(indptr=np.arange(51)[::-1]),
        broken(indptr=np.arange(51) * 10**6),
        broken(indices=np.full(COUNT, COUNT)),
        broken(indices=np.full(COUNT, -1)),
        broken(indices=None),
        broken(data=np.ones(3)),
        broken(data=np.array(["x"] * COUNT)),
        broken(_shape=(50,)),
        broken(_shape=(50.0, 3000.0)),
        broken(_shape=(2**70, 1)),
    ],
)
def test_broken_matrices_are_refused(tmp_path: Path, matrix: sp.csr_matrix) -> None:
    (tmp_path / "members.pkl").write_bytes(pickle.dumps(matrix))
    with pytest.raises(UserError, match=r"members.pkl (is damaged|wants to make an array of dtype 'U1')"):
        load_sparse_matrix(tmp_path / "members.pkl")


def test_truncated_pickles_are_refused(tmp_path: Path) -> None:
    for protocol in (2, 5):
        content = pickle.dumps(random_matrix(6, columns=20)[0], protocol)
        for length in range(len(content)):
            (tmp_path / "members.pkl").write_bytes(content[:length])
            # Protocol 2 ends names by their line's end: of a cut one the rest may be refused as a name.
            with pytest.raises(UserError, match="damaged or not a pickle|wants to load"):
                load_sparse_matrix(tmp_path / "members.pkl")


class Calls:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def with_element(element: object) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = element
    return array


def pickle_of(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def name(module: bytes, attribute: bytes) -> bytes:
    """The opcodes that load ``module.attribute``, dots in the attribute included."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, attribute)) + b"\x93"


TOUCH = "import pathlib; pathlib.Path('touched').touch()"
HOSTILE = {
    "os.system": (Calls(os.system, "touch touched"), f"{os.system.__module__}.system"),
    "eval": (Calls(eval, f"exec({TOUCH!r})"), "eval"),
    "exec": (Calls(exec, TOUCH), "exec"),
    "getattr": (Calls(getattr, sp.csr_matrix, "__init__"), "getattr"),
    "a call inside a call": (Calls(getattr, Calls(__import__, "os"), "system"), "getattr"),
    "partial": (Calls(partial, os.system), "functools.partial"),
    "numpy.load": (Calls(np.load, "file.npy"), "numpy.load"),
    "numpy's functions": (Calls(np.frompyfunc, eval, 1, 1), "numpy.frompyfunc"),
    "Popen": (Calls(subprocess.Popen, ["touch", "touched"]), "Popen"),
    "a matrix with a call for data": (
        broken(data=Calls(os.system, "touch touched")),
        f"{os.system.__module__}.system",
    ),
    "a matrix of objects": (
        broken(data=with_element(Calls(os.system, "touch touched"))),
        "an array of dtype 'O8'",
    ),
    "an array of objects": (with_element(Calls(os.system, "touch touched")), "an array of dtype 'O8'"),
    "a structured array": (np.zeros(1, dtype=[("a", "O")]), "an array of dtype 'V8'"),
    "a memory-mapped array": (np.zeros(2).view(np.memmap), "numpy.memmap"),
    "a dotted name": (pickle_of(name(b"numpy", b"ndarray.tofile")), "numpy.ndarray.tofile"),
    "a name that paints the terminal": (pickle_of(name(b"\x1b[2J\n", b"x")), "load \\x1b[2J\\n.x,"),
    "a dotted way out": (pickle_of(name(b"numpy", b"dtype.__class__")), "numpy.dtype.__class__"),
    "the unpickler's own helper": (pickle_of(name(b"copyreg", b"_reconstructor")), "copyreg._reconstructor"),
    "an object from outside": (pickle_of(b"\x8c\x01x", b"Q"), "an object from outside the file"),
    "protocol 0": (b"cos\nsystem\n(S'touch touched'\ntR.", "os.system"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_do_nothing(datastore: Datastore, tmp_path, monkeypatch, what) -> None:
    monkeypatch.chdir(tmp_path)
    content, named = HOSTILE[what]
    for protocol in [None] if isinstance(content, bytes) else [2, 3, 4, 5]:
        Path("members.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        with pytest.raises(UserError) as error:
            import_members(datastore, "theirs", "members.pkl")
        assert str(error.value).startswith("members.pkl wants to ") and named in str(error.value)
        assert str(error.value).endswith("which no sparse matrix of numbers needs; nothing of it was run.")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "members.pkl"}
    assert not (datastore.path / "clusters").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        (name(b"numpy", b"ndarray"), b"}b"),  # state for a class
        (
            name(b"numpy", b"dtype"),
            b")\x81",
            b"N",
            b"}\x8c\x05dtypeK\x01s",
            b"\x86b",
        ),  # attributes of an instance
        (
            name(b"numpy.core.multiarray", b"_reconstruct"),
            b"N}\x8c\x01aK\x01s\x86b",
        ),  # attributes of a function
        (name(b"numpy.core.multiarray", b"_reconstruct"), name(b"numpy", b"dtype"), b"K\x00\x85N\x87R"),
        (name(b"_codecs", b"encode"), b"\x8c\x01x\x8c\x05utf-8\x86R"),
        (name(b"scipy.sparse", b"csr_matrix"), b")\x81K\x01b"),
        (name(b"scipy.sparse", b"csr_matrix"), b")\x81\x8c\x01aK\x01s"),  # an item of an instance
        (b"\x82\x01",),  # the extension registry
    ],
)
def test_tricks_with_allowed_names_lead_nowhere(tmp_path: Path, opcodes: tuple[bytes, ...]) -> None:
    from knn_lm_eval.make import sparse_pickle as safe_pickle

    before = {key: dict(vars(value)) for key, value in vars(safe_pickle).items() if isinstance(value, type)}
    (tmp_path / "members.pkl").write_bytes(pickle_of(*opcodes))
    with pytest.raises(UserError, match="members.pkl (is damaged|wants to)"):
        load_sparse_matrix(tmp_path / "members.pkl")
    assert before == {key: dict(vars(value)) for key, value in vars(safe_pickle).items() if isinstance(value, type)}


DOUBLED = b")" + b"2\x86" * 60  # a tuple of twice the one before, and so on
ENCODE = name(b"_codecs", b"encode")
TEXT = b"X" + (2**16).to_bytes(4, "little") + b"x" * 2**16 + b"\x8c\x06latin1\x86"
GREEDY = {
    "nested lists": pickle_of(b"]", b"q\x00](h\x00h\x00e" * 60),
    "an error about nested lists": pickle_of(b"]", b"q\x00](h\x00h\x00e" * 60, b"\x8c\x01xs"),
    "nested tuples": pickle_of(DOUBLED),
    "an encoding of nested tuples": pickle_of(name(b"_codecs", b"encode"), b"\x8c\x01x", DOUBLED, b"\x86R"),
    "a dtype of nested tuples": pickle_of(name(b"numpy", b"dtype"), DOUBLED, b"\x85R"),
    "a dictionary of nested tuples": pickle_of(b"}", DOUBLED, b"Ns"),
    "dictionaries of nested tuples": pickle_of(b"}(", DOUBLED, b"Nu"),
    "a dictionary at once": pickle_of(b"(", DOUBLED, b"Nd"),
    "a set of nested tuples": pickle_of(b"\x8f(", DOUBLED, b"\x90"),
    "a frozen set": pickle_of(b"(", DOUBLED, b"\x91"),
    "2 GiB of bytes": pickle_of(b"B\xff\xff\xff\x7f"),
    "2 GiB of bytes, 8": pickle_of(b"\x8e\xff\xff\xff\x7f\x00\x00\x00\x00"),
    "2 GiB of an array": pickle_of(b"\x96\xff\xff\xff\x7f\x00\x00\x00\x00"),
    "2 GiB of text": pickle_of(b"X\xff\xff\xff\x7f"),
    "2 GiB of old text": pickle_of(b"T\xff\xff\xff\x7f"),
    "a number of 2 GiB": pickle_of(b"\x8b\xff\xff\xff\x7f"),
    "a frame of 2 GiB": pickle_of(b"\x95\xff\xff\xff\x7f\x00\x00\x00\x00"),
    "a note far away": pickle_of(b"Nr\xff\xff\xff\xff"),
    "one text encoded again and again": pickle_of(ENCODE, TEXT, b"q\x01R", (ENCODE + b"h\x01R") * 2000),
}


@pytest.mark.parametrize("what", GREEDY)
def test_small_pickles_take_neither_time_nor_memory(tmp_path: Path, what: str) -> None:
    (tmp_path / "members.pkl").write_bytes(GREEDY[what])
    began = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        load_sparse_matrix(tmp_path / "members.pkl")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert most < 2**24 and time.perf_counter() - began < 5


def test_a_matrix_of_more_clusters_than_entries_is_refused(datastore: Datastore, tmp_path: Path) -> None:
    matrix = sp.csc_matrix(([1], ([COUNT], [5])), shape=(1_500_000_000, COUNT))
    (tmp_path / "members.pkl").write_bytes(pickle.dumps(matrix))
    with pytest.raises(UserError, match="has 1,500,000,000 clusters, and the datastore .* only 3,000 entries"):
        import_members(datastore, "theirs", tmp_path / "members.pkl")


def test_more_clusters_than_int32_can_name_are_int64(datastore: Datastore, tmp_path: Path, monkeypatch) -> None:
    assert cluster_dtype(2**31) is np.int32 and cluster_dtype(2**31 + 1) is np.int64
    matrix, expected = random_matrix(3)
    (tmp_path / "members.pkl").write_bytes(pickle.dumps(matrix))
    monkeypatch.setattr(store_clusters, "MOST_IN_INT32", 49)
    for name, make in (
        ("theirs", lambda: import_members(datastore, "theirs", tmp_path / "members.pkl")),
        ("kmeans", lambda: cluster_kmeans(datastore, "kmeans", num_clusters=50, iterations=1)),
    ):
        make()
        clusters = Clusters.open(datastore, name)
        assert clusters.cluster_of_entry.dtype == np.int64
        assert_consistent(clusters)
    assert Clusters.open(datastore, "theirs").cluster_of_entry.tolist() == expected.tolist()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_gives_a_matrix_or_a_sentence(tmp_path_factory, at: int, change: int) -> None:
    content = bytearray(pickle.dumps(random_matrix(7, columns=60)[0], 4))
    at %= len(content)
    content[at] ^= change
    file = tmp_path_factory.getbasetemp() / "changed.pkl"
    file.write_bytes(content)
    try:
        matrix = load_sparse_matrix(file)
    except UserError:
        return
    assert len(matrix.indices) == len(matrix.data) == matrix.indptr[-1]


# The script


def run_script(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["cluster_datastore", *map(str, arguments)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


def test_the_script_clusters_and_summarizes(datastore: Datastore, tmp_path: Path, monkeypatch, capsys) -> None:
    run = partial(run_script, monkeypatch, capsys, "--datastore", datastore.path)
    out = run("--method", "kmeans", "--num_clusters", 40, "--sample", 2000, "--iterations", 3, "--seed", 4)
    assert f"{datastore.path / 'clusters' / 'kmeans'}: 40 clusters of 3,000 entries" in out
    assert "sizes: mean 75.0, median" in out and "of the entries have their cluster's most common value" in out
    out = run("--method", "greedy_merge", "--k", 4, "--index", "index", "--name", "merged")
    assert "clusters/merged: " in out and "100.0% of the entries have their cluster's most common value" in out
    (tmp_path / "members.pkl").write_bytes(pickle.dumps(random_matrix(1)[0]))
    assert "clusters/import: 50 clusters of " in run("--members", tmp_path / "members.pkl")
    with pytest.raises(UserError, match="import exist already"):
        run("--members", tmp_path / "members.pkl")
    assert "50 clusters" in run("--members", tmp_path / "members.pkl", "--overwrite")
    with pytest.raises(UserError, match="--k does not go with the method kmeans"):
        run("--method", "kmeans", "--k", 4)
    with pytest.raises(UserError, match="--resume does not go with the method import"):
        run("--members", tmp_path / "members.pkl", "--resume")


def test_a_mistake_ends_the_script_with_one_sentence(tmp_path: Path) -> None:
    work = script("cluster_datastore", "--datastore", tmp_path, "--method", "kmeans", "--k", "3")
    ended = Ready(work).completed()
    assert ended.returncode == 1
    assert ended.stderr == "error: --k does not go with the method kmeans; leave it out.\n"
