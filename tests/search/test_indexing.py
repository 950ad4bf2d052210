"""Indexes: what auto chooses, exactness, the quality figures, interruptions, and damaged or foreign files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from helpers.stores import change_json, make_store

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.lm_speed import lm_microseconds
from knn_lm_eval.search import index_memory, indexing, probe_choice, quality, training
from knn_lm_eval.search.choosing import Budget, choose_factory
from knn_lm_eval.search.exact_distances import exact_distances
from knn_lm_eval.search.faiss_index import make_index, open_index, search
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.kmeans import two_level_kmeans
from knn_lm_eval.store import key_stream
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.system.sampling import draw_entries


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    store = make_store(tmp_path_factory.mktemp("index") / "store")
    build_index(store, "Flat")
    build_index(store, "IVF16,RaBitQfs", name="rabitq")
    return store


@pytest.fixture
def own_store(tmp_path: Path, pristine: Datastore) -> Datastore:
    """A copy that a test may damage."""
    shutil.copytree(pristine.path, tmp_path / "store")
    return Datastore.open(tmp_path / "store")


def brute_force(store: Datastore, queries: np.ndarray, k: int, dot: bool) -> tuple[np.ndarray, np.ndarray]:
    distances = brute_force_all(store, queries, dot)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def brute_force_all(store: Datastore, queries: np.ndarray, dot: bool) -> np.ndarray:
    keys, queries = store.keys.astype(np.float64), queries.astype(np.float64)
    if dot:
        return -(queries @ keys.T)
    return np.stack([((keys - query) ** 2).sum(-1) for query in queries])


def test_auto_is_rotated_rabitq_also_for_small_stores() -> None:
    """Those that exact search serves need no index; whoever builds one wants it faster."""
    assert choose_factory(60_000, 576) == "RR576,IVF1024,RaBitQfs"
    assert choose_factory(400_000, 576) == "RR576,IVF2048,RaBitQfs"
    assert choose_factory(1_500_000, 576) == choose_factory(10_000_000, 576) == "RR576,IVF4096_HNSW32,RaBitQfs"
    assert choose_factory(100_000_000, 64, "dot") == "RR64,IVF32768_HNSW32,RaBitQfs"


def test_a_budget_of_bytes_buys_bits_then_costs_dimensions() -> None:
    chosen = [choose_factory(400_000, 576, "l2", budget) for budget in (400, 220, 120, 105, 70, 3000)]
    assert chosen == [
        "RR576,IVF2048,RaBitQfs4",
        "RR576,IVF2048,RaBitQfs2",
        "RR576,IVF2048,RaBitQfs",
        "PCAR504,IVF2048,RaBitQfs",
        "PCAR288,IVF2048,RaBitQfs",
        "RR576,IVF2048,RaBitQfs4",
    ]
    with pytest.raises(UserError, match="takes 10 bytes per entry"):
        choose_factory(400_000, 576, "l2", 10)
    with pytest.raises(UserError, match="takes 60 bytes per entry; the smallest, RR576,IVF2048"):
        choose_factory(400_000, 576, "dot", 60)


@pytest.mark.parametrize("limit", [40, 60, 100])
def test_a_built_index_keeps_to_its_bytes(tmp_path: Path, limit: float) -> None:
    store = make_store(tmp_path / "s", count=20_000, dimension=64)
    metadata = build_index(store, budget=Budget(bytes_per_entry=limit), quality_queries=0)
    assert 0.6 * limit < metadata["bytes"] / len(store) <= limit
    with pytest.raises(UserError, match="for --factory auto to choose by"):
        build_index(store, "Flat", budget=Budget(bytes_per_entry=limit), name="other")


def test_a_slowdown_limits_the_probe(own_store: Datastore, monkeypatch, caplog) -> None:
    rows = [{"probe": p, "perplexity_cost_bound": c, "microseconds": t} for p, c, t in ((1, 0.03, 10), (2, 0.0, 20))]
    assert probe_choice.fastest_enough(rows, 100) == 2
    assert probe_choice.fastest_enough(rows, 15) == 1
    assert not caplog.text
    assert probe_choice.fastest_enough(rows, 5) == 1
    assert "No probe keeps to the budget of 5 us" in caplog.text
    for microseconds, allowed in ((1e9, [1, 2, 4, 8, 16]), (0.0, [1, 2, 4, 8, 16])):
        metadata = build_index(
            own_store,
            "IVF16,SQ8",
            budget=Budget(slowdown=1.5),
            lm_microseconds=lambda store, value=microseconds: value,
            overwrite=True,
        )
        assert metadata["probe"] in allowed and metadata["slowdown"] == 1.5
    fastest = min(metadata["quality"], key=lambda row: row["microseconds"])
    assert metadata["probe"] == fastest["probe"]
    with pytest.raises(UserError, match="is of the LM's own time: give lm_microseconds"):
        build_index(own_store, budget=Budget(slowdown=1.5), overwrite=True)
    with pytest.raises(UserError, match="takes a measurement"):
        build_index(own_store, budget=Budget(slowdown=1.5), quality_queries=0, overwrite=True)


def test_a_shard_starts_without_torch_and_building_an_index_reaches_no_lm() -> None:
    source = """
        import sys
        import knn_lm_eval.search.shard
        assert "torch" not in sys.modules
        import knn_lm_eval.search.indexing
        upstairs = ("knn_lm_eval.make", "knn_lm_eval.model", "knn_lm_eval.lm", "transformers", "lm_eval")
        print([name for name in sys.modules if name.startswith(upstairs)])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_lms_time_is_measured_on_the_stores_own_text(store: Datastore, own_store: Datastore) -> None:
    assert 0 < lm_microseconds(store) < 1e6
    with pytest.raises(UserError, match="does not know its model"):
        lm_microseconds(own_store)


def test_budgets_are_read_from_a_command_line() -> None:
    assert Budget.parse([]) == Budget()
    assert Budget.parse(["64", "1.1x"]) == Budget(64, 1.1)
    for wrong, message in (
        (["1x"], "above 1"),
        (["-3"], "above 0"),
        (["much"], "or a slowdown"),
        (["3", "4"], "two limits"),
        (["nan"], "above 0"),
    ):
        with pytest.raises(UserError, match=message):
            Budget.parse(wrong)


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_flat_index_searches_exactly(tmp_path: Path, sim_func: str) -> None:
    store = make_store(tmp_path / "s", count=500)
    metadata = build_index(store, "Flat", sim_func=sim_func)
    assert metadata["factory"] == "Flat" and metadata["quality"][0]["recall"] > 0.999
    queries = np.random.default_rng(1).standard_normal((7, store.dimension)).astype(np.float32)
    distances, values, entries, _ = LocalRetriever(store, k=40).search(torch.from_numpy(queries))
    expected, order = brute_force(store, queries, 40, sim_func == "dot")
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.sort(entries.numpy()), np.sort(order))
    assert (values.numpy() == store.values[entries.numpy()]).all()


@pytest.mark.parametrize(
    ("factory", "parts", "sim_func"),
    [("Flat", None, "l2"), ("Flat", 3, "l2"), ("RR128,Flat", None, "l2"), ("Flat", None, "dot"), ("Flat", 3, "dot")],
)
def test_a_large_common_part_of_the_keys_costs_a_flat_index_nothing(
    tmp_path: Path, factory: str, parts: int | None, sim_func: str
) -> None:
    """Post-norm models' keys, say. Asked for so many at once, faiss expands the square, and loses the differences."""
    store = make_store(tmp_path / "s", dimension=128, common=1414)
    metadata = build_index(store, factory, parts=parts, sim_func=sim_func, quality_queries=1100, k=100)
    assert metadata["quality"][0]["recall"] > 0.999 and metadata["quality"][0]["p_knn_error"] < 0.01
    index, _ = open_index(store)
    queries = store.keys[:1100].astype(np.float32)
    for few in (1, 15, 16, 1100):
        distances, entries = search(index, queries[:few], 50)
        expected, order = brute_force(store, queries[:few], 50, sim_func == "dot")
        found = np.take_along_axis(brute_force_all(store, queries[:few], sim_func == "dot"), entries, 1)
        # What single precision can hold of products near 2,000,000, and what it loses in a rotation.
        rounding = 4e-7 * np.abs(expected).max() if sim_func == "dot" else 0.01 if "RR" in factory else 0
        tolerance = 1e-4 * expected.std() + rounding
        assert np.abs(found - expected).max() <= tolerance and np.abs(distances - found).max() <= tolerance
        assert (np.diff(distances, axis=1) >= 0).all()


def test_more_neighbours_than_there_are_leave_empty_slots(pristine: Datastore) -> None:
    index, _ = open_index(pristine)
    for few in (3, 40):
        distances, entries = search(index, pristine.keys[:few].astype(np.float32), len(pristine) + 2)
        assert (entries[:, -2:] == -1).all() and np.isinf(distances[:, -2:]).all()
        assert (np.sort(entries[:, :-2]) == np.arange(len(pristine))).all()


@pytest.mark.parametrize("factory", ["HNSW16", "NSG16", "PCA8,HNSW8", "HNSW8,SQ8"])
def test_graphs_are_built(own_store: Datastore, factory: str) -> None:
    metadata = build_index(own_store, factory, name="graph", k=50)
    assert metadata["quality"][0]["recall"] > 0.5 and metadata["probe"] is None


def test_an_index_that_wants_numbers_of_its_own_is_refused(own_store: Datastore) -> None:
    with pytest.raises(UserError, match="faiss cannot add keys to IndexIDMap"):
        build_index(own_store, "IDMap,Flat", name="other")


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
def test_recomputed_distances_are_exact_whatever_the_index(pristine: Datastore, sim_func: str, monkeypatch) -> None:
    monkeypatch.setattr("knn_lm_eval.search.exact_distances.GATHER_BYTES", 2**13)  # several blocks
    queries = np.random.default_rng(1).standard_normal((9, pristine.dimension)).astype(np.float32)
    retriever = LocalRetriever(pristine, k=30, index="rabitq", sim_func=sim_func, recompute_dists=True)
    distances, _, entries, _ = retriever.search(torch.from_numpy(queries))
    keys = pristine.keys[entries.numpy()].astype(np.float64)
    inner = (keys * queries[:, None]).sum(-1)
    expected = -inner if sim_func == "dot" else ((keys - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5, atol=1e-4)


class RecordingArray:
    """Keys that remember which rows were read."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.shape, self.read = keys, keys.shape, []

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.read.append(rows)
        return self.keys[rows]


@pytest.mark.parametrize("gather_bytes", [1, 2**13, 2**26])
def test_exact_distances_read_keys_once_and_forwards(monkeypatch, gather_bytes: int) -> None:
    monkeypatch.setattr("knn_lm_eval.search.exact_distances.GATHER_BYTES", gather_bytes)
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((500, 16)).astype(np.float16)
    queries, entries = rng.standard_normal((23, 16)).astype(np.float32), rng.integers(-1, 500, (23, 40))
    entries[5] = -1
    for sim_func in ("l2", "dot"):
        recording = RecordingArray(keys)
        distances = exact_distances(recording, queries, entries, sim_func)
        for (i, j), entry in np.ndenumerate(entries):
            key, query = keys[entry].astype(np.float64), queries[i].astype(np.float64)
            expected = np.inf if entry < 0 else -(key @ query) if sim_func == "dot" else ((key - query) ** 2).sum()
            assert distances[i, j] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        read = np.concatenate(recording.read)
        assert (np.diff(read) >= 0).all()
        assert set(read) == set(entries[entries >= 0])
        # A key at the end of one block may be the first of the next.
        assert len(read) <= len(set(read)) + len(recording.read) - 1
    assert exact_distances(keys, queries[:0], entries[:0], "l2").shape == (0, 40)
    assert exact_distances(keys, queries, entries[:, :0], "l2").shape == (23, 0)


def test_visiting_all_lists_of_exact_vectors_costs_nothing_beside_exact_search(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=2000, dimension=4)
    metadata = build_index(store, "IVF4,Flat", k=40, quality_queries=200)
    first, *_, last = metadata["quality"]
    assert last["probe"] == 4
    assert last["exact_cost"] == pytest.approx(0, abs=2e-5)
    assert first["exact_cost"] == pytest.approx(first["perplexity_cost"], abs=2e-5) != 0


def test_quality_figures_are_recall_and_error_of_p_knn(pristine: Datastore) -> None:
    """Recomputed by brute force from what the index returns."""
    k, queries = 50, 64
    index, _ = open_index(pristine, "rabitq")
    measured = quality.measure_quality(pristine, index, "l2", k, 1.0, queries, seed=1)
    chosen = draw_entries(len(pristine), queries, 2)
    _, order = brute_force(pristine, pristine.keys[chosen], k + 1, dot=False)
    assert [row["probe"] for row in measured["quality"]] == [1, 2, 4, 8, 16]
    for row in measured["quality"]:
        index.nprobe = row["probe"]
        approximate, found = index.search(pristine.keys[chosen].astype(np.float32), k + 1)
        recalls, errors = [], []
        for i, query in enumerate(chosen):
            exact = [e for e in order[i] if e != query][:k]
            mine = [(d, e) for d, e in zip(approximate[i], found[i], strict=True) if e not in (query, -1)][:k]
            recalls.append(len({e for _, e in mine} & set(exact)) / k)
            ps = []
            distances = ((pristine.keys[exact].astype(np.float64) - pristine.keys[query]) ** 2).sum(-1)
            for neighbours in (list(zip(distances, exact, strict=True)), mine):
                weights = np.exp(-np.array([d for d, _ in neighbours]))
                right = np.array([pristine.values[e] == pristine.values[query] for _, e in neighbours])
                ps.append(weights[right].sum() / weights.sum())
            errors.append(abs(ps[0] - ps[1]))
        # The codes are compared with queries that are rounded otherwise than in faiss.
        assert row["recall"] == pytest.approx(np.mean(recalls), abs=5e-3)
        assert row["p_knn_error"] == pytest.approx(np.mean(errors), abs=2e-3)
    assert measured["quality"][-1]["perplexity_cost"] == measured["quality"][-1]["perplexity_cost_bound"] == 0
    assert all(row["perplexity_cost_bound"] >= row["perplexity_cost"] for row in measured["quality"])
    surely_cheap = [row["probe"] for row in measured["quality"] if row["perplexity_cost_bound"] <= 0.01]
    assert measured["probe"] == surely_cheap[0]


def test_probe_given_beats_the_recommended_one(pristine: Datastore) -> None:
    recommended = json.loads((pristine.path / "rabitq.json").read_text())["probe"]
    assert LocalRetriever(pristine, k=5, index="rabitq").probe == recommended
    assert LocalRetriever(pristine, k=5, index="rabitq", probe=3).probe == 3
    assert LocalRetriever(pristine, k=5, index="rabitq", probe=10**6).probe == 16  # all lists


@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQ8", "RR16,IVF16,RaBitQfs"])
def test_an_interrupted_build_resumes_to_the_same_index(tmp_path: Path, monkeypatch, factory: str) -> None:
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 500)
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 500)
    monkeypatch.setattr(indexing, "CHECKPOINT_SECONDS", -1)
    whole, broken = make_store(tmp_path / "a"), make_store(tmp_path / "b")
    build_index(whole, factory)
    monkeypatch.setattr(index_memory, "MOST_IN_SEGMENT", 1000)

    calls = 0

    def fail_after_some(keys: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == (5 if factory == "Flat" else 10):  # Flat is not trained
            raise KeyboardInterrupt
        return original(keys)

    original = key_stream.finite_keys
    monkeypatch.setattr(key_stream, "finite_keys", fail_after_some)
    with pytest.raises(KeyboardInterrupt):
        build_index(broken, factory)
    if factory == "Flat":
        assert faiss.read_index(str(broken.path / "index.faiss.part")).ntotal > 0
    else:
        assert faiss.read_index(str(broken.path / "index.faiss.000000.part")).ntotal == 1000
    assert not (broken.path / "index.faiss").exists()
    monkeypatch.setattr(key_stream, "finite_keys", original)
    build_index(broken, factory, resume=True)
    assert (whole.path / "index.faiss").read_bytes() == (broken.path / "index.faiss").read_bytes()
    assert not list(broken.path.glob("*.part*"))


@pytest.mark.parametrize("factory", ["Flat", "IVF16,RaBitQfs", "PCA8,IVF16,SQ8"])
def test_an_index_in_parts_finds_what_it_finds_in_one(tmp_path: Path, factory: str) -> None:
    store = make_store(tmp_path / "s")
    build_index(store, factory, quality_queries=0)
    metadata = build_index(store, factory, name="parts", parts=4, quality_queries=64)
    runs = [(part["start"], part["stop"]) for part in metadata["parts"]]
    assert runs == [(0, 750), (750, 1500), (1500, 2250), (2250, 3000)]
    assert metadata["bytes"] == sum(file.stat().st_size for file in store.path.glob("parts.*.faiss"))
    assert metadata["factory"] == factory and metadata["quality"]
    derived = json.loads((store.path / "manifest.json").read_text())["derived"]
    assert {"parts.json", "parts.000.faiss", "parts.003.faiss"} <= set(derived)
    queries = np.random.default_rng(1).standard_normal((9, store.dimension)).astype(np.float32)
    whole, joined = (LocalRetriever(store, k=60, probe=4, index=name) for name in ("index", "parts"))
    (distances, entries), (expected_distances, expected_entries) = joined.find(queries), whole.find(queries)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5, atol=1e-5)
    for mine, expected in zip(entries, expected_entries, strict=True):  # equal distances may change places
        assert len(set(mine) & set(expected)) >= 59
    build_index(store, factory, name="parts", quality_queries=0, overwrite=True)  # in one piece again
    assert not list(store.path.glob("parts.*.faiss")) and (store.path / "parts.faiss").exists()


def test_an_interrupted_build_keeps_its_finished_parts(tmp_path: Path, monkeypatch) -> None:
    store = make_store(tmp_path / "s")
    settings = {"factory": "IVF16,RaBitQfs", "parts": 3, "quality_queries": 0}
    build_index(store, name="whole", **settings)
    built: list[int] = []

    def fail_at_the_last(*job: object) -> None:
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(job[2])
        original(*job)

    original = indexing._write_segment
    monkeypatch.setattr(indexing, "_write_segment", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        build_index(store, **settings)
    assert built == [0, 1000] and not (store.path / "index.json").exists()
    with pytest.raises(UserError, match="was begun with parts=3, now it is parts=2"):
        build_index(store, resume=True, **settings | {"parts": 2})
    built.clear()
    build_index(store, resume=True, **settings)
    assert built == [2000]
    for number in range(3):
        files = [store.path / f"{name}.{number:03d}.faiss" for name in ("index", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(store.path.glob("*.part*"))


@pytest.mark.parametrize("parts", [0, 2000])
def test_numbers_of_parts_that_cannot_be_are_refused(own_store: Datastore, parts: int) -> None:
    with pytest.raises(UserError, match="must be between 1 and 1000"):
        build_index(own_store, "Flat", name="other", parts=parts)


def test_other_settings_do_not_resume(tmp_path: Path, monkeypatch) -> None:
    store = make_store(tmp_path / "s")
    monkeypatch.setattr(key_stream, "ADD_CHUNK", 500)
    monkeypatch.setattr(key_stream, "SEARCH_CHUNK", 500)
    monkeypatch.setattr(indexing, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(indexing, "measure_quality", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        build_index(store, "Flat")
    with pytest.raises(UserError, match="was begun with factory='Flat', now it is factory='IVF16,SQ8'"):
        build_index(store, "IVF16,SQ8", resume=True)


def test_a_finished_index_is_replaced_only_when_asked(own_store: Datastore) -> None:
    before = (own_store.path / "index.faiss").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        build_index(own_store, "IVF16,SQ8")
    assert (own_store.path / "index.faiss").read_bytes() == before
    build_index(own_store, "IVF16,SQ8", overwrite=True, quality_queries=0)
    assert open_index(own_store)[1]["factory"] == "IVF16,SQ8"


@pytest.mark.parametrize(
    ("factory", "above"),
    [
        ("IVF64,Flat", 32),
        ("IVF64_HNSW8,Flat", 32),
        ("PCAR8,IVF64,SQ8", 32),
        ("IVF64,RaBitQfs", 32),
        ("PCAR8,IVF64_HNSW8,RaBitQfs4", 64),
        ("IVF64,RaBitQ", 64),
    ],
)
def test_many_lists_are_placed_in_two_levels(tmp_path: Path, monkeypatch, factory: str, above: int) -> None:
    store = make_store(tmp_path / "s")
    monkeypatch.setattr(training, "TWO_LEVELS_ABOVE", above)
    monkeypatch.setattr(training, "RABITQ_IN_TWO_LEVELS_FROM", 64)
    calls = []
    monkeypatch.setattr(training, "two_level_kmeans", lambda *a, **b: calls.append(a) or two_level_kmeans(*a, **b))
    build_index(store, factory)
    index, metadata = open_index(store)
    ivf = faiss.extract_index_ivf(index)
    centroids = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    assert len(np.unique(centroids, axis=0)) == 64
    keys = store.keys.astype(np.float32)
    transformed = index.chain.at(0).apply(keys) if factory.startswith("PCAR") else keys
    # Hardly farther from its centroid, on average, than with k-means in one level.
    plain = faiss.Kmeans(transformed.shape[1], 64, seed=1)
    plain.train(transformed)
    squared = ((transformed[:, None] - centroids[None]) ** 2).sum(-1).min(1)
    assert len(calls) == 1 and squared.mean() < 1.1 * plain.assign(transformed)[0].mean()
    rows = {row["probe"]: row for row in metadata["quality"]}
    assert rows[64]["recall"] > (0.999 if factory == "IVF64,Flat" else 0.4)


@pytest.mark.parametrize("factory", ["RR16,IVF16,RaBitQfs", "IVF16,RaBitQ", "IVF16,RaBitQfs4"])
def test_rabitq_learns_nothing_but_its_lists(factory: str) -> None:
    """So that it need not be given vectors when its lists are placed."""
    vectors = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    of_all, of_one = (training.make_index(factory, 16, "l2") for _ in range(2))
    of_all.train(vectors)
    below = training.inverted_file(of_one)
    below.quantizer.add(training.inverted_file(of_all).quantizer.reconstruct_n(0, 16))
    of_one.train(vectors[:1])
    for index in (of_all, of_one):
        index.add(vectors)
    np.testing.assert_array_equal(faiss.serialize_index(of_all), faiss.serialize_index(of_one))


def test_two_levels_of_clusters_whatever_lies_where() -> None:
    rng = np.random.default_rng(0)
    one_clump_and_outliers = np.concatenate([rng.standard_normal((900, 4)) * 0.01, rng.standard_normal((9, 4)) * 100])
    few_places = np.repeat(rng.standard_normal((20, 4)), 20, axis=0)
    for vectors in (one_clump_and_outliers, few_places, rng.standard_normal((100, 4))):
        centroids = two_level_kmeans(vectors.astype(np.float32), 100, seed=0)
        assert centroids.shape == (100, 4) and np.isfinite(centroids).all()


@pytest.mark.parametrize("factory", ["IVF16,Nonsense", "PQ7", "IVF100000,Flat"])
def test_factories_that_cannot_be_are_refused(own_store: Datastore, factory: str) -> None:
    with pytest.raises(UserError):
        build_index(own_store, factory, name="other")
    assert not (own_store.path / "other.faiss").exists()


def test_nan_keys_are_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s")
    keys = np.load(store.path / "keys.npy", mmap_mode="r+")
    keys[1234, 5] = np.nan
    keys.flush()
    with pytest.raises(UserError, match="hold NaN or infinity"):
        build_index(Datastore.open(store.path, verify="never"), "Flat")


def test_an_index_of_other_keys_is_refused(tmp_path: Path, own_store: Datastore) -> None:
    other = make_store(tmp_path / "other", seed=1)
    for name in ("index.faiss", "index.json"):
        shutil.copy(own_store.path / name, other.path / name)
    with pytest.raises(UserError, match="built for other keys"):
        open_index(other)


def test_damaged_index_files_are_named(own_store: Datastore) -> None:
    file = own_store.path / "index.faiss"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="is damaged: it has .* bytes"):
        open_index(own_store)
    file.write_bytes(b"\0" * len(whole))
    with pytest.raises(UserError, match=r"index.faiss is damaged: its SHA-256 is not"):
        open_index(own_store)
    (own_store.path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        open_index(own_store)
    with pytest.raises(UserError, match="no index called 'other': it has index, rabitq"):
        open_index(own_store, "other")


def test_damaged_datastores_are_named(own_store: Datastore) -> None:
    path = own_store.path
    with pytest.raises(UserError, match="no such folder"):
        Datastore.open(path / "missing")
    keys = (path / "keys.npy").read_bytes()
    (path / "keys.npy").write_bytes(keys[:-100])
    with pytest.raises(UserError, match=r"keys\.npy has .* bytes, the manifest says"):
        Datastore.open(path)
    (path / "keys.npy").write_bytes(b"\0" * len(keys))
    with pytest.raises(UserError, match=r"keys\.npy is damaged: it is not a \.npy array"):
        Datastore.open(path)
    (path / "keys.npy").unlink()
    with pytest.raises(UserError, match=r"incomplete: keys\.npy is missing"):
        Datastore.open(path)
    change_json(path / "manifest.json", format_version=99)
    with pytest.raises(UserError, match="format version 99"):
        Datastore.open(path)
    (path / "manifest.json").write_text("not json")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Datastore.open(path)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not a datastore"):
        Datastore.open(path)


def test_pickled_arrays_are_not_loaded(own_store: Datastore) -> None:
    file = own_store.path / "values.npy"
    np.save(file, np.array([{"a": 1}] * 10, dtype=object), allow_pickle=True)
    manifest = json.loads((own_store.path / "manifest.json").read_text())
    manifest["files"]["values.npy"]["bytes"] = file.stat().st_size
    change_json(own_store.path / "manifest.json", files=manifest["files"])
    with pytest.raises(UserError, match=r"values\.npy is damaged"):
        Datastore.open(own_store.path)


def test_the_gpu_option_without_a_gpu_searches_on_the_cpu_and_says_so(pristine: Datastore, caplog) -> None:
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("this machine has a GPU")
    queries = torch.from_numpy(pristine.keys[:3].astype(np.float32))
    on_gpu = LocalRetriever(pristine, k=5, gpu=True).search(queries)
    assert "faiss sees no GPU" in caplog.text
    assert torch.equal(on_gpu[2], LocalRetriever(pristine, k=5).search(queries)[2])


@pytest.mark.parametrize("factory", ["PQ1", "IVF2,PQ1", "OPQ1_4,IVF2,PQ1,RFlat", "IDMap,PQ1"])
def test_codewords_are_trained_for_distances_alone_which_changes_none(factory: str) -> None:
    keys = np.random.default_rng(0).standard_normal((600, 4)).astype(np.float32)
    indexes = [make_index(factory, 4, "l2"), faiss.index_factory(4, factory)]
    assert not trains_order(indexes[0]) and trains_order(indexes[1])
    found = []
    for index in indexes:
        index.train(keys)
        index.add_with_ids(keys, np.arange(600)) if factory.startswith("IDMap") else index.add(keys)
        found.append(index.search(keys[:50], 20))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def trains_order(index: faiss.Index) -> bool:
    """Whether the PQ at the bottom of an index trains an order of its codewords as well."""
    while not hasattr(index, "do_polysemous_training"):
        index = faiss.downcast_index(index.base_index if hasattr(index, "base_index") else index.index)
    return index.do_polysemous_training
