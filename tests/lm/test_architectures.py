"""Every decoder architecture of transformers, tiny and random: keys and logits against the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import architectures
from helpers.oracle import continuation_score, knn_lm_distributions
from helpers.places import REPO
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from knn_lm_eval import KNNHF
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.reading import Passage, Reader
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.model.scoring import LMScorer
from knn_lm_eval.search.indexing import build_index

MODELS = REPO / "docs" / "reference" / "models.md"
LENGTHS = (9, 4, 7)
ALL = [
    pytest.param(
        name, marks=pytest.mark.skipif(name not in CONFIG_MAPPING, reason=f"{name} is not in this transformers")
    )
    for name in architectures.KEY_MODULES
]
# All kinds of head: soft-capping, logit scale and offset, factorised embeddings; and all kinds of key.
SOME = [
    "bert",
    "cohere",
    "falcon_h1",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "granite",
    "llama4_text",
    "mamba",
    "mixtral",
    "opt",
    "recurrent_gemma",
]


def rows_of_tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def logits_of(model: nn.Module, row: torch.Tensor) -> torch.Tensor:
    """What the model itself says about one row alone."""
    with torch.no_grad():
        return model(row[None]).logits[0]


def check(model: nn.Module, key_module: str, tolerance: float = 1e-4) -> None:
    """Key and logits of rows of several lengths in one batch, against the model."""
    lm = LanguageModel(model)
    assert lm.key_module_name == key_module
    assert lm.has_separate_head
    received: list[torch.Tensor] = []
    handle = model.get_submodule(key_module).register_forward_pre_hook(
        lambda module, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    rows = rows_of_tokens()
    keys, hidden = lm.encode(pad(rows))
    handle.remove()
    assert torch.equal(keys, received[-1].reshape(keys.shape))
    expected = [logits_of(model, row) for row in rows]
    for i, logits in enumerate(expected):
        # Neither the other rows nor the padding may count.
        torch.testing.assert_close(lm.logits(hidden[i, : len(logits)]), logits, rtol=tolerance, atol=tolerance)
        alone = lm.encode(rows[i][None])[0][0]
        torch.testing.assert_close(keys[i, : len(logits)], alone, rtol=tolerance, atol=tolerance)
    scores = LMScorer(Reader(lm)).score([[Passage(row[:-1].tolist(), [row[-2:].tolist()]) for row in rows]], True)
    for row, logits, (score,) in zip(rows, expected, scores, strict=True):
        log_probs = torch.log_softmax(logits.float(), -1)[-3:-1]
        assert score.log_prob == pytest.approx(float(log_probs[[0, 1], row[-2:]].sum()), abs=10 * tolerance)
        assert score.is_greedy == (log_probs.argmax(-1) == row[-2:]).all()


@pytest.mark.parametrize("model_type", ALL)
def test_key_and_logits_are_the_models_own(model_type: str) -> None:
    check(architectures.build(model_type), architectures.KEY_MODULES[model_type])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "cohere", "opt", "mamba"])
def test_tied_and_untied_heads(model_type: str, tied: bool) -> None:
    model = architectures.build(model_type, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    check(model, architectures.KEY_MODULES[model_type])


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite", "opt", "gpt2", "llama"])
def test_padded_vocabularies_and_heads_that_change_logits(model_type: str) -> None:
    changes: dict[str, Any] = {
        "gemma2": {"final_logit_softcapping": 2.0},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 3.0},
        "opt": {"word_embed_proj_dim": 16},
    }.get(model_type, {})
    model = architectures.build(model_type, **changes)
    model.resize_token_embeddings(100, pad_to_multiple_of=64)
    assert LanguageModel(model).vocabulary_size == 128
    check(model, architectures.KEY_MODULES[model_type])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", SOME)
def test_16_bit_models_keep_their_keys_and_logits(model_type: str, dtype: torch.dtype) -> None:
    model = architectures.build(model_type).to(dtype)
    lm = LanguageModel(model)
    assert lm.key_module_name == architectures.KEY_MODULES[model_type] and lm.has_separate_head
    row = rows_of_tokens()[0]
    keys, hidden = lm.encode(row[None])
    assert keys.dtype == dtype
    expected = logits_of(model, row)
    torch.testing.assert_close(lm.logits(hidden[0]), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("model_type", SOME)
def test_scores_equal_hf_and_the_dense_oracle(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    """From the dump to the mixture, through lm-eval's interface."""
    sizes = {"vocab_size": 400}
    if "text_config" in architectures.CHANGES.get(model_type, {}):
        sizes = {"text_config": architectures.CHANGES[model_type]["text_config"] | sizes}
    model = architectures.build(model_type, **sizes)
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 2, "max_length": 32}
    documents = cut_into_documents(TRAIN_TEXT[:600].splitlines(keepends=True), "line")
    store = dump_datastore(CausalHFLM(model, **arguments), documents, tmp_path / "store", max_length=32)
    build_index(store, "Flat")
    assert store.manifest.key_module == architectures.KEY_MODULES[model_type]
    requests = [
        Instance("loglikelihood", {}, pair, 0)
        for pair in [("The operator module", " also defines"), ("", "A module"), (EVAL_TEXT[:90], " and then")]
    ]
    hf = HFLM(model, logits_cache=False, **arguments)
    without = KNNHF(model, datastore=store.path, lmbda=0, k=10, **arguments)
    for expected, actual in zip(hf.loglikelihood(requests), without.loglikelihood(requests), strict=True):
        assert actual[0] == pytest.approx(expected[0], abs=1e-4) and actual[1] == expected[1]

    lm = KNNHF(model, datastore=store.path, lmbda=0.4, k=10, knn_temp=5.0, **arguments)
    key_module = model.get_submodule(architectures.KEY_MODULES[model_type])
    for request, (log_prob, is_greedy) in zip(requests, lm.loglikelihood(requests), strict=True):
        context, continuation = lm._encode_pair(*request.args) if request.args[0] else ([0], lm.tok_encode("A module"))
        tokens = (context + continuation)[-33:-1]
        distributions = knn_lm_distributions(
            model, key_module, tokens, store.keys, store.values, k=10, lmbda=0.4, temperature=5.0
        )
        expected = continuation_score(distributions, continuation)
        assert log_prob == pytest.approx(expected[0], abs=1e-4) and is_greedy == expected[1]


# ------------------------------------------------------------------------------- what no table knows


class MadeUpConfig(transformers.PretrainedConfig):
    model_type = "made_up"

    def __init__(self, layout: str = "after", **kwargs: Any) -> None:
        self.layout, self.hidden_size, self.vocab_size = layout, 32, 100
        super().__init__(**kwargs)


class Mixing(nn.Module):
    """Each position reads the mean of all up to it: attention with equal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Linear(32, 32)
        self.projection = nn.Linear(32, 32)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        mean = self.values(states).cumsum(1) / torch.arange(1, states.shape[1] + 1)[:, None]
        return self.projection(mean), None


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(32, 80), nn.Linear(80, 32)

    def forward(self, *, states: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.widen(states).relu())


class MadeUpLayer(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.normalise, self.blend, self.layout = nn.LayerNorm(32), Mixing(), layout
        if layout == "bare maps":
            self.up, self.down = nn.Linear(32, 80), nn.Linear(80, 32)
        elif layout != "attention only":
            self.think = Perceptron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "beside, first":
            return x + self.think(states=self.normalise(x)) + self.blend(self.normalise(x))[0]
        if self.layout == "beside, last":
            return x + self.blend(self.normalise(x))[0] + self.think(states=self.normalise(x))
        x = x + self.blend(self.normalise(x))[0]
        if self.layout == "after":
            return x + self.think(states=self.normalise(x))
        if self.layout == "bare maps":
            return x + self.down(self.up(self.normalise(x)).relu())
        return x


class MadeUpBody(transformers.PreTrainedModel):
    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(100, 32)
        self.stages = nn.ModuleList(MadeUpLayer(config.layout) for _ in range(3))
        self.afterwards = nn.ModuleList([Perceptron()])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        x = self.words(input_ids)
        for stage in self.stages:
            x = stage(x)
        return transformers.modeling_outputs.BaseModelOutput(self.afterwards[0](states=x))


class MadeUpForCausalLM(transformers.PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "trunk"

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.trunk = MadeUpBody(config)
        self.to_words = nn.Linear(32, 100)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.words

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        logits = self.to_words(self.trunk(input_ids).last_hidden_state).tanh()
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def made_up(layout: str) -> MadeUpForCausalLM:
    torch.manual_seed(0)
    return MadeUpForCausalLM(MadeUpConfig(layout)).eval()


@pytest.mark.parametrize(
    ("layout", "block"),
    [("after", "think"), ("beside, first", "think"), ("beside, last", "think"), ("bare maps", "up")],
)
def test_an_architecture_that_no_table_names_is_understood(layout: str, block: str) -> None:
    model, key_module = made_up(layout), f"trunk.stages.2.{block}"
    lm = LanguageModel(model)
    assert lm.key_module_name == key_module and lm.has_separate_head
    received: list[torch.Tensor] = []
    model.get_submodule(key_module).register_forward_pre_hook(
        lambda module, args, kwargs: received.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    rows = rows_of_tokens()
    keys, hidden = lm.encode(pad(rows))
    assert torch.equal(keys, received[0])
    torch.testing.assert_close(lm.logits(hidden[1, :4]), logits_of(model, rows[1]))


def test_layers_without_a_feed_forward_block_give_an_error_that_lists_candidates() -> None:
    with pytest.raises(UserError, match=r"no feed-forward block is found in its last layer trunk\.stages\.2") as error:
        LanguageModel(made_up("attention only"))
    assert "key_module" in str(error.value) and "trunk.stages.2.blend.projection" in str(error.value)
    assert "stages.1" not in str(error.value)
    assert LanguageModel(made_up("attention only"), "last_ffn_output").key_module_name == "trunk.stages.2"


def test_a_model_without_a_list_of_layers_gives_an_error_that_lists_candidates() -> None:
    model = made_up("after")
    stages, model.trunk.stages = model.trunk.stages, None
    model.trunk.first, model.trunk.afterwards = stages[0], None
    model.trunk.forward = lambda input_ids: transformers.modeling_outputs.BaseModelOutput(
        model.trunk.first(model.trunk.words(input_ids))
    )
    with pytest.raises(UserError, match=r"no list of layers.*key_module.*trunk\.first\.think"):
        LanguageModel(model)
    assert LanguageModel(model, key_module="trunk.first.think").has_separate_head


@pytest.mark.parametrize("key_type", ["last_ffn_input", "last_ffn_output"])
def test_a_module_named_by_hand_gives_the_key(key_type: str) -> None:
    model = architectures.build("llama")
    name = "model.layers.0.mlp"
    received: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: received.append(args[0] if key_type == "last_ffn_input" else output)
    )
    row = rows_of_tokens()[0]
    keys, _ = LanguageModel(model, key_type, key_module=name).encode(row[None])
    assert torch.equal(keys, received[-1])
    # Names that begin in the model's body are understood as well.
    assert torch.equal(LanguageModel(model, key_type, key_module="layers.0.mlp").encode(row[None])[0], keys)


def test_a_wrong_module_name_lists_candidates() -> None:
    with pytest.raises(
        UserError, match=r"no module 'layers\.1\.ffn'.*model\.layers\.1\.mlp,.*model\.layers\.1\.mlp\.d"
    ):
        LanguageModel(architectures.build("llama"), key_module="layers.1.ffn")


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_module_that_gives_no_key_per_token_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} of LlamaForCausalLM .*not a key per token.*key_module"):
        LanguageModel(architectures.build("llama"), key_module=name)


def test_the_datastore_remembers_a_module_named_by_hand(tokenizer: Any, tmp_path: Path) -> None:
    model = architectures.build("llama", vocab_size=400)
    name = "model.layers.0.mlp"
    documents = cut_into_documents([TRAIN_TEXT[:300]], "line")
    store = dump_datastore(CausalHFLM(model, tokenizer=tokenizer), documents, tmp_path / "store", key_module=name)
    build_index(store, "Flat")
    assert store.manifest.key_module == name
    lm = KNNHF(model, tokenizer=tokenizer, datastore=store.path, k=5)
    assert lm.language_model.key_module_name == lm.settings["key_module"] == name
    with pytest.raises(UserError, match="keys are .* away"):
        KNNHF(model, tokenizer=tokenizer, datastore=store.path, k=5, key_module="model.layers.1.mlp")


# ------------------------------------------------------------------------------- models that don't fit


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_model_that_reads_both_ways_is_refused(model_type: str) -> None:
    with pytest.raises(UserError, match="is not causal.*is_decoder"):
        LanguageModel(architectures.build(model_type, is_decoder=False))


def test_keys_that_are_not_one_per_token_are_refused() -> None:
    """Gemma 3n's layers give several predictions per token, one behind the other."""
    with pytest.raises(UserError, match="which is not a key per token"):
        LanguageModel(architectures.build("gemma3n_text"), "last_ffn_output")


def test_the_documented_list_is_the_tested_one() -> None:
    assert architectures.documented_list() in MODELS.read_text(encoding="utf-8"), (
        f"The list in {MODELS} is not up to date: put in what `python tests/helpers/architectures.py` prints."
    )
