"""Several datastores in one evaluation are one datastore of all their texts, token by token."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stores import change_json, without_keys
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.model.opening import open_augmentation
from knn_lm_eval.model.settings import RetrievalSettings
from knn_lm_eval.store.choosing import sources_of
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.joined import JoinedClusters, JoinedStore
from knn_lm_eval.store.manifest import Manifest, file_record

TEXT = EVAL_TEXT[:300] + TRAIN_TEXT[300:500]
HOW = {"k": 40, "lmbda": 0.4, "knn_temp": 2.0, "batch_size": 2}


def joined(parts: list[Datastore]) -> str:
    return "+".join(str(part.path) for part in parts)


def token_log_probs(datastore: Any, text: str = TEXT, **how: Any) -> np.ndarray:
    """log p of each token of a text, one window at a time."""
    lm = KNNHF(datastore=datastore, **HOW | how)
    ids = lm.tok_encode(text)[:60]
    requests = [(("", ""), [lm.prefix_token_id, *ids[:i]], [ids[i]]) for i in range(len(ids))]
    return np.array([score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)])


def rolling(datastore: Any, **how: Any) -> float:
    lm = KNNHF(datastore=datastore, **HOW | how)
    return float(lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)[0])


@pytest.mark.parametrize("how", [{"index": "exact"}, {"index": "exact", "knn_sim_func": "dot"}, {"search_all": True}])
def test_two_stores_are_one_of_both_texts(whole: Datastore, halves: list[Datastore], how: dict) -> None:
    both = token_log_probs(joined(halves), **how)
    alone = token_log_probs(whole.path, **how | {"index": "exact"})
    np.testing.assert_allclose(both, alone, rtol=0, atol=1e-6)
    assert np.abs(both - token_log_probs(halves[0].path, **how)).max() > 0.01
    assert rolling(joined(halves), **how) == pytest.approx(rolling(whole.path, **how | {"index": "exact"}), abs=1e-4)


def test_flat_indexes_are_exact_search(whole: Datastore, halves: list[Datastore]) -> None:
    np.testing.assert_allclose(token_log_probs(joined(halves)), token_log_probs(whole.path), rtol=0, atol=1e-4)
    exact = token_log_probs(joined(halves), recompute_dists=True)
    np.testing.assert_allclose(exact, token_log_probs(whole.path), rtol=0, atol=1e-6)


def test_searches_find_the_same_entries_bit_by_bit(whole: Datastore, halves: list[Datastore]) -> None:
    queries = torch.from_numpy(np.asarray(whole.keys[::7]).astype(np.float32))
    settings = RetrievalSettings(datastore=joined(halves), index="exact", k=40, params=False)
    both = open_augmentation(settings).retriever.search(queries)
    alone = open_augmentation(replace(settings, datastore=whole.path)).retriever.search(queries)
    for of_both, of_alone in zip(both, alone, strict=True):
        assert (of_both is None and of_alone is None) or torch.equal(of_both, of_alone)


def test_the_order_of_stores_does_not_matter(halves: list[Datastore]) -> None:
    there, back = (token_log_probs(joined(parts), index="exact") for parts in (halves, halves[::-1]))
    np.testing.assert_allclose(there, back, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("how", [{"index": "exact"}, {}])
def test_retomaton_walks_as_over_one(
    whole: Datastore, halves: list[Datastore], how: dict, clustered: bool, tmp_path: Path
) -> None:
    walks = {"retomaton": True, "min_knns": 3, "max_knns": 50} | how
    alone = copy_with_clusters_of(whole, halves, tmp_path / "whole")
    if clustered:
        name = next(halves[0].path.glob("clusters/*")).name
        walks["clusters"] = name
    both = KNNHF(datastore=joined(halves), **HOW | walks)
    one = KNNHF(datastore=alone, **HOW | walks)
    request = [Instance("loglikelihood_rolling", {}, (TEXT,), 0)]
    (of_both,), (of_one,) = (lm.loglikelihood_rolling(request, disable_tqdm=True) for lm in (both, one))
    assert of_both == pytest.approx(float(of_one), abs=1e-3)
    assert of_both.num_searches == of_one.num_searches < of_both.num_tokens


def copy_with_clusters_of(whole: Datastore, halves: list[Datastore], folder: Path) -> Path:
    """A copy of the whole store with the halves' clusters, numbered through."""
    shutil.copytree(whole.path, folder)
    name = next(halves[0].path.glob("clusters/*")).name
    opened = [Clusters.open(half, name) for half in halves]
    together = JoinedClusters(JoinedStore(tuple(halves), ("law", "wiki")), opened)
    to = folder / "clusters" / name
    shutil.copytree(halves[0].path / "clusters" / name, to)
    sizes = {}
    for array in ("cluster_of_entry", "member_starts", "members"):
        np.save(to / f"{array}.npy", getattr(together, array))
        sizes[f"{array}.npy"] = (to / f"{array}.npy").stat().st_size
    change_json(
        to / "clusters.json",
        keys_sha256=whole.keys_checksum,
        num_clusters=together.num_clusters,
        entries_in_clusters=len(together.members),
        files=sizes,
    )
    return folder


def with_weights(store: Datastore, folder: Path, factor: int) -> Path:
    """A copy of a store in which every entry counts so often."""
    shutil.copytree(store.path, folder, ignore=shutil.ignore_patterns("index.*", "clusters"))
    np.save(folder / "weights.npy", np.full(len(store), factor, dtype=np.int32))
    files = store.manifest.files | {"weights.npy": file_record(folder / "weights.npy")}
    replace(store.manifest, files=files, derived={}).write(folder)
    return folder


def test_a_weight_is_as_if_the_store_held_each_entry_so_often(halves: list[Datastore], tmp_path: Path) -> None:
    counted = f"{with_weights(halves[0], tmp_path / 'law', 3)}+{halves[1].path}"
    by_counts = token_log_probs(counted, index="exact")
    by_weights = token_log_probs(joined(halves), index="exact", datastore_weights="3+1")
    np.testing.assert_array_equal(by_weights, by_counts)
    np.testing.assert_allclose(
        token_log_probs(joined(halves), index="exact", datastore_weights=[1.5, 0.5]), by_counts, rtol=0, atol=1e-6
    )
    assert np.abs(by_weights - token_log_probs(joined(halves), index="exact")).max() > 0.01


def test_removed_documents_of_one_store_do_not_count(whole: Datastore, halves: list[Datastore], tmp_path: Path) -> None:
    shutil.copytree(whole.path, tmp_path / "whole")
    shutil.copytree(halves[1].path, tmp_path / "wiki")
    documents_of_first = len(halves[0].document_starts)
    remove_documents(tmp_path / "wiki", [1])
    remove_documents(tmp_path / "whole", [documents_of_first + 1])
    parts = f"{halves[0].path}+{tmp_path / 'wiki'}"
    for how in ({"index": "exact"}, {"retomaton": True, "min_knns": 3, "index": "exact"}):
        np.testing.assert_allclose(
            token_log_probs(parts, **how), token_log_probs(tmp_path / "whole", **how), rtol=0, atol=1e-6
        )


def test_a_store_without_keys_joins_one_that_has_them(halves: list[Datastore], tmp_path: Path) -> None:
    keyless = without_keys(halves[1], tmp_path / "wiki")
    parts = f"{halves[0].path}+{keyless.path}"
    np.testing.assert_array_equal(token_log_probs(parts), token_log_probs(joined(halves)))
    with pytest.raises(UserError, match="has no keys"):
        KNNHF(datastore=parts, **HOW, index="exact")


def test_what_is_left_out_is_as_if_it_were_not_there(halves: list[Datastore]) -> None:
    alone = token_log_probs(halves[0].path)
    np.testing.assert_array_equal(token_log_probs(joined(halves), sources="law"), alone)
    np.testing.assert_array_equal(token_log_probs(joined(halves), exclude="wiki"), alone)
    np.testing.assert_array_equal(token_log_probs([str(part.path) for part in halves], exclude=["wiki"]), alone)


def test_texts_of_a_store_are_left_out_by_their_names(
    whole: Datastore, halves: list[Datastore], tmp_path: Path
) -> None:
    """The manifest knows which documents were appended with which text."""
    folder = tmp_path / "both"
    shutil.copytree(whole.path, folder)
    first, count = len(halves[0].document_starts), len(whole.document_starts)
    record = {"first": first, "stop": count, "source": {"text": "/x/wiki.txt"}, "max_tokens": None, "created": "now"}
    manifest = Manifest.read(folder)
    replace(manifest, source={"text": "/x/law.txt", "documents": "line"}, appended=[record]).write(folder)
    alone = token_log_probs(halves[0].path, index="exact")
    for how in ({"exclude": "both:wiki.txt"}, {"sources": "both:law.txt"}):
        np.testing.assert_allclose(token_log_probs(folder, **how), alone, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"has no text called 'x'; it has law\.txt, wiki\.txt"):
        KNNHF(datastore=folder, exclude="both:x")
    with pytest.raises(UserError, match="leave nothing"):
        KNNHF(datastore=folder, exclude="both:wiki.txt+both:law.txt")
    with pytest.raises(UserError, match="whole datastores only, not both:wiki.txt"):
        KNNHF(datastore=folder, exclude="both:wiki.txt", retriever="ray")


def test_results_say_what_came_from_each_store(halves: list[Datastore]) -> None:
    lm = KNNHF(datastore=joined(halves), **HOW, index="exact")
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    said = lm.get_model_info()["knn"]
    assert said["datastore"]["path"] == "law+wiki" and said["datastore_weights"] == {"law": 1.0, "wiki": 1.0}
    assert said["datastore"]["entries"] == sum(len(part) for part in halves)
    assert [one["name"] for one in said["datastore"]["stores"]] == ["law", "wiki"]
    for share in ("share_of_neighbours", "share_of_weight"):
        shares = [one[share] for one in said["datastore"]["stores"]]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) > 0
    assert said["searches"] == said["tokens_scored"]
    assert said["entries_compared"] == said["searches"] * said["datastore"]["entries"]
    heavier = KNNHF(datastore=joined(halves), **HOW, index="exact", datastore_weights="1+9")
    heavier.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    now = heavier.get_model_info()["knn"]["datastore"]["stores"]
    assert now[1]["share_of_weight"] > said["datastore"]["stores"][1]["share_of_weight"]
    assert now[1]["share_of_neighbours"] == said["datastore"]["stores"][1]["share_of_neighbours"]


def test_caches_tell_weights_and_parts_apart(halves: list[Datastore]) -> None:
    lms = [
        KNNHF(datastore=joined(halves), **HOW),
        KNNHF(datastore=joined(halves), **HOW, datastore_weights="2+1"),
        KNNHF(datastore=joined(halves), **HOW, exclude="wiki"),
        KNNHF(datastore=halves[0].path, **HOW),
    ]
    identities = [str(lm._identity()) for lm in lms]
    assert len(set(identities)) == len(lms)


def test_mistakes_get_one_sentence(halves: list[Datastore], whole: Datastore, tmp_path: Path) -> None:
    both = joined(halves)
    other = tmp_path / "other"
    shutil.copytree(halves[1].path, other)
    fingerprint = dict(halves[1].manifest.fingerprint or {}, tokenizer_sha256="0")
    replace(halves[1].manifest, fingerprint=fingerprint).write(other)
    kind = tmp_path / "kind"
    shutil.copytree(halves[1].path, kind)
    replace(halves[1].manifest, key_type="last_ffn_output").write(kind)
    cases: list[tuple[dict, str]] = [
        ({"datastore": f"{halves[0].path}+"}, "has an empty part"),
        ({"datastore": f"{halves[0].path}+{halves[0].path}"}, "names one datastore twice"),
        ({"datastore": f"{halves[0].path}+{tmp_path / 'none'}"}, "There is no datastore at"),
        ({"datastore": f"{halves[0].path}+{other}"}, "were made by different models"),
        ({"datastore": f"{halves[0].path}+{kind}"}, "cannot be searched together: the first has knn_keytype"),
        ({"datastore": both, "datastore_weights": 2}, "datastore_weights has 1 numbers for 2 datastores"),
        ({"datastore": both, "datastore_weights": "2+0"}, "should be a number above 0 for each datastore"),
        ({"datastore": both, "datastore_weights": "2+much"}, "should be a number above 0 for each datastore"),
        ({"datastore": both, "exclude": "code"}, "no part called 'code': the stores are law, wiki"),
        ({"datastore": both, "exclude": "law+wiki"}, "leave nothing of the datastore law[+]wiki"),
        ({"datastore": both, "k": 10**6}, "k=1000000 does not fit the datastore"),
        ({"datastore": both, "index": "none"}, "has no index called 'none'"),
        (
            {"datastore": both, "retomaton": True, "retriever": "ray"},
            "follows pointers in this process: leave retriever=ray out",
        ),
        ({"datastore": both, "retomaton": True, "datastore_weights": "2+1"}, "datastore_weights is for kNN-LM"),
    ]
    for given, sentence in cases:
        with pytest.raises(UserError, match=sentence) as caught:
            KNNHF(**{"k": 5} | given)
        assert "\n" not in str(caught.value)


def test_ngrams_are_refused_where_they_would_not_count_as_the_neighbours(halves: list[Datastore]) -> None:
    both = RetrievalSettings(datastore=joined(halves), ngram_lmbda=0.3, params=False)
    with pytest.raises(UserError, match="ngram_lmbda counts n-grams of several datastores alike"):
        open_augmentation(replace(both, datastore_weights="2+1"))
    text = sources_of(halves[0].manifest)[0].name
    with pytest.raises(UserError, match="ngram_lmbda leaves out whole datastores only, not law:"):
        open_augmentation(replace(both, sources=f"law:{text}+wiki"))
    with pytest.raises(UserError, match="has no suffix array"):
        open_augmentation(both)
