"""A prompt continued twice: by the LM with retrieval, and by the LM alone, in the same way."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from knn_lm_eval.errors import UserError
from knn_lm_eval.model.generation import MixedForward
from knn_lm_eval.study.exploration import ExploredSettings, Explorer

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most probable one at temperature 0, else drawn, beginning with ``seed``."""

    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Continuations:
    """What follows a prompt.

    Attributes
    ----------
    same : what both begin with.
    with_retrieval, by_lm : how each goes on from there.
    same_tokens : how many tokens ``same`` has.
    left_out : tokens at the prompt's beginning that had no room in the window.
    """

    same: str
    with_retrieval: str
    by_lm: str
    same_tokens: int
    left_out: int


def continue_both(
    explorer: Explorer, prompt: str, settings: ExploredSettings, new_tokens: int, sampling: Sampling
) -> Continuations:
    """Continue ``prompt`` by ``new_tokens`` or up to the end of the text.

    Raises
    ------
    UserError
        Where a number is out of range.
    """
    lm = explorer.lm
    most = min(MAX_NEW_TOKENS, lm.max_length - 1)
    if not 1 <= new_tokens <= most:
        raise UserError(f"{new_tokens} new tokens are not between 1 and {most}.")
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError(f"The sampling temperature {sampling.temperature} must be at least 0; 0 is greedy.")
    tokens = (lm.tok_encode(prompt) if prompt else []) or [lm.prefix_token_id]
    room = lm.max_length - new_tokens
    prompt_ids = torch.tensor([tokens[-room:]], device=lm.language_model.device)
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}

    def continued(inside: AbstractContextManager[Any]) -> list[int]:
        devices = [prompt_ids.device] if prompt_ids.is_cuda else []
        with inside, torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(sampling.seed)
            ids = lm.model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=new_tokens,
                pad_token_id=lm.eot_token_id,
                **how,
            )
        following: list[int] = ids[0, prompt_ids.shape[1] :].tolist()
        return following

    with explorer.lock:
        augmented = MixedForward(lm.language_model, explorer.augmentation(settings))
        mixed, alone = continued(augmented), continued(nullcontext())
    same = len(os.path.commonprefix([mixed, alone]))
    decoded = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in (mixed[:same], mixed[same:], alone[same:])]
    return Continuations(decoded[0], decoded[1], decoded[2], same, max(0, len(tokens) - room))
