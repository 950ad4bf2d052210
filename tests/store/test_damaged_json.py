"""Whatever stands in one of a store's JSON files, opening it works or says in one sentence what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.mutations import mutated_text

from knn_lm_eval.errors import UserError
from knn_lm_eval.make.dump_progress import dump_states, entries_done
from knn_lm_eval.model.accounting import describe_store
from knn_lm_eval.model.params import find_params
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.store.fetching import fetch_datastore
from knn_lm_eval.system.files import write_json

OLD = Path(__file__).parent / "old_store"
MUTATIONS = int(os.environ.get("KNN_LM_EVAL_MUTATIONS", "60"))


def use(folder: Path) -> None:
    """Open and use all that the folder has."""
    store = Datastore.open(folder)
    params, _ = find_params(None, store)
    assert params is not None
    params.check_conditions({})
    Clusters.open(store)
    for index in ("index", "parts"):
        retriever = LocalRetriever(store, k=4, index=index)
        retriever.find(np.zeros((1, store.dimension), dtype=np.float32))
        json.dumps(describe_store(retriever))


FILES = ("manifest.json", "index.json", "parts.json", "params.json", "clusters/kmeans/clusters.json")


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_of_a_store(name: str, tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "store")
    content = json.loads((OLD / name).read_text())
    use(tmp_path / "store")
    for seed in range(MUTATIONS):
        (tmp_path / "store" / name).write_bytes(mutated_text(content, json.dumps, seed))
        works_or_says(lambda: use(tmp_path / "store"), seed)


@pytest.mark.parametrize("name", ["progress.json", "progress.1.json"])
def test_mutated_progress_of_a_dump(name: str, tmp_path: Path) -> None:
    np.save(tmp_path / "values.npy", np.zeros(40, dtype=np.int32))
    settings = {"max_tokens": None, "windows": {"stride": 3}, "key_type": "last_ffn_input"}
    notes = {"key_module": "a.b", "fingerprint": {"key": [1.0]}, "runs_done": [[0, 5], [9, 20]]}
    content = {"settings": settings} | notes if name == "progress.json" else {"runs_done": [[20, 22], [23, 30]]}
    write_json(tmp_path / "progress.json", {"settings": settings} | notes)

    def look() -> None:
        dump_states(tmp_path)
        dump_states(tmp_path, settings).resumed()
        entries_done(tmp_path)

    look()
    for seed in range(MUTATIONS):
        (tmp_path / name).write_bytes(mutated_text(content, json.dumps, seed))
        works_or_says(look, seed)


def test_mutated_origin_of_a_fetched_store(tmp_path: Path) -> None:
    address = "http://127.0.0.1:9/store"
    write_json(tmp_path / "manifest.json", {})
    for seed in range(MUTATIONS):
        (tmp_path / "fetched.json").write_bytes(mutated_text({"addresses": [address]}, json.dumps, seed))
        works_or_says(lambda: fetch_datastore(address, tmp_path), seed)


def works_or_says(what: object, seed: int) -> None:
    """Call it; what it raises is one short sentence."""
    try:
        what()  # type: ignore[operator]
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, seed
    except Exception as error:
        raise AssertionError(f"seed {seed}") from error
