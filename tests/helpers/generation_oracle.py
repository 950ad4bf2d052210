"""A model's ``generate`` under the mixture, each step computed anew in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import transformers as t
from helpers.oracle import knn_distribution, lm_outputs
from helpers.slow_automaton import StoreForOracle, slow_walk
from helpers.tiny_model import TRAIN_TEXT
from transformers import PreTrainedTokenizerFast

from knn_lm_eval import Datastore
from knn_lm_eval.methods.automaton import AutomatonSettings
from knn_lm_eval.store.clusters import Clusters

K, LMBDA, TEMPERATURE, MAX_KNNS = 20, 0.5, 5.0, 40
KNN = {"k": K, "lmbda": LMBDA, "knn_temp": TEMPERATURE}
RETOMATON = KNN | {"retomaton": True, "clusters": "kmeans", "max_knns": MAX_KNNS}
# Parts of the store's own text, so that pointers are followed, and one that is not.
PROMPTS = [TRAIN_TEXT[2000:2060], TRAIN_TEXT[5000:5025], "Nothing of this kind"]


def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[str] = PROMPTS) -> dict[str, torch.Tensor]:
    """Prompts as a batch, padded on the left."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[1] * (longest - len(i)) + i for i in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids]),
    }


class Oracle:
    """A model's ``generate`` in which each step reads the whole text anew, without a cache, in float64.

    Beam search itself is transformers'; the dense search and RetoMaton's walk begin from nothing in each step.
    """

    def __init__(self, model: Any, store: Datastore, key_module: str, retomaton: bool) -> None:
        self.exact, self.generator = copy.deepcopy(model).double(), copy.deepcopy(model)
        self.generator.forward = self.forward
        self.key_module = self.exact.get_submodule(key_module)
        self.store, self.retomaton = store, retomaton
        clusters = Clusters.open(store, "kmeans") if retomaton else None
        self.slow_store = StoreForOracle(store, clusters)

    def generate(self, batch: dict[str, torch.Tensor], **settings: Any) -> Any:
        self.prompt_length = batch["input_ids"].shape[1]
        return self.generator.generate(**batch, **settings, use_cache=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        generated = input_ids.shape[1] - self.prompt_length
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            tokens = ids[mask.bool()].tolist()
            p_lm, queries = lm_outputs(self.exact, self.key_module, tokens)
            p_knn = np.zeros(p_lm.shape[1])
            if self.retomaton:
                # The walk begins where the first generated token is predicted.
                targets = [*tokens[len(tokens) - generated :], -1]
                settings = AutomatonSettings(K, TEMPERATURE, 1, MAX_KNNS, "merge")
                steps, _ = slow_walk(self.slow_store, queries[-len(targets) :], targets, settings)
                p_knn[list(steps[-1])] = list(steps[-1].values())
            else:
                keys, values = self.store.keys, self.store.values
                p_knn = knn_distribution(queries[-1], keys, values, K, TEMPERATURE, len(p_knn), False)
            rows.append(np.log((1 - LMBDA) * p_lm[-1] + LMBDA * p_knn))
        return t.modeling_outputs.CausalLMOutput(logits=torch.tensor(np.array(rows))[:, None])
