"""Peak memory of scoring is bounded whatever the vocabulary and the window."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRAIN_TEXT, make_llama
from transformers import PreTrainedTokenizerFast

from knn_lm_eval.documents import cut_into_documents
from knn_lm_eval.dump import dump_datastore
from knn_lm_eval.indexing import build_index
from knn_lm_eval.loading import CausalHFLM
from knn_lm_eval.paths import scripts_dir

VOCABULARY, MAX_LENGTH, BATCH_SIZE, K, ENTRIES = 256_000, 4096, 4, 1024, 4000
LIMIT = 500e6  # bytes on top of model, index and values


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through Linux's /proc")
def test_peak_memory_is_bounded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """One batch whose logits would take 17 GB, in a process of its own."""
    model, store, text = tmp_path / "model", tmp_path / "store", tmp_path / "text.txt"
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_LENGTH, "tie_word_embeddings": True}
    make_llama(**changes).save_pretrained(model)
    tokenizer.save_pretrained(model)
    documents = cut_into_documents(TRAIN_TEXT.splitlines(keepends=True), "file")
    lm = CausalHFLM(str(model), device="cpu")
    build_index(dump_datastore(lm, documents, store, max_tokens=ENTRIES), "Flat", quality_queries=0)
    text.write_text(TRAIN_TEXT * 5, encoding="utf-8")

    bench = [sys.executable, scripts_dir() / "bench.py", "--memory_of", "knn-hf", "--text", text]
    settings = {"tokens": BATCH_SIZE * MAX_LENGTH, "batch_size": BATCH_SIZE, "max_length": MAX_LENGTH}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    arguments.append(f"--model_args=pretrained={model},datastore={store},k={K}")
    process = subprocess.run([*bench, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    memory = json.loads(process.stdout)
    assert memory["peak"] - memory["loaded"] < LIMIT
