"""Every public path with tensors runs on a pretended GPU, which refuses tensors on the wrong device, as on the CPU."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from helpers.generation_oracle import KNN, RETOMATON, encode
from helpers.pretended_gpu import PretendedGPU, pretended_gpu
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT, make_llama
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from torch import Tensor

from knn_lm_eval import KNNHF, Datastore, retrieval_augmented
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.reading import Passage, Reader
from knn_lm_eval.make.confidence import lm_log_probs
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.methods import mixture as mixing
from knn_lm_eval.methods.adaptive import FEATURES, Buckets, Gate, Weight
from knn_lm_eval.methods.mixture import Mixture
from knn_lm_eval.model.generation import MixedForward
from knn_lm_eval.model.scoring import KNNScorer, LMScorer, MixedPairs
from knn_lm_eval.search.exact import ExactSearch
from knn_lm_eval.study.grid import Grid
from knn_lm_eval.study.grid_scorer import GridScorer
from knn_lm_eval.study.inspection import inspect_text

TEXTS = [EVAL_TEXT, TRAIN_TEXT[2000:2400], "Nothing of this kind."]
GATE = Gate(
    FEATURES,
    (0.0,) * 6,
    (1.0,) * 6,
    hidden=((-0.5, 0.3, -0.2, 0.1, 0.2, 0.1), (0.4, -0.3, 0.1, 0.0, 0.1, -0.2)),
    hidden_bias=(0.1, -0.1),
    output=(1.0, 0.7),
    bias=-0.3,
)
LM_GATE = dataclasses.replace(GATE, features=FEATURES[:2], mean=(0.0,) * 2, std=(1.0,) * 2, hidden=((0.5, -0.3),) * 2)
WEIGHTS: dict[str, Weight] = {
    "buckets": Buckets((5.0, 20.0, 40.0), (0.6, 0.5, 0.3, 0.1)),
    "gate": GATE,
    "gate with a threshold": dataclasses.replace(LM_GATE, threshold=0.2),
}


def on_both(work: Callable[[str], Any]) -> tuple[Any, Any, PretendedGPU]:
    """What ``work`` gives on the CPU and on the pretended GPU, where it must have run."""
    expected = work("cpu")
    with pretended_gpu() as gpu:
        found = work("cuda")
    assert gpu.ran["aten::mm"] + gpu.ran["aten::addmm"] > 0
    return expected, found, gpu


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, of_one, number) for number, of_one in enumerate(arguments)]


def rolling(lm: KNNHF) -> list[float]:
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", *[(text,) for text in TEXTS]), disable_tqdm=True)


SETTINGS = {
    "index": {},
    "exact": {"index": "exact"},
    "exact distances": {"recompute_dists": True},
    "RetoMaton": RETOMATON,
    "RetoMaton, exact": RETOMATON | {"index": "exact", "min_knns": 5},
    "windows with context": {"context_len": 30},
    "the LM alone": {"lmbda": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_requests_of_all_kinds(clustered: Datastore, model_folder: Path, name: str) -> None:
    def work(device: str) -> tuple[list[float], list[tuple[float, bool]], list[str]]:
        settings = KNN | {"batch_size": 2, "device": device} | SETTINGS[name]
        lm = KNNHF(str(model_folder), datastore=clustered.path, **settings)
        reads_ahead = device == "cuda" and name in ("index", "exact distances", "windows with context")
        assert getattr(lm.scorer.reader, "reads_ahead", False) == reads_ahead
        pairs = [(EVAL_TEXT[:200], " and"), (EVAL_TEXT[:200], " or not"), ("The", EVAL_TEXT[50:120])]
        answers = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        asked = [(text[:100], {"max_gen_toks": 8, "until": []}) for text in TEXTS[:2]]
        generated = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
        assert lm.get_model_info()["knn"]["seconds"]["forward"] > 0
        return rolling(lm), [tuple(answer) for answer in answers], generated

    expected, found, _ = on_both(work)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    for (log_prob, greedy), (expected_log_prob, expected_greedy) in zip(found[1], expected[1], strict=True):
        assert log_prob == pytest.approx(expected_log_prob, rel=1e-4) and greedy == expected_greedy
    assert found[2] == expected[2]


@pytest.mark.parametrize("name", WEIGHTS)
def test_adaptive_weights_score_and_generate(store: Datastore, model_folder: Path, tokenizer, name: str) -> None:
    def work(device: str) -> tuple[list[float], list[list[int]]]:
        lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device=device)
        mixture = Mixture(WEIGHTS[name], 4.0)
        lm.scorer = KNNScorer(Reader(lm.language_model, reads_ahead=device == "cuda"), lm.retriever, mixture)
        scores = rolling(lm)
        if name == "gate with a threshold":
            assert 0 < lm.scorer.counts["rows_skipped"] < lm.scorer.counts["rows"]
        augmentation = dataclasses.replace(lm.augmentation, mixture=mixture)
        batch = {part: tensor.to(device) for part, tensor in encode(tokenizer).items()}
        with torch.no_grad(), MixedForward(lm.language_model, augmentation):
            return scores, lm.model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=1).tolist()

    expected, found, _ = on_both(work)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[1] == expected[1]


@pytest.mark.parametrize("want_greedy", [False, True])
def test_the_lm_alone_and_the_most_probable_tokens(store: Datastore, want_greedy: bool) -> None:
    tokens = store.values[:40].tolist()
    batch = [Passage(tokens[:30], [tokens[10:31]]), Passage(tokens[:20], [tokens[15:20] + [7], tokens[15:20] + [9]])]

    def work(device: str) -> list[tuple[float, bool]]:
        lm = LanguageModel(make_llama().to(device))
        augmentation = retrieval_augmented(lm.model, store.path, **KNN).augmentation
        scorers = LMScorer(Reader(lm)), KNNScorer(Reader(lm), augmentation.retriever, augmentation.mixture)
        scores = [of_one for scorer in scorers for some in scorer.score([batch], want_greedy) for of_one in some]
        return [(score.log_prob, score.is_greedy) for score in scores]

    expected, found, _ = on_both(work)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 1},  # one to choose from: a GPU draws other random numbers
    "beams": {"num_beams": 3, "do_sample": False},
    "a penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "in chunks": {"do_sample": False, "prefill_chunk_size": 8},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [KNN, RETOMATON, KNN | {"index": "exact"}], ids=["knn-lm", "retomaton", "exact"])
def test_generation(clustered: Datastore, tokenizer, mode: str, settings: dict) -> None:
    def work(device: str) -> tuple[list, Tensor]:
        model = make_llama().to(device)
        batch = {name: tensor.to(device) for name, tensor in encode(tokenizer).items()}
        how = MODES[mode] | {"max_new_tokens": 6, "pad_token_id": 1, "return_dict_in_generate": True}
        with retrieval_augmented(model, clustered.path, **settings):
            output = model.generate(**batch, **how)
            with torch.no_grad():
                loss = model(**batch, labels=batch["input_ids"]).loss
        return output.sequences.tolist(), loss.cpu()

    expected, found, _ = on_both(work)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_another_architecture_is_read_dumped_and_mixed(tmp_path: Path, tokenizer) -> None:
    """GPT-2, whose head and positions are not Llama's."""
    config = t.GPT2Config(vocab_size=400, n_positions=MAX_LENGTH, n_embd=32, n_layer=2, n_head=4)

    def work(device: str) -> tuple[np.ndarray, list[float]]:
        torch.manual_seed(0)
        model = t.GPT2LMHeadModel(config).eval().to(device)
        lm = CausalHFLM(model, tokenizer=tokenizer, max_length=MAX_LENGTH)
        pieces = cut_into_documents(TRAIN_TEXT[:4000].splitlines(keepends=True), "line")
        dumped = dump_datastore(lm, pieces, tmp_path / device, max_length=MAX_LENGTH)
        mixed = KNNHF(model, tokenizer=tokenizer, datastore=dumped.path, k=20, max_length=MAX_LENGTH, batch_size=2)
        return np.array(dumped.keys, np.float32), rolling(mixed)

    expected, found, _ = on_both(work)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-2, atol=1e-2)
    assert found[1] == pytest.approx(expected[1], rel=1e-3)


@pytest.mark.parametrize("sim_func", ["l2", "dot"])
@pytest.mark.parametrize("common", [0.0, 300.0])
def test_exact_search(sim_func: str, common: float) -> None:
    rng = np.random.default_rng(0)
    keys = (rng.standard_normal((5000, 24)) + common).astype(np.float16)
    queries = (keys[rng.integers(0, 5000, 70)] + rng.standard_normal((70, 24))).astype(np.float32)
    expected, found, _ = on_both(lambda device: ExactSearch(keys, sim_func, device).search(queries, 40))
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"index": "exact"}, RETOMATON], ids=["index", "exact", "retomaton"])
def test_a_grid_of_settings(clustered: Datastore, model_folder: Path, settings: dict) -> None:
    grid = Grid(k=(5, 20) if not settings.get("retomaton") else (20,), knn_temp=(1.0, 8.0), lmbda=(0.0, 0.3))

    def work(device: str) -> np.ndarray:
        lm = KNNHF(str(model_folder), datastore=clustered.path, device=device, batch_size=2, **(KNN | settings))
        scorer = GridScorer(lm, grid, 0)
        with lm.scored_by(scorer):
            rolling(lm)
        return np.array([log_prob for surface in scorer.surfaces for _, log_prob in surface.settings()])

    expected, found, _ = on_both(work)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_inspection_and_confidence(store: Datastore, model_folder: Path, tmp_path: Path) -> None:
    def work(device: str) -> tuple[list[float], np.ndarray]:
        lm = KNNHF(str(model_folder), datastore=store.path, device=device, **KNN)
        inspected = inspect_text(lm, EVAL_TEXT[:200], num_neighbours=3)
        shutil.copytree(store.path, tmp_path / device)
        copy = Datastore.open(tmp_path / device)
        kept = lm_log_probs(copy, lambda: CausalHFLM(str(model_folder), device=device))
        return [token.p for token in inspected], np.array(kept)

    expected, found, _ = on_both(work)
    assert found[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-3)


def test_an_evaluation_as_a_whole(store: Datastore, model_folder: Path, tmp_path: Path) -> None:
    """lm-eval's own evaluator, with a task file."""
    (tmp_path / "texts.jsonl").write_text('{"text": "A text of a few words."}\n')
    (tmp_path / "task.yaml").write_text(
        "task: tiny\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/texts.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )

    def work(device: str) -> float:
        lm = KNNHF(str(model_folder), datastore=store.path, device=device, **KNN)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        results = simple_evaluate(lm, tasks=["tiny"], task_manager=manager, bootstrap_iters=0)
        assert results["config"]["knn"]["seconds"]["forward"] > 0
        return results["results"]["tiny"]["word_perplexity,none"]

    expected, found, _ = on_both(work)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_batch_is_read_ahead_without_waiting_for_its_layers(store: Datastore, model_folder: Path) -> None:
    with pretended_gpu() as gpu:
        lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cuda")
        assert lm.scorer.reader.reads_ahead and lm.language_model.vocabulary_size
        reader, tokens = lm.scorer.reader, store.values[:40].tolist()
        batch = [Passage(tokens[:30], [tokens[10:31]])]
        reader.read_ahead(batch)  # where it would wait for the GPU if it needed a number
        gpu.waits.clear()
        reader.read_ahead(batch)
        # transformers itself looks at the positions before the first layer, when the GPU has little to do.
        assert len(gpu.waits) <= 1 and gpu.ran["aten::mm"] > 0
        ahead = reader._ahead
        assert ahead is not None and ahead[1].queries.isnan().all()  # they are on their way
        assert not reader.read(batch).queries.isnan().any()


MISTAKES: dict[str, tuple[Any, str, Callable]] = {
    "neighbours stay on the CPU": (
        Mixture,
        "weigh",
        lambda self, distances, values, counts, device: mixing.WeighedNeighbours(
            distances, mixing.neighbour_log_weights(distances, self.knn_temp, counts), values
        ),
    ),
    "values stay on the CPU": (
        Mixture,
        "weigh",
        lambda self, distances, values, counts, device: mixing.WeighedNeighbours(
            distances.to(device), mixing.neighbour_log_weights(distances.to(device), self.knn_temp, counts), values
        ),
    ),
    "the query is not copied": (
        torch.Tensor,
        "cpu",
        lambda self: self,
    ),
}


@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_a_planted_mistake_is_found(
    store: Datastore, model_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    with pretended_gpu():
        lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cuda")
        lm.scorer.reader.reads_ahead = False
        if name is not None:
            monkeypatch.setattr(*MISTAKES[name])
        refused = pytest.raises((RuntimeError, TypeError), match="same device|can't convert cuda:0")
        with nullcontext() if name is None else refused:
            rolling(lm)
        monkeypatch.undo()


def test_what_was_mixed_is_mixed_on_the_gpu(store: Datastore, model_folder: Path) -> None:
    """Nothing falls back to the CPU on the way: tables over the vocabulary stay where the LM is."""
    with pretended_gpu() as gpu:
        lm = KNNHF(str(model_folder), datastore=store.path, k=20, batch_size=2, device="cuda")
        assert isinstance(lm.scorer._pairs, MixedPairs)
        rolling(lm)
        for operation in ("log_softmax", "logsumexp", "logaddexp"):
            assert any(operation in name for name in gpu.ran), operation
