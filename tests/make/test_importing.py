"""Importing published datastores: each layout against a store of our own, and files that are wrong."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers.oracle import continuation_score, knn_lm_distributions
from helpers.places import SCRIPTS
from helpers.stores import change_json
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT, make_llama
from lm_eval.api.instance import Instance

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.importing import import_datastore
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.search.faiss_index import join_parts, open_index, search, set_probe
from knn_lm_eval.search.index_retriever import LocalRetriever
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.manifest import file_record
from knn_lm_eval.study.foss_curve import CurveScorer

COUNT, DIMENSION = 1200, 32
TEXTS = [EVAL_TEXT, TRAIN_TEXT[2000:2300], "One."]


@pytest.fixture(scope="module")
def arrays(store: Datastore) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the tiny model."""
    return np.array(store.keys[:COUNT]), np.array(store.values[:COUNT])


def write_raw(path: Path, array: np.ndarray, dtype: type) -> None:
    """As the published programs write: a memory-mapped file without a header, values as a column."""
    array = array if array.ndim == 2 else array[:, None]
    file = np.memmap(path, dtype=dtype, mode="w+", shape=array.shape)
    file[:] = array
    file.flush()


def make_index(keys: np.ndarray, factory: str = "IVF8,PQ8") -> faiss.Index:
    """A trained, empty index; the published kind with keys for codewords, since k-means of so few takes seconds."""
    keys = keys.astype(np.float32)
    if factory != "IVF8,PQ8":
        index = faiss.index_factory(keys.shape[1], factory)
        index.train(keys)
        return index
    quantizer = faiss.IndexFlatL2(keys.shape[1])
    quantizer.add(keys[:8])
    index = faiss.IndexIVFPQ(quantizer, keys.shape[1], 8, 8, 8)
    residuals = (keys - keys[quantizer.search(keys, 1)[1][:, 0]])[-256:]
    codewords = residuals.reshape(256, 8, -1).transpose(1, 0, 2)
    faiss.copy_array_to_vector(np.ascontiguousarray(codewords).ravel(), index.pq.centroids)
    index.is_trained = True
    index.precompute_table()
    return index


def write_knn_transformers(folder: Path, keys: np.ndarray, values: np.ndarray, name: str = "") -> None:
    name = name or f"llama_{len(keys)}_{keys.shape[1]}"
    folder.mkdir(exist_ok=True)
    write_raw(folder / f"dstore_{name}_keys.npy", keys, np.float16)
    write_raw(folder / f"dstore_{name}_vals.npy", values, np.int32)
    index = make_index(keys)
    index.add_with_ids(keys.astype(np.float32), np.arange(len(keys)))
    faiss.write_index(index, str(folder / f"index_{name}.indexed"))


def write_limits(folder: Path, keys: np.ndarray, values: np.ndarray, cuts: list[int], absolute: bool = False) -> None:
    write_knn_transformers(folder, keys, values)
    (folder / f"index_llama_{COUNT}_{DIMENSION}.indexed").unlink()
    index = make_index(keys)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part = faiss.clone_index(index)
        ids = np.arange(start, stop) if absolute else np.arange(stop - start)
        part.add_with_ids(keys[start:stop].astype(np.float32), ids)
        faiss.write_index(part, str(folder / f"index_llama_{COUNT}_{DIMENSION}_{start}_{stop}.indexed"))


def write_fairseq(
    folder: Path,
    keys: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray | None = None,
    stem: str = "",
    key_dtype: type = np.float16,
    factory: str = "IVF8,PQ8",
) -> None:
    half = "_fp16" if key_dtype is np.float16 else ""
    stem = stem or f"dstore_size{len(keys)}_embed{keys.shape[1]}{half}"
    folder.mkdir(exist_ok=True)
    write_raw(folder / f"{stem}_keys.npy", keys, key_dtype)
    write_raw(folder / f"{stem}_vals.npy", values, np.int64)
    if weights is not None:
        write_raw(folder / f"{stem}_weights.npy", weights, np.int64)
    index = make_index(keys, factory)
    index.add(keys.astype(np.float32))
    faiss.write_index(index, str(folder / "knn.index"))


def rolling(lm: KNNHF) -> list[float]:
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    return [float(score) for score in lm.loglikelihood_rolling(requests)]


def score(store: Datastore, model_folder: Path, **settings: object) -> list[float]:
    arguments = {"k": 100, "knn_temp": 5.0, "batch_size": 3, "pretrained": str(model_folder)} | settings
    return rolling(KNNHF(datastore=store.path, **arguments))


def own_store(folder: Path, store: Datastore, index: faiss.Index) -> Datastore:
    """The same entries as one of our own stores, with that index."""
    shutil.copytree(store.path, folder)
    np.save(folder / "keys.npy", store.keys[:COUNT])
    np.save(folder / "values.npy", store.values[:COUNT])
    np.save(folder / "document_starts.npy", np.zeros(1, dtype=np.int64))
    faiss.write_index(index, str(folder / "index.faiss"))
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: file_record(folder / name) for name in manifest["files"]}
    change_json(folder / "manifest.json", count=COUNT, documents=1, files=files, derived={})
    keys, index_bytes = files["keys.npy"]["sha256"], (folder / "index.faiss").stat().st_size
    change_json(folder / "index.json", keys_sha256=keys, bytes=index_bytes, factory="IVF8,PQ8", probe=8)
    return Datastore.open(folder)


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("layout", ["knn-transformers", "knnlm-limits", "fairseq", "fairseq float32"])
def test_an_imported_store_scores_as_our_own(
    tmp_path: Path, store: Datastore, arrays: tuple, model_folder: Path, layout: str
) -> None:
    keys, values = arrays
    if layout == "knn-transformers":
        write_knn_transformers(tmp_path / "theirs", keys, values)
    elif layout == "knnlm-limits":
        write_limits(tmp_path / "theirs", keys, values, [0, 500, 1000, COUNT])
    else:
        write_fairseq(tmp_path / "theirs", keys, values, key_dtype=np.float32 if "32" in layout else np.float16)
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours", pretrained=str(model_folder))
    assert imported.manifest.source["imported"] == layout.split()[0]
    assert (imported.values == values).all() and (imported.keys == keys).all()
    assert imported.keys.dtype == (np.float32 if "32" in layout else np.float16)
    assert (tmp_path / "ours" / "keys.raw").is_symlink()

    index = make_index(keys)
    index.add(keys.astype(np.float32))
    own = own_store(tmp_path / "own", store, index)
    assert score(imported, model_folder) == pytest.approx(score(own, model_folder), rel=1e-6)
    exact = {"recompute_dists": True}
    assert score(imported, model_folder, **exact) == pytest.approx(score(own, model_folder, **exact), rel=1e-6)
    if layout == "knn-transformers":  # the pointers' distances come from the codes, which a store without keys has, too
        pointing = {"retomaton": True}
        assert score(imported, model_folder, **pointing) == pytest.approx(score(own, model_folder, **pointing))


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_in_parts_finds_what_a_whole_one_finds(tmp_path: Path, arrays: tuple, absolute: bool) -> None:
    keys, values = arrays
    write_limits(tmp_path / "theirs", keys, values, [0, 700, 1100, COUNT], absolute)
    index, metadata = open_index(import_datastore([tmp_path / "theirs"], tmp_path / "ours"))
    assert metadata["part_ids"] == ("absolute" if absolute else "relative")
    assert metadata["factory"].startswith("IVF8,PQ8") and metadata["probe"] == 8
    whole = make_index(keys)
    whole.add(keys.astype(np.float32))
    for probe in (1, 8):
        set_probe(index, probe)
        whole.nprobe = probe
        expected, actual = (
            search(whole, keys[::50].astype(np.float32), 900),
            search(index, keys[::50].astype(np.float32), 900),
        )
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
        assert [set(row) for row in actual[1]] == [set(row) for row in expected[1]]


def test_parts_of_a_flat_index_join(arrays: tuple) -> None:
    keys = arrays[0].astype(np.float32)
    parts = [faiss.IndexFlatL2(DIMENSION) for _ in range(2)]
    parts[0].add(keys[:900]), parts[1].add(keys[900:])
    assert search(join_parts(parts, True), keys[[5, 1000]], 1)[1].ravel().tolist() == [5, 1000]


def test_members_files_become_clusters(tmp_path: Path, arrays: tuple, model_folder: Path) -> None:
    keys, values = arrays
    write_knn_transformers(tmp_path / "theirs", keys, values)
    cluster = np.random.default_rng(0).integers(0, 50, COUNT)
    with open(tmp_path / "theirs" / f"members_llama_{COUNT}_{DIMENSION}_600_50.pkl", "wb") as file:
        pickle.dump(sp.csr_matrix((np.ones(COUNT, dtype=int), (cluster, np.arange(COUNT)))), file)
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    assert (Clusters.open(imported, "members").cluster_of_entry == cluster).all()
    assert all(math.isfinite(x) for x in score(imported, model_folder, retomaton=True, clusters="members"))
    assert {"clusters/members/clusters.json", "index.faiss", "index.json"} <= set(imported.manifest.derived)


def test_an_unnamed_fairseq_store_takes_its_sizes_from_the_index(tmp_path: Path, arrays: tuple) -> None:
    keys, values = arrays
    write_fairseq(tmp_path / "theirs", keys, values, stem="dstore16")
    with pytest.raises(UserError, match=r"dstore16_vals.npy does not tell its layout; give --layout"):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours", layout="fairseq")
    assert (imported.values == values).all() and (imported.keys == keys).all()
    # kNN-LM's first version: int16 values, and float32 keys where the files' sizes say so
    write_raw(tmp_path / "theirs" / "dstore16_vals.npy", values, np.int16)
    write_raw(tmp_path / "theirs" / "dstore16_keys.npy", keys, np.float32)
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "second", layout="fairseq")
    assert (imported.values == values).all() and imported.keys.dtype == np.float32
    (tmp_path / "theirs" / "knn.index").unlink()
    with pytest.raises(UserError, match="give --count and --dimension"):
        import_datastore([tmp_path / "theirs"], tmp_path / "third", layout="fairseq")
    sizes = {"count": COUNT, "dimension": DIMENSION}
    assert len(import_datastore([tmp_path / "theirs"], tmp_path / "third", layout="fairseq", **sizes)) == COUNT


def test_an_index_behind_a_dimension_reduction_is_imported(tmp_path: Path, arrays: tuple) -> None:
    keys, values = arrays
    write_fairseq(tmp_path / "theirs", keys, values, factory="PCA16,IVF8,SQ8")
    store = import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    retriever = LocalRetriever(store, k=10)
    assert retriever.probe == 8 and retriever.metadata["factory"].startswith("PCA16,IVF8,SQ8")
    assert (retriever.search(torch.from_numpy(keys[:5].astype(np.float32))).entries >= 0).all()


def test_keys_and_index_may_be_copied(tmp_path: Path, arrays: tuple) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    import_datastore([tmp_path / "theirs"], tmp_path / "ours", copy=True)
    shutil.rmtree(tmp_path / "theirs")
    assert not any(path.is_symlink() for path in (tmp_path / "ours").rglob("*"))
    assert (Datastore.open(tmp_path / "ours").keys == arrays[0]).all()
    open_index(Datastore.open(tmp_path / "ours"))


def test_the_output_may_be_the_current_folder(tmp_path: Path, arrays: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    import_datastore(["../theirs"], ".")
    assert len(Datastore.open(tmp_path / "ours")) == COUNT


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_new_index_replaces_the_link_and_not_the_published_file(
    tmp_path: Path, arrays: tuple, in_parts: bool
) -> None:
    if in_parts:
        write_limits(tmp_path / "theirs", *arrays, [0, 500, COUNT])
    else:
        write_knn_transformers(tmp_path / "theirs", *arrays)
    before = {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    with pytest.raises(UserError, match="exists already"):
        build_index(imported, "Flat", quality_queries=0)
    build_index(imported, "Flat", quality_queries=16, k=20, overwrite=True)
    assert open_index(imported)[1]["factory"] == "Flat"
    assert before == {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}


def test_documents_begin_where_one_says(tmp_path: Path, arrays: tuple) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    np.save(tmp_path / "starts.npy", [0, 70, 500])
    settings = {"document_starts": tmp_path / "starts.npy"}
    assert import_datastore([tmp_path / "theirs"], tmp_path / "a", **settings).document_starts.tolist() == [0, 70, 500]
    for wrong in ([1, 2], [0, 5, 5], [0, COUNT], [0.5], [[0]]):
        np.save(tmp_path / "starts.npy", wrong)
        with pytest.raises(UserError, match="should hold the documents' first entries"):
            import_datastore([tmp_path / "theirs"], tmp_path / "b", **settings)


# ------------------------------------------------------------------------------------------------ weights, no keys


def test_an_entry_of_weight_w_counts_as_w_copies(tmp_path: Path, arrays: tuple, model_folder: Path, store) -> None:
    keys, values = arrays[0][:300], arrays[1][:300]
    weights = np.random.default_rng(0).integers(1, 12, 300)
    stem = "dstore_merge9_size300_embed32_fp16"
    write_fairseq(tmp_path / "theirs", keys, values, weights, stem=stem, factory="Flat")
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    assert imported.manifest.source["imported"] == "efficient-knnlm"
    assert (imported.weights == weights).all()
    lm = KNNHF(str(model_folder), datastore=imported.path, k=300, knn_temp=7.0, lmbda=0.6)
    context, continuation = lm._encode_pair("The operator module", " also defines functions")
    copies = np.repeat(np.arange(300), weights)
    distributions = knn_lm_distributions(
        lm.model,
        lm.model.model.layers[-1].mlp,
        (context + continuation)[:-1],
        keys[copies],
        values[copies],
        k=len(copies),
        lmbda=0.6,
        temperature=7.0,
    )
    best = int(distributions[len(context) - 1].argmax())
    actual = lm._loglikelihood_tokens([(None, context, continuation), (None, context, [best])])
    assert actual[0][0] == pytest.approx(continuation_score(distributions, continuation)[0], abs=1e-4)
    assert actual[1][1] is True
    with lm.mixed_forward, torch.no_grad():
        log_probs = lm.model(torch.tensor([(context + continuation)[:-1]])).logits[0]
    np.testing.assert_allclose(log_probs.exp().numpy(), distributions, atol=1e-5)


def test_the_module_of_the_keys_is_recorded(tmp_path: Path, arrays: tuple, model_folder: Path) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    theirs, model = [tmp_path / "theirs"], str(model_folder)
    imported = import_datastore(theirs, tmp_path / "ours", key_module="model.layers.0.mlp", pretrained=model)
    lm = KNNHF(datastore=imported.path, k=5)
    assert lm.language_model.key_module is lm.model.model.layers[0].mlp
    with pytest.raises(UserError, match="has no module 'model.nothing'"):
        import_datastore(theirs, tmp_path / "no", key_module="model.nothing", pretrained=model)


def test_a_merged_store_is_refused_with_retomaton(tmp_path: Path, arrays: tuple, model_folder: Path) -> None:
    write_fairseq(tmp_path / "theirs", *arrays, np.ones(COUNT))
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    with pytest.raises(UserError, match="since entries were merged or left out, and RetoMaton needs it"):
        KNNHF("no-such-model", datastore=imported.path, k=5, retomaton=True)
    with pytest.raises(UserError, match="in no text order"):
        lm = KNNHF(str(model_folder), datastore=imported.path, k=5)
        CurveScorer(lm, [1], [None], AutomatonSettings(5))


def test_a_store_without_keys_searches_by_the_index(tmp_path: Path, arrays: tuple, model_folder: Path) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    with_keys = import_datastore([tmp_path / "theirs"], tmp_path / "with")
    (tmp_path / "theirs" / f"dstore_llama_{COUNT}_{DIMENSION}_keys.npy").rename(tmp_path / "elsewhere.npy")
    with pytest.raises(UserError, match=r"keys.raw \(it is a link to .*\) is missing"):
        Datastore.open(with_keys.path)
    without = import_datastore([tmp_path / "theirs"], tmp_path / "without")
    (tmp_path / "elsewhere.npy").rename(tmp_path / "theirs" / f"dstore_llama_{COUNT}_{DIMENSION}_keys.npy")
    assert without.keys is None and without.dimension == DIMENSION
    for settings in ({}, {"retomaton": True}):
        assert score(without, model_folder, **settings) == score(with_keys, model_folder, **settings)
    for purpose, use in {
        "recompute_dists=True": lambda: KNNHF("none", datastore=without.path, k=5, recompute_dists=True),
        "building an index": lambda: build_index(without, "Flat", name="other"),
    }.items():
        with pytest.raises(UserError, match=f"has no keys, which {purpose} needs"):
            use()
    assert len(cluster_kmeans(without).cluster_of_entry) == COUNT  # by what its codes stand for


def test_retomaton_without_keys_needs_an_index_with_codes(tmp_path: Path, arrays: tuple, model_folder: Path) -> None:
    write_limits(tmp_path / "theirs", *arrays, [0, 600, COUNT])
    (tmp_path / "theirs" / f"dstore_llama_{COUNT}_{DIMENSION}_keys.npy").unlink()
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    assert score(imported, model_folder, retomaton=True)  # its parts were trained together: they have codes
    other = make_index(arrays[0][::-1])
    other.add(arrays[0][600:].astype(np.float32))
    (last,) = (tmp_path / "theirs").glob(f"index_*_600_{COUNT}.indexed")
    faiss.write_index(other, str(last))
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "apart")
    with pytest.raises(UserError, match="has no keys, which RetoMaton with the index IVF8,PQ8.* needs"):
        score(imported, model_folder, retomaton=True)


# ------------------------------------------------------------------------------------------------ the model


def test_a_recorded_fingerprint_is_checked(tmp_path: Path, arrays: tuple, model_folder: Path, tokenizer) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours", pretrained=str(model_folder))
    assert KNNHF(datastore=imported.path, k=5).pretrained == str(model_folder)  # the store knows its model
    with pytest.raises(UserError, match="keys are .* away from the datastore's"):
        KNNHF(make_llama(seed=1), tokenizer=tokenizer, datastore=imported.path, k=5)


def test_without_a_fingerprint_sizes_are_compared_and_that_is_said(
    tmp_path: Path, arrays: tuple, model_folder: Path, tokenizer, caplog
) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    with pytest.raises(UserError, match="does not know its model; give pretrained=MODEL"):
        KNNHF(datastore=imported.path, k=5)
    KNNHF(str(model_folder), datastore=imported.path, k=5)
    assert caplog.text.count("only its dimension and vocabulary were compared") == 1
    with pytest.raises(UserError, match="keys have 32 numbers and those of a given LlamaForCausalLM 16"):
        KNNHF(make_llama(hidden_size=16), tokenizer=tokenizer, datastore=imported.path, k=5)
    largest = int(arrays[1].max())
    with pytest.raises(UserError, match=f"values go up to {largest} and a given LlamaForCausalLM has {largest} tokens"):
        KNNHF(make_llama(vocab_size=largest), tokenizer=tokenizer, datastore=imported.path, k=5)


def test_the_import_refuses_a_model_of_other_sizes(tmp_path: Path, arrays: tuple, caplog) -> None:
    keys, values = arrays
    write_knn_transformers(tmp_path / "theirs", keys, values)

    def refuses(sentence: str, **changes: int) -> None:
        make_llama(**changes).config.save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=sentence):
            import_datastore([tmp_path / "theirs"], tmp_path / "ours", pretrained=str(tmp_path / "model"))

    refuses("keys have 32 numbers and .*model has hidden states of 16", hidden_size=16)
    largest, entry = int(values.max()), int(np.argmax(values))
    refuses(
        f"has {largest} at entry {entry}, which is not in 0 to {largest - 1}, .*model's vocabulary", vocab_size=largest
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "theirs"]
    with pytest.raises(UserError, match="Cannot read the model --pretrained no-such-model"):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours", pretrained="no-such-model")
    # A configuration without weights: sizes are checked, no fingerprint is recorded.
    make_llama().config.save_pretrained(tmp_path / "model")
    imported = import_datastore([tmp_path / "theirs"], tmp_path / "ours", pretrained=str(tmp_path / "model"))
    assert imported.manifest.fingerprint is None and "No fingerprint is recorded" in caplog.text


# ------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("llama_1300_32", r"dstore_llama_1300_32_vals.npy has 4,800 bytes, .* it holds 1,200 entries of 1;"),
        (
            "llama_1200_24",
            r"keys.npy has 76,800 bytes, but 1,200 entries of 24 .* 1,600 entries of 24 or 1,200 entries of 32",
        ),
    ],
)
def test_a_name_with_a_wrong_size_is_told_the_right_one(
    tmp_path: Path, arrays: tuple, name: str, sentence: str
) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays, name=name)
    with pytest.raises(UserError, match=sentence):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    sizes = {"count": COUNT, "dimension": DIMENSION}
    assert len(import_datastore([tmp_path / "theirs"], tmp_path / "ours", **sizes)) == COUNT


def test_a_cut_file_is_refused(tmp_path: Path, arrays: tuple) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    keys = tmp_path / "theirs" / f"dstore_llama_{COUNT}_{DIMENSION}_keys.npy"
    keys.write_bytes(keys.read_bytes()[:-5])
    with pytest.raises(UserError, match="it holds no whole number of entries"):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    write_knn_transformers(tmp_path / "theirs", *arrays)
    index = tmp_path / "theirs" / f"index_llama_{COUNT}_{DIMENSION}.indexed"
    index.write_bytes(index.read_bytes()[:-500])
    with pytest.raises(UserError, match="is damaged: faiss cannot read it"):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours")


def test_an_index_of_another_store_is_refused(tmp_path: Path, arrays: tuple) -> None:
    keys, values = arrays
    path = tmp_path / "theirs" / f"index_llama_{COUNT}_{DIMENSION}.indexed"
    write_knn_transformers(tmp_path / "theirs", keys, values)
    for other, sentence in (
        (keys[:1000], "it holds 1,000"),
        (keys[:, :16], "1,200 vectors of 16 numbers; 1,200 of 32"),
    ):
        index = make_index(other)
        index.add(other.astype(np.float32))
        faiss.write_index(index, str(path))
        with pytest.raises(UserError, match=sentence):
            import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    path.rename(path.with_name("index_llama_77_32.indexed"))
    with pytest.raises(UserError, match="index_llama_77_32.indexed is no index of dstore_llama_1200_32_vals.npy"):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours")


def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path, arrays: tuple) -> None:
    folder = tmp_path / "theirs"

    def refuses(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            import_datastore([folder], tmp_path / "ours")
        shutil.rmtree(folder)

    def part(start: int, stop: int) -> Path:
        return folder / f"index_llama_{COUNT}_{DIMENSION}_{start}_{stop}.indexed"

    write_limits(folder, *arrays, [0, 500, 1000, COUNT])
    part(500, 1000).unlink()
    refuses("entries 500 to 999 in no part")
    write_limits(folder, *arrays, [0, 500, 1000, COUNT])
    part(1000, COUNT).unlink()
    refuses("entries 1,000 to 1,199 are in no part")
    write_limits(folder, *arrays, [0, 500, COUNT])
    write_limits(folder, *arrays, [0, 500, 1000])
    refuses("500 to 999 in two parts|500 to 1,199 in two parts")
    write_limits(folder, *arrays, [0, 500, COUNT])
    part(0, 500).rename(part(0, 600))
    part(500, COUNT).rename(part(600, COUNT))
    refuses("holds 500 vectors of 32 numbers; 600 of 32 were expected")


@pytest.mark.parametrize("number", [-100, 2**31])
def test_values_that_are_no_tokens_are_refused(tmp_path: Path, arrays: tuple, number: int) -> None:
    values = arrays[1].astype(np.int64)
    values[17] = number
    write_fairseq(tmp_path / "theirs", arrays[0], values)
    with pytest.raises(UserError, match=f"has {number:,} at entry 17"):
        import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_folders_that_hold_none_or_several_are_refused(tmp_path: Path, arrays: tuple) -> None:
    def refuses(sentence: str, *sources: Path) -> None:
        with pytest.raises(UserError, match=sentence):
            import_datastore(sources or [tmp_path / "theirs"], tmp_path / "ours")

    refuses("There is no .*theirs to import")
    (tmp_path / "theirs").mkdir()
    refuses(r"holds no datastore: a file of values, \*_vals.npy, is missing")
    write_knn_transformers(tmp_path / "theirs", *arrays)
    values = tmp_path / "theirs" / f"dstore_llama_{COUNT}_{DIMENSION}_vals.npy"
    refuses("has neither keys .* nor an index beside it", values)
    write_knn_transformers(tmp_path / "theirs", arrays[0][:500], arrays[1][:500])
    refuses(r"holds several values .*: dstore_llama_1200_32_vals.npy, dstore_llama_500_32_vals.npy; name the files")
    store = import_datastore([values, values.with_name(values.name.replace("vals", "keys"))], tmp_path / "ours")
    assert len(store) == COUNT
    refuses("ours exists already; choose another --output", values)
    assert (Datastore.open(tmp_path / "ours").values == arrays[1]).all()


def test_a_killed_import_leaves_no_store_and_can_be_repeated(tmp_path: Path, arrays: tuple, monkeypatch) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("knn_lm_eval.make.importing._import_index", killed)
        import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    (tmp_path / ".ours.lock").touch()
    (tmp_path / ".ours.unfinished").mkdir()  # what kill -9 leaves
    (tmp_path / ".ours.unfinished" / "values.npy").write_text("half")
    import_datastore([tmp_path / "theirs"], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_the_script_says_what_it_made(tmp_path: Path, arrays: tuple) -> None:
    write_knn_transformers(tmp_path / "theirs", *arrays)
    command = [sys.executable, str(SCRIPTS / "import_datastore.py"), str(tmp_path / "theirs")]
    run = subprocess.run([*command, "--output", str(tmp_path / "ours")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "1,200 entries of 32 numbers, with keys, the index index" in run.stdout
    assert "was not measured" in run.stdout and "No model's fingerprint" in run.stdout
    run = subprocess.run([*command, "--output", str(tmp_path / "ours")], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.strip().splitlines()[-1].startswith("error: ")
