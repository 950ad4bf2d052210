"""The context manager: ``forward`` and ``generate`` under the mixture, against steps computed anew in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from helpers.generation_oracle import KNN, LMBDA, MAX_KNNS, PROMPTS, RETOMATON, TEMPERATURE, K, Oracle, encode
from helpers.oracle import knn_lm_distributions, lm_outputs
from helpers.slow_automaton import StoreForOracle, slow_walk
from helpers.tiny_model import MAX_LENGTH, TRAIN_TEXT, make_llama

from knn_lm_eval import Datastore, UserError, retrieval_augmented
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.model.generation import MixedForward
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.clusters import Clusters

# As in test_knn_hf: float32 rounding of squared distances, here over logits of a few units.
TOLERANCE = 2e-4

COMMON = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
SMALL = COMMON | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "gpt2": lambda: t.GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_LENGTH),
    "opt": lambda: t.OPTConfig(
        vocab_size=400,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        init_std=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
    "mistral, window of 8": lambda: t.MistralConfig(
        **SMALL, num_key_value_heads=2, sliding_window=8, max_position_embeddings=MAX_LENGTH
    ),
    "mamba": lambda: t.MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2),
}
KEY_MODULES = {
    "gpt2": "transformer.h.1.mlp",
    "opt": "model.decoder.layers.1.fc1",
    "mamba": "backbone.layers.1.mixer",
}


@pytest.fixture(scope="module")
def other_models(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Callable[[str], tuple[Any, Datastore]]:
    """Models of other architectures, each with a datastore of its own."""

    def make(name: str) -> tuple[Any, Datastore]:
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
        lm = CausalHFLM(model, tokenizer=tokenizer, device="cpu", max_length=MAX_LENGTH)
        pieces = cut_into_documents(TRAIN_TEXT[:7000].splitlines(keepends=True), "line")
        store = dump_datastore(lm, pieces, tmp_path_factory.mktemp("stores") / "store", max_length=MAX_LENGTH)
        build_index(store, "Flat")
        return model, store

    return make


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "beams": {"num_beams": 3, "do_sample": False},
}


def compare(
    model: Any, store: Datastore, batch: dict[str, torch.Tensor], key_module: str, settings: dict, mode: str
) -> tuple[Any, MixedForward]:
    how = MODES[mode] | {"max_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
    how |= {"pad_token_id": 1, "output_scores": True}
    torch.manual_seed(3)
    expected = Oracle(model, store, key_module, "retomaton" in settings).generate(batch, **how)
    torch.manual_seed(3)
    with retrieval_augmented(model, store.path, **settings) as mixed:
        actual = model.generate(**batch, **how)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    unfinished = np.ones(len(batch["input_ids"]), bool)
    for step, (logits, oracle_logits) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        if mode != "beams":
            tokens = actual.sequences[:, batch["input_ids"].shape[1] + step]
            log_probs = logits[unfinished].log_softmax(-1)
            torch.testing.assert_close(log_probs, oracle_logits[unfinished], rtol=0, atol=TOLERANCE)
            unfinished &= (tokens != 1).numpy()
    if mode == "beams":
        assert actual.sequences_scores.tolist() == pytest.approx(expected.sequences_scores.tolist(), abs=TOLERANCE)
    return actual, mixed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
def test_generation_equals_steps_computed_anew(clustered: Datastore, tokenizer, settings: dict, mode: str) -> None:
    model, batch = make_llama(), encode(tokenizer)
    actual, mixed = compare(model, clustered, batch, "model.layers.1.mlp", settings, mode)
    searches = mixed.augmentation.retriever.statistics.searches
    plain = model.generate(**batch, **MODES[mode], max_new_tokens=9, pad_token_id=1)
    assert plain.tolist() != actual.sequences.tolist()
    if mode == "beams":
        # Beams did change places: a state that stayed in its row would be another sequence's.
        assert any((beams[beams >= 0] % 3).unique().numel() > 1 for beams in actual.beam_indices)
    if settings is KNN:
        assert searches == mixed.work.counts["positions_generated"]
    else:
        assert len(PROMPTS) <= searches < mixed.work.counts["positions_generated"]


@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral, window of 8"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_other_architectures_generate_as_steps_computed_anew(other_models, tokenizer, name: str, mode: str) -> None:
    model, store = other_models(name)
    compare(model, store, encode(tokenizer), KEY_MODULES.get(name, "model.layers.1.mlp"), KNN, mode)


def test_a_state_space_model_generates_as_steps_computed_anew(other_models, tokenizer) -> None:
    model, store = other_models("mamba")
    compare(model, store, encode(tokenizer, PROMPTS[:1]), KEY_MODULES["mamba"], KNN, "greedy")


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
def test_a_batch_of_unequal_prompts_equals_each_alone(clustered: Datastore, tokenizer, settings: dict) -> None:
    model = make_llama()
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with retrieval_augmented(model, clustered.path, tokenizer=tokenizer, **settings):
        together = model.generate(**encode(tokenizer), **how)[:, -12:]
        alone = [model.generate(**encode(tokenizer, [prompt]), **how)[0, -12:] for prompt in PROMPTS]
    assert together.tolist() == torch.stack(alone).tolist()


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
@pytest.mark.parametrize(
    "variant",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"logits_to_keep": 0},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_how_generate_works_inside_does_not_matter(clustered, tokenizer, settings: dict, variant: dict) -> None:
    """Without a cache, with a static one, with logits of all positions, with several tokens checked at a time."""
    model, how = make_llama(), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    # A repetition gives prompt lookup something to propose.
    batch = encode(tokenizer, [PROMPTS[0] + PROMPTS[0]] if "prompt_lookup_num_tokens" in variant else PROMPTS)
    with retrieval_augmented(model, clustered.path, **settings):
        expected = model.generate(**batch, **how)
        assert model.generate(**batch, **how, **variant).tolist() == expected.tolist()


def test_a_later_call_of_generate_begins_a_walk_of_its_own(clustered: Datastore, tokenizer) -> None:
    model, how = make_llama(), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mixed = retrieval_augmented(model, clustered.path, **RETOMATON)
    with mixed:
        longer = model.generate(**encode(tokenizer, PROMPTS[:1]), **how)
        after_another = model.generate(longer, **how)
    with mixed:
        assert model.generate(longer, **how).tolist() == after_another.tolist()
        walks = mixed.augmentation.automaton.statistics
        before = walks.searches
        model.generate(longer, **how | {"max_new_tokens": 1})
        assert walks.searches == before + 1


# --------------------------------------------------------------------------------------- a plain forward pass


def oracle_log_probs(model: Any, store: Datastore, tokens: list[int], first: int, retomaton: bool) -> np.ndarray:
    """log p after each token from position ``first``, where RetoMaton's walk begins."""
    exact = copy.deepcopy(model).double()
    module = exact.model.layers[-1].mlp
    if not retomaton:
        arguments = {"k": K, "lmbda": LMBDA, "temperature": TEMPERATURE}
        return np.log(knn_lm_distributions(exact, module, tokens, store.keys, store.values, **arguments))[first:]
    p_lm, queries = lm_outputs(exact, module, tokens)
    slow_store = StoreForOracle(store, Clusters.open(store, "kmeans"))
    settings = AutomatonSettings(K, TEMPERATURE, 1, MAX_KNNS, "merge")
    steps, _ = slow_walk(slow_store, queries[first:], [*tokens[first + 1 :], -1], settings)
    p = (1 - LMBDA) * p_lm[first:]
    for row, step in zip(p, steps, strict=True):
        row[list(step)] += LMBDA * np.array(list(step.values()))
    return np.log(p)


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_over_windows_equals_the_oracle(clustered: Datastore, tokenizer, settings: dict, side: str) -> None:
    model, batch = make_llama(), encode(tokenizer)
    if side == "right":
        batch = {
            name: torch.stack([x.roll(-int((m == 0).sum())) for x, m in zip(x, batch["attention_mask"], strict=True)])
            for name, x in batch.items()
        }
    real = batch["attention_mask"].bool()
    with retrieval_augmented(model, clustered.path, **settings) as mixed:
        logits = model(**batch).logits
    assert logits.dtype == torch.float32 and mixed.work.counts["positions_generated"] == real.sum()
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(real.shape), rtol=0, atol=1e-5)
    for row, ids, mask in zip(logits, batch["input_ids"], real, strict=True):
        expected = oracle_log_probs(model, clustered, ids[mask].tolist(), 0, "retomaton" in settings)
        np.testing.assert_allclose(row[mask], expected, rtol=0, atol=TOLERANCE)
    # Padding is not searched: it keeps the LM's own.
    torch.testing.assert_close(logits[~real], model(**batch).logits[~real].log_softmax(-1))


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
def test_only_positions_with_logits_are_mixed(clustered: Datastore, tokenizer, settings: dict) -> None:
    model, ids = make_llama(), encode(tokenizer, PROMPTS[:1])["input_ids"]
    tokens, length = ids[0].tolist(), ids.shape[1]
    with retrieval_augmented(model, clustered.path, **settings) as mixed:
        last = model(ids, logits_to_keep=5).logits
        assert mixed.work.counts["positions_generated"] == 5
        some = model(ids, logits_to_keep=torch.tensor([2, 3, 9])).logits
        assert mixed.work.counts["positions_generated"] == 8
    expected = oracle_log_probs(model, clustered, tokens, length - 5, "retomaton" in settings)
    np.testing.assert_allclose(last[0], expected, rtol=0, atol=TOLERANCE)
    for part, stretch in ((some[0, :2], slice(2, 4)), (some[0, 2:], slice(9, 10))):
        expected = oracle_log_probs(model, clustered, tokens[: stretch.stop], stretch.start, "retomaton" in settings)
        np.testing.assert_allclose(part, expected, rtol=0, atol=TOLERANCE)


def test_the_loss_is_the_mixtures(store: Datastore, tokenizer) -> None:
    model, batch = make_llama(), encode(tokenizer)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with retrieval_augmented(model, store.path, **KNN):
        output = model(**batch, labels=labels)
        loss, logits = model(**batch, labels=labels, return_dict=False)[:2]
    targets = labels[:, 1:]
    scored = targets != -100
    log_p = output.logits[:, :-1].gather(-1, targets.clamp(min=0)[..., None])[..., 0][scored]
    assert float(output.loss) == pytest.approx(-float(log_p.mean()), rel=1e-6)
    assert float(loss) == float(output.loss) and torch.equal(logits, output.logits)


def test_small_blocks_do_not_change_results(clustered: Datastore, tokenizer, monkeypatch) -> None:
    """Memory is bounded by working in blocks of neighbours and of vocabulary tables."""
    model, batch = make_llama(), encode(tokenizer)
    for settings in (KNN, RETOMATON):
        with retrieval_augmented(model, clustered.path, **settings), monkeypatch.context() as patch:
            expected = model(**batch).logits
            patch.setattr("knn_lm_eval.model.generation.LOGITS_BYTES", 400 * 4 * 2)
            patch.setattr("knn_lm_eval.model.generation.NEIGHBOURS_PER_BLOCK", K * 5)
            torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=TOLERANCE)


def test_without_weight_it_is_the_lms_own_distribution(store: Datastore, tokenizer) -> None:
    model, batch = make_llama(), encode(tokenizer)
    with retrieval_augmented(model, store.path, **KNN | {"lmbda": 0}) as mixed:
        logits = model(**batch).logits
    assert torch.equal(logits, model(**batch).logits.log_softmax(-1))
    assert mixed.augmentation.retriever.statistics.searches == 0


def test_16_bit_models_give_32_bit_log_probabilities(store: Datastore, tokenizer) -> None:
    model, batch = make_llama().to(torch.bfloat16), encode(tokenizer)
    with retrieval_augmented(model, store.path, **KNN):
        logits = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert logits.dtype == torch.float32 and generated.shape[1] > batch["input_ids"].shape[1]
    assert float(logits.logsumexp(-1).abs().max()) < 1e-5


# -------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
def test_adapted_models_generate_under_the_mixture(clustered, tokenizer, kind: str, settings: dict) -> None:
    peft = pytest.importorskip("peft")
    config = (
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        if kind == "lora"
        else peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    torch.manual_seed(0)
    base = make_llama()
    model = peft.get_peft_model(base, config).eval()
    # The store is of the unadapted model: only that the mixture is there, and right, is looked at.
    mixed = MixedForward(
        LanguageModel(model), retrieval_augmented(make_llama(), clustered.path, **settings).augmentation
    )
    batch = encode(tokenizer, PROMPTS[:1])
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "output_logits": True}
    with mixed:
        first = mixed.work.counts["positions_generated"]
        output = model.generate(**batch, **how, return_dict_in_generate=True)
        assert mixed.work.counts["positions_generated"] - first == 6
        assert mixed.augmentation.retriever.statistics.searches <= 6
        text = output.sequences[:, :-1]
        window = model(text, attention_mask=torch.ones_like(text), logits_to_keep=6).logits[0, -6:]
    assert float(window.logsumexp(-1).abs().max()) < 1e-5
    if settings is KNN or kind == "lora":  # where embeddings are given, a plain forward pass knows no tokens
        torch.testing.assert_close(torch.cat(output.logits).log_softmax(-1), window, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------ outside of the block


def state_of(model: Any) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        name: ({k: v for k, v in vars(m).items() if k not in hooks}, {hook: dict(getattr(m, hook)) for hook in hooks})
        for name, m in model.named_modules()
    }


class Trouble(Exception):
    pass


def raise_trouble(*args: Any) -> None:
    raise Trouble


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
def test_the_model_is_as_it_was_afterwards(clustered: Datastore, tokenizer, settings: dict) -> None:
    model, batch = make_llama(), encode(tokenizer)
    before, logits, config = state_of(model), model(**batch).logits, model.generation_config.to_dict()
    mixed = retrieval_augmented(model, clustered.path, **settings)
    with mixed:
        model.generate(**batch, max_new_tokens=3, pad_token_id=1)
        assert not torch.equal(model(**batch).logits, logits)
    assert state_of(model) == before
    for trouble in (
        lambda: raise_trouble(),
        lambda: model.generate(**batch, max_new_tokens=3, pad_token_id=1, logits_processor=[raise_trouble]),
        lambda: model(input_ids="no tensor"),
    ):
        with pytest.raises((Trouble, AttributeError, ValueError, TypeError)), mixed:
            trouble()
        assert state_of(model) == before
    assert torch.equal(model(**batch).logits, logits)
    assert model.generation_config.to_dict() == config
    with mixed, pytest.raises(RuntimeError, match="inside its retrieval_augmented block already"), mixed:
        pass


def test_attributes_that_the_model_had_of_its_own_come_back(store: Datastore, tokenizer) -> None:
    """accelerate and others replace ``forward`` on the object, too."""
    model, batch = make_llama(), encode(tokenizer)
    original, calls = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = forward
    mixed = retrieval_augmented(model, store.path, **KNN)
    calls.clear()
    with mixed:
        model(**batch)
    assert model.forward is forward and len(calls) == 1


# ------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_belong_together_is_refused(store: Datastore, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keys are .* away from the datastore's"):
        retrieval_augmented(make_llama(seed=1), store.path, k=5)
    with pytest.raises(UserError, match="lmbda=2 is not between 0 and 1"):
        retrieval_augmented(make_llama(), store.path, k=5, lmbda=2)
    with pytest.raises(UserError, match="no such folder"):
        retrieval_augmented(make_llama(), tmp_path / "none")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["isn't", "Commission"])
    with pytest.raises(UserError, match="tokenizer is not this model's"):
        retrieval_augmented(make_llama(), store.path, k=5, tokenizer=other)
    with pytest.raises(TypeError, match="'lamda'"):
        retrieval_augmented(make_llama(), store.path, k=5, lamda=0.5)
    t5 = t.T5Config(vocab_size=400, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        retrieval_augmented(t.T5ForConditionalGeneration(t5), store.path)


def test_nothing_but_infinity_is_lost_with_all_weight_on_retrieval(store: Datastore, tokenizer) -> None:
    model, batch = make_llama(), encode(tokenizer)
    with retrieval_augmented(model, store.path, **KNN | {"lmbda": 1}):
        logits = model(**batch).logits[batch["attention_mask"].bool()]
    assert not logits.isnan().any() and (logits == -math.inf).any()
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(len(logits)), rtol=0, atol=1e-5)


# ------------------------------------------------------------------- what processors of logits and prefill expect

# Those of transformers' processors that see more than differences of logits, or that might.
PROCESSED = {
    "repetition penalty": {"repetition_penalty": 1.3},
    "encoder repetition penalty": {"encoder_repetition_penalty": 1.3},
    "exponential decay": {"exponential_decay_length_penalty": (2, 1.5)},
    "sequence bias": {"sequence_bias": [[[5, 6], 2.0], [[7], -3.0]]},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "typical_p": {"do_sample": True, "typical_p": 0.8},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 3e-3},
    "eta": {"do_sample": True, "eta_cutoff": 3e-3},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 6},
    "guidance": {"guidance_scale": 1.5},
    "beams with a penalty": {"num_beams": 3, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("how", PROCESSED.values(), ids=PROCESSED.keys())
def test_processors_of_logits_see_the_level_of_the_lms_logits(clustered: Datastore, tokenizer, how: dict) -> None:
    """With next to no weight of p_kNN, the text is that of the LM alone."""
    model, batch = make_llama(), encode(tokenizer)
    how = {"max_new_tokens": 12, "pad_token_id": 1} | how
    torch.manual_seed(5)
    expected = model.generate(**batch, **how)
    torch.manual_seed(5)
    with retrieval_augmented(model, clustered.path, k=K, lmbda=1e-12):
        actual = model.generate(**batch, **how)
    assert actual.tolist() == expected.tolist()


def test_a_penalty_acts_as_on_logits_of_the_mixture(clustered: Datastore, tokenizer) -> None:
    """One step by hand: the mixture's log-probabilities, lifted to the logits' level, then divided or multiplied."""
    model, batch = make_llama(), encode(tokenizer, PROMPTS[:1])
    with retrieval_augmented(model, clustered.path, **KNN):
        log_probs = model(**batch).logits[0, -1]
        output = model.generate(
            **batch,
            max_new_tokens=1,
            pad_token_id=1,
            repetition_penalty=1.7,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    expected = log_probs + model(**batch).logits[0, -1].logsumexp(-1)
    seen = batch["input_ids"][0].unique()
    expected[seen] = torch.where(expected[seen] < 0, expected[seen] * 1.7, expected[seen] / 1.7)
    torch.testing.assert_close(output.scores[0][0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("settings", [KNN, RETOMATON], ids=["knn-lm", "retomaton"])
@pytest.mark.parametrize("left", [0, 1, 3], ids=lambda left: f"last chunk of {left or 'all'}")
def test_a_prompt_read_in_chunks_is_gone_on_with_as_if_read_at_once(
    clustered: Datastore, tokenizer, settings: dict, left: int
) -> None:
    model, batch = make_llama(), encode(tokenizer, PROMPTS[:1])
    length = batch["input_ids"].shape[1]
    chunk = length - left if left else (length + 1) // 2
    how = {"max_new_tokens": 9, "pad_token_id": 1, "do_sample": False}
    with retrieval_augmented(model, clustered.path, **settings) as mixed:
        whole = model.generate(**batch, **how)
        searches = mixed.augmentation.retriever.statistics.searches
        in_chunks = model.generate(**batch, **how, prefill_chunk_size=chunk)
    assert in_chunks.tolist() == whole.tolist()
    # A search more for each chunk whose prediction nobody looks at; with transformers 4 the last is one of them.
    assert mixed.augmentation.retriever.statistics.searches - searches - searches in (1, 2)
