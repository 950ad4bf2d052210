"""A store that version 0.1.0 wrote before its modules had rooms: today's code opens, searches and walks it.

``old_store/`` is a dump of two lines by a tiny Llama of width 8, with an exact index, one in two parts, k-means
clusters, the LM's confidence and a params file. ``old_manifests/`` has the manifests alone of the other kinds of
stores that were made of it; only the folders named in them were renamed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.slow_automaton import StoreForOracle, slow_walk

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.confidence import lm_log_probs
from knn_lm_eval.make.growing import grow_datastore
from knn_lm_eval.make.importing import import_datastore
from knn_lm_eval.make.pruning import prune_greedy_merge, prune_random
from knn_lm_eval.methods.automaton import AutomatonSettings, Walk
from knn_lm_eval.model.opening import open_automaton
from knn_lm_eval.model.params import find_params
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.manifest import Manifest, file_record
from knn_lm_eval.system.files import write_json

HERE = Path(__file__).parent
MANIFESTS = sorted((HERE / "old_manifests").glob("*.json"))


@pytest.fixture
def old(tmp_path: Path) -> Datastore:
    """A copy of the old store: searching may lay files beside it."""
    shutil.copytree(HERE / "old_store", tmp_path / "old_store")
    return Datastore.open(tmp_path / "old_store")


def test_its_files_are_as_they_were(old: Datastore) -> None:
    said = old.manifest.files | old.manifest.derived
    assert {name: file_record(old.path / name) for name in said} == said
    assert len(said) == 3 + 2 + 3 + 4 + 1  # arrays, the two indexes, clusters, confidence
    assert len(old) == 62 and old.dimension == 8 and old.in_text_order
    assert old.manifest.windows == {"max_length": 16, "stride": 12, "batch_size": 2, "prefix_token_id": 0}
    assert old.manifest.model["pretrained"] == "tiny-llama" and old.manifest.key_module == "model.layers.1.mlp"


@pytest.mark.parametrize("index", ["index", "parts"])
def test_its_indexes_are_searched(old: Datastore, index: str) -> None:
    queries = old.require_keys("this test").astype(np.float32)
    expected = ((queries[:, None] - queries[None]) ** 2).sum(-1)
    distances, entries = LocalRetriever(old, k=9, index=index).find(queries)
    nearly = 1e-5 if index == "index" else 0.2  # codes of 8 bits a number
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :9], atol=nearly)
    np.testing.assert_allclose(distances, np.take_along_axis(expected, entries, axis=1), atol=nearly)


@pytest.mark.parametrize("name", [None, "kmeans"])
def test_its_clusters_are_walked(old: Datastore, name: str | None) -> None:
    clusters = None if name is None else Clusters.open(old, name)
    how = AutomatonSettings(k=6, knn_temp=2.0, min_knns=2, max_knns=20)
    automaton, retriever = open_automaton(LocalRetriever(old, k=6), how, clusters)
    walk = Walk(np.asarray(old.keys[:30], dtype=np.float32) + 0.3, np.asarray(old.values[:30]))
    automaton.walk([walk])
    oracle = StoreForOracle(old, clusters)
    expected, searches = slow_walk(oracle, walk.queries, walk.targets.tolist(), how)
    p = [step.get(int(target), 0.0) for step, target in zip(expected, walk.targets, strict=True)]
    assert np.exp(walk.log_p_knn).tolist() == pytest.approx(p, rel=1e-4)
    assert walk.searches == searches < 30


def test_its_other_files_are_found(old: Datastore) -> None:
    def no_lm() -> None:
        raise AssertionError("the confidence is there already")

    log_probs = lm_log_probs(old, no_lm)  # type: ignore[arg-type]
    assert log_probs.shape == (62,) and (log_probs < 0).all()
    params, source = find_params(None, old)
    assert source == "store default" and params is not None
    assert params.settings == {"k": 4, "knn_temp": 2.0, "lmbda": 0.3, "probe": 1}


def test_it_is_clustered_again_to_the_same_bytes(old: Datastore) -> None:
    again = cluster_kmeans(old, "again", num_clusters=10)
    for name in ("cluster_of_entry.npy", "member_starts.npy", "members.npy"):
        assert (again.path / name).read_bytes() == (old.path / "clusters" / "kmeans" / name).read_bytes()


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_a_manifest_that_is_read_is_written_to_the_same_bytes(file: Path, tmp_path: Path) -> None:
    Manifest.of_json(json.loads(file.read_text())).write(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert len(written.pop("sha256")) == 64  # which those of that time had not
    write_json(tmp_path / "manifest.json", written)
    assert (tmp_path / "manifest.json").read_bytes() == file.read_bytes()


def without_times(manifest: Manifest) -> list[tuple[str, object]]:
    """The manifest in the order of its names, but for what differs from run to run, and where the stores lie."""
    content = manifest.to_json()
    for name in ("created", "versions", "derived"):
        content.pop(name, None)
    return json.loads(json.dumps(list(content.items())).replace("/stores/", ""))


def test_stores_made_of_it_today_say_what_they_said(old: Datastore, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    np.asarray(old.keys).tofile(tmp_path / "theirs" / "dstore_size62_embed8_fp16_keys.npy")
    np.asarray(old.values, dtype=np.int64).tofile(tmp_path / "theirs" / "dstore_size62_embed8_fp16_vals.npy")
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "imported")
    # What its model would have said, were it here.
    their = Manifest.of_json(json.loads((HERE / "old_manifests" / "imported.json").read_text()))
    replace(imported.manifest, model=their.model, fingerprint=their.fingerprint).write(imported.path)
    imported = Datastore.open(imported.path)
    made = {
        "imported": imported,
        "pruned": prune_random(old, tmp_path / "pruned", 0.5),
        "merged": prune_greedy_merge(old, tmp_path / "merged", neighbours=3),
        "imported_pruned": prune_random(imported, tmp_path / "imported_pruned", 0.5),
        "grown": grow_datastore([Datastore.open("old_store")], tmp_path / "grown", 100),
        "imported_grown": grow_datastore([imported], tmp_path / "imported_grown", 100),
    }
    for name, store in made.items():
        expected = Manifest.of_json(json.loads((HERE / "old_manifests" / f"{name}.json").read_text()))
        said = json.loads(json.dumps(without_times(store.manifest)).replace(f"{tmp_path}/", ""))
        assert said == without_times(expected), name


def test_names_of_a_later_version_are_kept(old: Datastore, tmp_path: Path) -> None:
    content = json.loads((old.path / "manifest.json").read_text())
    later = {"format": content.pop("format"), "licence": {"of": ["the text"]}, **content, "notes": None}
    later["model"]["adapter"] = "a nested one"
    write_json(old.path / "manifest.json", later)
    store = Datastore.open(old.path)
    cluster_kmeans(store, "again", num_clusters=2)
    written = json.loads((old.path / "manifest.json").read_text())
    assert list(written) == [*later, "sha256"] and written["licence"] == later["licence"] and written["notes"] is None
    assert "clusters/again/members.npy" in written["derived"]
    part = prune_random(store, tmp_path / "part", 0.5).manifest
    assert part.unknown == {"licence": {"of": ["the text"]}, "notes": None}
    assert part.model["adapter"] == "a nested one"  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "changes",
    [
        {"count": "many"},
        {"dimension": None},
        {"files": []},
        {"files": {"keys.npy": {"sha256": "0"}}},
        {"keys": {"file": "keys.raw", "dtype": "float16"}},
        {"keys": {"file": "keys.npy", "dtype": "float64"}},
        {"keys": "keys.npy"},
    ],
)
def test_a_damaged_manifest_is_named(old: Datastore, changes: dict[str, object]) -> None:
    content = json.loads((old.path / "manifest.json").read_text())
    write_json(old.path / "manifest.json", content | changes)
    with pytest.raises(UserError, match=r"manifest.json is damaged: (count|dimension|files|keys)[^;]*; copy"):
        Datastore.open(old.path)
