"""A name that becomes a file leaves all other files alone."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from helpers.stores import make_store

from knn_lm_eval.cli import main as cli
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.names import check_output

OUTSIDE = ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "a\nb", "a\0b"]
TAKEN = [
    *("manifest", "params", "Params", "progress", "fetched", "keys", "values", "weights", "document_starts"),
    *("lm_log_probs", "index.000", "index.faiss.part", ".hidden", "a" * 200),
]


def files(folder: Path) -> dict[str, str]:
    """The checksum of every file below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("name", [*OUTSIDE, *TAKEN])
def test_a_name_that_would_be_another_files_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    (store.path / "params.json").write_text("{}")
    before = files(tmp_path)
    for make in (
        lambda: build_index(store, "Flat", name=name, quality_queries=0),
        lambda: build_index(store, "Flat", name=name, quality_queries=0, overwrite=True),
        lambda: cluster_kmeans(store, name, num_clusters=2),
    ):
        with pytest.raises(UserError, match="cannot name (an index|clusters)"):
            make()
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_the_store_is_opened(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    with pytest.raises(UserError, match="cannot name an index"):
        LocalRetriever(store, k=2, index=name)
    with pytest.raises(UserError, match="cannot name clusters"):
        Clusters.open(store, name)


@pytest.mark.parametrize("name", ["index", "IVF16,PQ8", "a.b", "with space", "Größe", "key"])
def test_other_names_stay(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", count=200)
    build_index(store, "Flat", name=name, quality_queries=0)
    assert LocalRetriever(store, k=2, index=name).index.ntotal == 200
    assert len(cluster_kmeans(store, name, num_clusters=2)) == 2


@pytest.mark.parametrize("name", ["manifest.json", "Params.json", "keys.npy", "index.json", "index.csv", "ours.html"])
def test_an_output_that_is_a_file_of_the_store_is_refused(name: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    build_index(store, "Flat")
    build_index(store, "Flat", name="ours")
    with pytest.raises(UserError, match="would overwrite a file of the datastore"):
        check_output(store.path / name)


def test_an_output_inside_of_a_store_s_folders_is_refused_where_it_is_the_store_s(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    cluster_kmeans(store, num_clusters=4, sample=100)
    (file,) = (store.path / "clusters").rglob("*.json")
    with pytest.raises(UserError, match="would overwrite a file of the datastore"):
        check_output(file)


def test_other_outputs_may_lie_in_a_store_s_folder(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    build_index(store, "Flat")
    for output in (store.path / "tuned.json", store.path / "plots" / "index.json", tmp_path / "manifest.json"):
        check_output(output)
    check_output(tmp_path / "no folder yet" / "keys.npy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune", "--model_args", "datastore=STORE", "--tasks", "law_valid", "--output", "STORE/manifest.json"],
        ["compare", "STORE", "--report", "STORE/index.json"],
        ["compare", "STORE", "--format", "csv", "--output", "STORE/manifest.json"],
        ["speed", "--model_args", "datastore=STORE", "--text", "STORE/manifest.json", "--json", "STORE/manifest.json"],
        ["inspect_neighbours", "--model_args", "datastore=STORE", "--text", "x", "--html", "STORE/index.json"],
        ["foss_curve", "--model_args", "datastore=STORE", "--tasks", "index", "--output", "STORE"],
        ["store_sizes", "--model_args", "datastore=STORE", "--tasks", "index", "--output", "STORE"],
        [
            "compare_indexes",
            "--model_args",
            "datastore=STORE",
            "--text",
            "STORE/manifest.json",
            "--indexes",
            "index",
            "--output",
            "STORE",
        ],
    ],
)
def test_every_verb_leaves_the_store_s_files_alone(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store")
    build_index(store, "Flat")
    build_index(store, "Flat", name="indexes")
    before = files(store.path)
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("knn_lm_eval.cli.main.report_user_errors", lambda *_: None)
    level = logging.getLogger("lm_eval").level  # which speed changes
    try:
        with pytest.raises(UserError, match="would overwrite a file of the datastore"):
            cli.main([argument.replace("STORE", str(store.path)) for argument in arguments])
    finally:
        logging.getLogger("lm_eval").setLevel(level)
    assert files(store.path) == before
