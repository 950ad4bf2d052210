"""The params file: which setting wins, where it came from, and which files are refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from knn_lm_eval import Datastore, UserError, build_index
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.model.opening import Augmentation, open_augmentation
from knn_lm_eval.model.params import STORE_DEFAULT, Params, tuned_contents
from knn_lm_eval.model.settings import RetrievalSettings
from knn_lm_eval.store.index_files import index_checksums


@pytest.fixture
def mine(store: Datastore, tmp_path: Path) -> Datastore:
    shutil.copytree(store.path, tmp_path / "store")
    return Datastore.open(tmp_path / "store")


def tuned_for(store: Datastore, **conditions: object) -> dict:
    return {
        "keys_sha256": store.keys_checksum,
        "datastore": store.path.name,
        "model": store.manifest.model["pretrained"],
        "conditions": {"index": "index", "knn_sim_func": "l2", "recompute_dists": False} | conditions,
    }


def opened(store: Datastore, **arguments: Any) -> Augmentation:
    return open_augmentation(RetrievalSettings(datastore=store.path, **arguments))


def write(path: Path, store: Datastore, **settings: object) -> Path:
    Params(settings, tuned_for(store)).write(path)
    return path


def test_given_wins_over_params_over_the_stores_default_over_the_papers(mine: Datastore, tmp_path: Path) -> None:
    write(mine.path / STORE_DEFAULT, mine, k=7, knn_temp=3.0, lmbda=0.1)
    file = write(tmp_path / "tuned.json", mine, k=9, knn_temp=5.0, lmbda=0.2)

    def chosen(**arguments: object) -> list[tuple]:
        it = opened(mine, **arguments)
        return [(it.record[name], it.sources[name]) for name in ("k", "knn_temp", "lmbda")]

    assert chosen(params=file, k=5) == [(5, "given"), (5.0, "params"), (0.2, "params")]
    assert chosen(k=5) == [(5, "given"), (3.0, "store default"), (0.1, "store default")]
    assert chosen(params=False) == [(1024, "default"), (1.0, "default"), (0.25, "default")]
    (mine.path / STORE_DEFAULT).unlink()
    assert chosen() == [(1024, "default"), (1.0, "default"), (0.25, "default")]


def test_retomatons_settings_come_from_params_too(mine: Datastore, tmp_path: Path) -> None:
    file = write(tmp_path / "tuned.json", mine, k=9, knn_temp=5.0, lmbda=0.2, min_knns=math.inf, max_knns=77)
    json.loads(file.read_text(), parse_constant=pytest.fail)  # infinity is no JSON
    it = opened(mine, params=file, retomaton=True, max_knns=30)
    assert (it.automaton.settings.min_knns, it.automaton.settings.max_knns) == (math.inf, 30)
    assert (it.sources["min_knns"], it.sources["max_knns"]) == ("params", "given")
    assert "min_knns" not in opened(mine, params=file).record


def test_a_command_lines_1e3_is_a_whole_number(mine: Datastore) -> None:
    it = opened(mine, k=1e2, retomaton=True, max_knns=1e3)
    assert (repr(it.retriever.k), repr(it.automaton.settings.max_knns)) == ("100", "1000")


def test_untuned_defaults_are_named_once(mine: Datastore, tmp_path: Path, caplog) -> None:
    file = write(tmp_path / "tuned.json", mine, k=9, knn_temp=5.0, lmbda=0.2)
    with caplog.at_level(logging.WARNING):
        opened(mine, params=file)
        opened(mine, lmbda=0.2, knn_temp=3.0)
        opened(mine, lmbda=0)
        opened(mine, params=False)
        assert not caplog.messages
        opened(mine)
        (message,) = caplog.messages
    assert "untuned defaults" in message and "knn-lm-eval tune" in message


def test_other_conditions_than_those_tuned_with_are_warned_of(mine: Datastore, tmp_path: Path, caplog) -> None:
    file = write(tmp_path / "tuned.json", mine, k=9, knn_temp=5.0, lmbda=0.2)
    with caplog.at_level(logging.WARNING):
        opened(mine, params=file, recompute_dists=True)
    (message,) = caplog.messages
    assert "recompute_dists=False, now it is recompute_dists=True" in message
    caplog.clear()
    opened(mine, params=file, retomaton=True)
    (message,) = caplog.messages
    assert "tuned with no retomaton, now it is retomaton=True, duplicates=merge, no_pointer=False:" in message


def test_another_index_or_clusters_of_the_same_name_are_warned_of(mine: Datastore, tmp_path: Path, caplog) -> None:
    clusters = cluster_kmeans(mine, "c", num_clusters=5)
    contents = tuned_contents(index_checksums(mine), clusters)
    assert set(contents) == {"index", "clusters"}
    Params({"k": 5}, tuned_for(mine) | {"contents": contents}).write(tmp_path / "p.json")
    settings = {"params": tmp_path / "p.json", "retomaton": True, "clusters": "c"}
    opened(mine, **settings)
    assert "other content" not in caplog.text
    cluster_kmeans(mine, "c", num_clusters=6, overwrite=True)
    opened(mine, **settings)
    assert "tuned with other content of clusters than" in caplog.text
    build_index(mine, "IVF4,PQ8", quality_queries=0, overwrite=True)
    opened(mine, **settings)
    assert "tuned with other content of index and clusters than" in caplog.text


def test_a_flipped_bit_in_a_params_file_is_noticed(mine: Datastore, tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", mine, k=5, knn_temp=2.0)
    path.write_text(path.read_text().replace('"knn_temp": 2.0', '"knn_temp": 3.0'))
    with pytest.raises(UserError, match=r"p.json is damaged, or was changed by hand"):
        Params.read(path, mine)


def test_files_that_do_not_fit_are_refused(mine: Datastore, tmp_path: Path) -> None:
    def refuses(sentence: str, path: Path | bool) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            opened(mine, params=path)
        assert "\n" not in str(caught.value)

    good = write(tmp_path / "good.json", mine, k=9, knn_temp=5.0, lmbda=0.2)
    refuses("There is no params file", tmp_path / "none.json")
    refuses("params=True is no file", True)

    half = tmp_path / "half.json"
    half.write_text(good.read_text()[:80])
    refuses("half.json is damaged: it is not valid JSON", half)
    refuses("is not a params file", mine.path / "manifest.json")

    content = json.loads(good.read_text())
    del content["sha256"]  # of its own content: as written by hand

    def changed(**changes: object) -> Path:
        half.write_text(json.dumps(content | changes))
        return half

    other = {"keys_sha256": "0", "datastore": "other", "model": "gpt2"}
    refuses("was tuned for another datastore .other, of the model gpt2. .* tune again", changed(tuned_for=other))
    refuses("format version 2, this program reads version 1", changed(format_version=2))
    refuses("settings is None, not a JSON object; tune again", changed(settings=None))
    refuses("unknown setting 'temperature'", changed(settings={"temperature": 3}))
    refuses("settings.probe is 'many', not a finite number; tune again", changed(settings={"probe": "many"}))
    refuses("lmbda=2 is not between 0 and 1", changed(settings={"lmbda": 2}))
    refuses("unknown kind 'tree'", changed(settings={"lmbda": {"kind": "tree"}}))
    refuses("The adaptive lmbda is malformed", changed(settings={"lmbda": {"kind": "buckets", "edges": [1.0]}}))
    buckets = {"kind": "buckets", "edges": [1.0], "lmbdas": [0.5]}
    refuses("1 edges need 2 lmbdas", changed(settings={"lmbda": buckets}))
    # Half-written where the store keeps its default.
    (mine.path / STORE_DEFAULT).write_text("{")
    with pytest.raises(UserError, match="params.json is damaged"):
        opened(mine)
