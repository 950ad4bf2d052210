"""The texts that the tests read, and a tiny random LM."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TRAIN_TEXT = "\n".join(" ".join(topics[name].split()) for name in sorted(topics)[:3])[:12000]
EVAL_TEXT = " ".join(topics[sorted(topics)[10]].split())[:600]
MAX_LENGTH = 64


def make_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A Llama of two layers with random weights; ``changes`` go to its configuration."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 400,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            # Random weights of the usual size give a nearly uniform LM, which hides mistakes.
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()
