"""Memory is bounded: that of scoring whatever the vocabulary and the window, that of retrieval whatever the store."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from helpers.places import SCRIPTS
from helpers.tiny_model import TRAIN_TEXT, make_llama
from transformers import PreTrainedTokenizerFast

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.search.code_distances import ARRAYS as CODE_ARRAYS
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import FORMAT as CLUSTERS_FORMAT
from knn_lm_eval.store.manifest import FORMAT, FORMAT_VERSION, file_record
from knn_lm_eval.system.files import write_json

VOCABULARY, MAX_LENGTH, BATCH_SIZE, K, ENTRIES = 64_000, 4096, 4, 1024, 4000
LIMIT = 500e6  # bytes on top of model, index and values


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through Linux's /proc")
def test_peak_memory_is_bounded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """One batch whose logits would take 4 GB, in a process of its own."""
    model, store, text = tmp_path / "model", tmp_path / "store", tmp_path / "text.txt"
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_LENGTH, "tie_word_embeddings": True}
    make_llama(**changes).save_pretrained(model)
    tokenizer.save_pretrained(model)
    documents = cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "file")
    lm = CausalHFLM(str(model), device="cpu")
    build_index(dump_datastore(lm, documents, store, max_tokens=ENTRIES), "Flat", quality_queries=0)
    text.write_text(TRAIN_TEXT * 5, encoding="utf-8")

    bench = [sys.executable, SCRIPTS / "speed.py", "--memory_of", "knn-hf", "--text", text]
    settings = {"tokens": BATCH_SIZE * MAX_LENGTH, "batch_size": BATCH_SIZE, "max_length": MAX_LENGTH}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    arguments.append(f"--model_args=pretrained={model},datastore={store},k={K}")
    process = subprocess.run([*bench, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    memory = json.loads(process.stdout)
    assert memory["peak"] - memory["loaded"] < LIMIT


# Each array of the large store is larger than what the process may add to its own memory.
LARGE, NEAR, DIMENSION, OWN_MEMORY = 60_000_000, 3000, 16, 150_000_000
SEARCH = f"""
import resource
import sys
import numpy as np
import torch
from knn_lm_eval.model.opening import open_automaton
from knn_lm_eval.methods.automaton import AutomatonSettings, Walk
from knn_lm_eval.store.clusters import Clusters
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.search.index_retriever import LocalRetriever

def run(path, queries):
    store = Datastore.open(path, verify="never")  # checksums are not what is measured
    results = []
    for recompute in (False, True):
        retriever = LocalRetriever(store, k=50, probe=1, recompute_dists=recompute)
        found = retriever.search(torch.from_numpy(queries))
        clusters = Clusters.open(store, "large")
        automaton, _ = open_automaton(retriever, AutomatonSettings(k=50, min_knns=1, max_knns=200), clusters)
        walk = Walk(queries, found.values[:, 0].numpy())
        automaton.walk([walk])
        results += [found.distances, found.entries, walk.log_p_knn]
    return np.concatenate([np.ravel(result) for result in results])

queries = np.load(sys.argv[2])
small = run(sys.argv[1] + "/small", queries)  # loads and compiles what there is to
(data,) = [line for line in open("/proc/self/status") if line.startswith("VmData")]
limit = int(data.split()[1]) * 1024 + {OWN_MEMORY}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
np.testing.assert_array_equal(run(sys.argv[1] + "/large", queries), small)
"""


def sparse_array(path: Path, dtype: type, shape: tuple[int, ...], beginning: np.ndarray | None = None) -> None:
    """A .npy file of zeros that takes no room on the disk, but for its beginning."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if beginning is not None:
        array[: len(beginning)] = beginning


def make_large_store(folder: Path, keys: np.ndarray, index_file: bytes, count: int) -> None:
    """A store of ``count`` entries, of which the first have these keys; its index has those in its first list.

    The second list, with all the others, is of zeros and is never visited.
    """
    (folder / "clusters" / "large").mkdir(parents=True)
    (folder / "index.codes").mkdir()
    near = len(keys)
    sparse_array(folder / "keys.npy", np.float16, (count, DIMENSION), keys)
    sparse_array(folder / "values.npy", np.int32, (count,), np.arange(near) % 5)
    sparse_array(folder / "document_starts.npy", np.int64, (1,))
    shapes = {"codes": (count, DIMENSION // 8)}
    for name, dtype in CODE_ARRAYS.items():
        sparse_array(folder / "index.codes" / f"{name}.npy", dtype, shapes.get(name, (count,)))
    clusters = folder / "clusters" / "large"
    sparse_array(clusters / "cluster_of_entry.npy", np.int32, (count,), np.arange(near) // 10)
    np.save(clusters / "member_starts.npy", np.arange(count // 10 + 1, dtype=np.int64) * 10)
    sparse_array(clusters / "members.npy", np.int32, (count,), np.arange(near))

    # Entries to a header's count, and a list of the others after the first one.
    lists = index_file.index(b"ilbl") + 36
    _, code_size, per_block, block_bytes = struct.unpack("<4Q", index_file[lists - 32 : lists])
    (first,) = struct.unpack("<Q", index_file[lists : lists + 8])
    assert first == near
    first_end = lists + 16 + 8 * first + -(-first // per_block) * block_bytes
    others = count - near
    code_bytes = -(-others // per_block) * block_bytes
    with open(folder / "index.faiss", "wb") as file:
        file.write(index_file[:8] + struct.pack("<Q", count) + index_file[16:first_end])
        file.write(struct.pack("<Q", others))
        file.seek(8 * others, 1)
        file.write(struct.pack("<Q", code_bytes))
        file.truncate(file.tell() + code_bytes)
    index_bytes = (folder / "index.faiss").stat().st_size
    metadata = {"keys_sha256": "keys", "sim_func": "l2", "factory": "IVF2,RaBitQfs", "bytes": index_bytes}
    write_json(folder / "index.json", metadata)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file.stem} for file in folder.glob("*.npy")}
    # As recorded, so that files of so many bytes are not read for their checksums.
    derived = {"index.json": file_record(folder / "index.json"), "index.faiss": {"bytes": index_bytes, "sha256": "i"}}
    checksums = {name: record["sha256"] for name, record in derived.items()}
    write_json(folder / "index.codes" / "codes.json", {"keys_sha256": "keys", "index_files": checksums})
    shape = {"count": count, "dimension": DIMENSION, "derived": derived}
    write_json(folder / "manifest.json", {"format": FORMAT, "format_version": FORMAT_VERSION, **shape, "files": files})
    metadata = {"format": CLUSTERS_FORMAT, "format_version": 1, "keys_sha256": "keys", "num_clusters": count // 10}
    sizes = {file.name: file.stat().st_size for file in clusters.glob("*.npy")}
    write_json(clusters / "clusters.json", metadata | {"entries_in_clusters": count, "files": sizes})


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts a process's own memory on Linux only")
def test_retrieval_takes_no_memory_that_grows_with_the_store(tmp_path: Path) -> None:
    """kNN-LM and RetoMaton, with and without recompute_dists, in a process that may not load one array whole."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((NEAR, DIMENSION)).astype(np.float16)
    index = faiss.index_factory(DIMENSION, "IVF2,RaBitQfs")
    far = np.full((NEAR, DIMENSION), 100, dtype=np.float32) + rng.standard_normal((NEAR, DIMENSION))
    index.train(np.concatenate([keys, far]).astype(np.float32))
    centroids = np.stack([np.zeros(DIMENSION), np.full(DIMENSION, 100)]).astype(np.float32)
    index.quantizer.reset()
    index.quantizer.add(centroids)  # the list of the keys is the first
    index.add(keys.astype(np.float32))
    for name, count in (("small", 2 * NEAR), ("large", LARGE)):
        make_large_store(tmp_path / name, keys, faiss.serialize_index(index).tobytes(), count)
    np.save(tmp_path / "queries.npy", rng.standard_normal((20, DIMENSION)).astype(np.float32))
    command = [sys.executable, "-c", SEARCH, str(tmp_path), str(tmp_path / "queries.npy")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
