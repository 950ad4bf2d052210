"""Publishing datastores on a hub, and fetching them from there, through the hub's own client and real requests."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.hub_server import Hub, hub_server
from helpers.stores import change_json, flip_bit, let_age, make_store

from knn_lm_eval import Datastore, UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store import download, publishing
from knn_lm_eval.store.card import dataset_card, size_category
from knn_lm_eval.store.fetching import fetch_datastore, fetch_files
from knn_lm_eval.store.manifest import Manifest, file_record
from knn_lm_eval.store.publishing import prepare_push, push, push_datastore

ADDRESS = "hf://datasets/me/store"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    with hub_server(tmp_path / "hub") as hub:
        hub.patch(monkeypatch)
        yield hub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with an index and clusters."""
    store = make_store(tmp_path_factory.mktemp("stores") / "store")
    build_index(store, "IVF16,RaBitQfs")
    cluster_kmeans(store, num_clusters=20, sample=1000)
    return store.path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "store")


def own(folder: Path) -> dict[str, bytes]:
    """The files of a store, by the manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    names = ["manifest.json", *content["files"], *content["derived"]]
    return {name: (folder / name).read_bytes() for name in names}


def test_what_is_pushed_is_what_is_fetched(hub: Hub, store: Path, tmp_path: Path) -> None:
    assert push_datastore(store, "me/store", "mit") == ADDRESS
    there = hub.files("me/store")
    assert {name: there[name] for name in own(store)} == own(store)
    assert there.keys() - own(store).keys() == {"README.md", ".gitattributes"}  # no locks, no scan
    assert not hub.dataset("me/store").private
    fetched = fetch_datastore(ADDRESS, tmp_path / "fetched")
    assert own(fetched) == own(store)
    commit = hub.dataset("me/store").branches["main"]
    assert all(f"/resolve/{commit}/" in asked.path for asked in hub.asked("hub GET .*/resolve/.*npy"))
    # Again: nothing is uploaded, nothing is committed.
    hub.heal()
    push_datastore(store, "me/store", "mit")
    assert not hub.asked(" PUT ") and hub.dataset("me/store").branches["main"] == commit
