"""A damaged store gives one sentence or the numbers of the whole one: changes to each of its files by the thousand.

``KNN_LM_EVAL_MUTATIONS=8000 pytest -s tests/torture/test_mutations.py`` makes so many, by ``SHARES`` of three kinds,
and prints what came of them; without the variable it is a sample.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.file_mutations import forge, forget_derived, mutate
from helpers.tiny_model import EVAL_TEXT, make_llama
from lm_eval.api.instance import Instance
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from knn_lm_eval import KNNHF, UserError
from knn_lm_eval.make.pruning import prune_greedy_merge
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.suffix_building import build_suffix_array
from knn_lm_eval.model.params import Params
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore

MUTATIONS = int(os.environ.get("KNN_LM_EVAL_MUTATIONS", "100"))
# Of all files; of all but indexes, with checksums that fit; of indexes without a checksum, which a child reads first.
SHARES = {"damaged": 0.4125, "forged": 0.4125, "index without checksum": 0.175}
SECONDS = 120.0  # after which one is said to hang
LONGEST_SENTENCE = 1500  # characters, with paths
TEXT = EVAL_TEXT[:150]
USES: dict[str, dict[str, Any]] = {
    "kNN-LM": {"index": "index"},
    "RetoMaton": {"index": "pq", "retomaton": True, "clusters": "kmeans", "min_knns": 3},
    "exact": {"index": "parts", "recompute_dists": True},
    "pruned": {"index": "index", "store": "pruned"},
    "n-grams": {"index": "index", "ngram_lmbda": 0.3},
    "lessened": {"index": "exact", "store": "lessened", "params": False},
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clustered: Datastore) -> Path:
    """A folder with a store that has all kinds of files, and a pruned one, which has weights."""
    folder = tmp_path_factory.mktemp("mutations") / "whole"
    shutil.copytree(clustered.path, folder / "store", ignore=shutil.ignore_patterns("*.codes", "index.*"))
    store = Datastore.open(folder / "store")
    build_index(store, "IVF16,RaBitQfs")
    build_index(store, "IVF16,PQ8", name="pq")
    build_suffix_array(store)
    build_index(store, "IVF16,SQ8", name="parts", parts=2, quality_queries=0)
    Params({"lmbda": 0.4, "knn_temp": 2.0, "k": 12}, {"keys_sha256": store.keys_checksum}).write(
        store.path / "params.json"
    )
    shutil.copytree(
        folder / "store", folder / "lessened", ignore=shutil.ignore_patterns("*.faiss", "*.codes", "*.scan", "suffixes")
    )
    remove_documents(folder / "lessened", [1])
    pruned = prune_greedy_merge(store, folder / "pruned", neighbours=5)
    build_index(pruned, "Flat", quality_queries=0)
    return folder


@pytest.fixture(scope="module")
def true_scores(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What each use of the whole store gives. Lays out codes, too, so that they are among the files."""
    scores = {name: outcome(folder, name, model, tokenizer) for name in USES}
    assert all(kind == "score" for kind, _ in scores.values()), scores
    return scores


def score(folder: Path, use: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[float]:
    settings = dict(USES[use])
    store = folder / settings.pop("store", "store")
    lm = KNNHF(model, tokenizer=tokenizer, datastore=store, batch_size=1, **({"k": 12} | settings))
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)


def outcome(folder: Path, use: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Any]:
    """What a child that scores a text comes to: ``score``, ``sentence``, ``traceback``, ``crash`` or ``hang``."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            logging.disable()
            torch.set_num_threads(1)
            found: tuple[str, Any] = ("score", score(folder, use, model, tokenizer))
        except UserError as error:
            found = ("sentence", str(error))
        except BaseException:
            found = ("traceback", traceback.format_exc())
        with os.fdopen(writable, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        until, answer = time.monotonic() + SECONDS, ""
        while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            if not (block := pipe.read(2**16)):
                break
            answer += block
        else:
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not answer:
        return ("hang", None) if status == -signal.SIGKILL else ("crash", status)
    kind, value = json.loads(answer)
    return kind, value


def files_in(folder: Path) -> Iterator[str]:
    """All files but locks, by their paths in the folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            yield str(path.relative_to(folder))


def state_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    stats = {name: (folder / name).stat() for name in files_in(folder)}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def restore(folder: Path, whole: Path, state: dict[str, tuple[int, int, int]]) -> None:
    """Put back what has changed; other files keep their identity, so that they are known to be verified."""
    for name, found in state_of(folder).items():
        if state.get(name) != found:
            (folder / name).unlink()
    for name in state:
        if not (folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(whole / name, folder / name)
    state.update(state_of(folder))


def uses_of(name: str) -> list[str]:
    """The uses that read a file, by its path; one of several where they read it alike."""
    if name.startswith(("pruned", "lessened")):
        return [name.split("/")[0]]
    file = name.removeprefix("store/")
    if file.startswith(("pq.", "clusters/")):
        return ["RetoMaton"]
    if file.startswith("suffixes/"):
        return ["n-grams"]
    if file.startswith(("parts.", "keys.")):
        return ["exact"]
    return ["kNN-LM"] if file.startswith(("index.", "params")) else ["kNN-LM", "RetoMaton"]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("kind", SHARES)
def test_no_crash_no_traceback_and_no_wrong_number(
    kind: str,
    part: int,
    folder: Path,
    true_scores: dict[str, Any],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """``forged`` has checksums that fit the changed file, whose numbers are then what the store says."""
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    if kind == "index without checksum":
        for manifest in place.glob("*/manifest.json"):
            forget_derived(manifest)
    whole = tmp_path / "whole"
    shutil.copytree(place, whole)
    state = state_of(place)
    names = [name for name in state if (name.endswith(".faiss") or kind != "index without checksum")]
    if kind == "forged":  # what a stranger's index can do is another matter
        names = [name for name in names if not name.endswith(".faiss")]
    rng = np.random.default_rng([part, len(kind)])
    counts: dict[str, Counter] = {name: Counter() for name in names}
    wrong = []
    for number in range(part, round(MUTATIONS * SHARES[kind]), 4):
        name = names[number // 4 % len(names)]
        original = (whole / name).read_bytes()
        what, changed = mutate(original, Path(name).suffix, rng)
        if changed == original:
            continue
        (place / name).unlink()  # so that the changed file is another one
        (place / name).write_bytes(changed)
        if kind == "forged":
            forge(place / name, place / name.split("/")[0])
        for use in uses_of(name):
            result, value = outcome(place, use, model, tokenizer)
            if result == "score" and value == true_scores[use][1]:
                result = "same"
            elif result == "score" and kind != "damaged":
                result = "its own"
            elif result == "sentence" and ("\n" in value or len(value) > LONGEST_SENTENCE):
                result = "long sentence"
            counts[name][result] += 1
            if result not in ("same", "its own", "sentence"):
                wrong.append(f"{kind} {part} {name} {use}: {what} -> {result} {value}")
        restore(place, whole, state)
    total = sum(counts.values(), Counter())
    print(f"\n{kind}, part {part}: {sum(total.values())} uses of damaged stores: {dict(total)}")
    if report := os.environ.get("KNN_LM_EVAL_MUTATIONS_REPORT"):
        Path(report).with_suffix(f".{kind.replace(' ', '_')}.{part}.json").write_text(
            json.dumps({"counts": counts, "wrong": wrong}, indent=1)
        )
    assert not wrong, f"{len(wrong)} wrong, such as:\n" + "\n".join(wrong[:5])
