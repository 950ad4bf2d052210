"""Log-probabilities of given tokens under the kNN-LM: one forward pass, one batched search, the mixture.

Nothing here is as large as [positions, vocabulary]: logits exist for a few positions at a time, and p_kNN only
for the tokens that are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from knn_lm_eval.language_model import CausalLM
from knn_lm_eval.mixture import greedy_tokens, knn_log_prob, mix, neighbour_log_weights
from knn_lm_eval.retrieval import Retriever

# Memory for logits, and for neighbours (16 bytes each); small enough to stay near the processor's caches.
LOGITS_BYTES = 2**25
NEIGHBOURS_PER_BLOCK = 2**21


@dataclass
class Passage:
    """One forward pass: the tokens to read and the positions at its end to score.

    Attributes
    ----------
    tokens : the input ids.
    continuations : what may follow; continuation c is predicted by the last ``len(c)`` positions, so all but
        its last token are the last of ``tokens``. Several share the pass where only the last token differs,
        or where the same text is split elsewhere.
    """

    tokens: Sequence[int]
    continuations: list[list[int]] = field(default_factory=list)


class Scorer:
    """Scores passages under the mixture of an LM and a retriever.

    Parameters
    ----------
    model : the LM.
    retriever : None for the LM alone.
    lmbda : the weight of p_kNN, 0 to 1.
    knn_temp : the softmax temperature over distances.
    softmax_dtype : dtype of the LM's log-softmax; None is the logits' own, as in lm-eval's ``hf``.
    """

    def __init__(
        self,
        model: CausalLM,
        retriever: Retriever | None,
        lmbda: float,
        knn_temp: float,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.retriever = model, retriever
        self.lmbda, self.knn_temp, self.softmax_dtype = lmbda, knn_temp, softmax_dtype
        self.tokens_scored = 0
        self.seconds = {"forward": 0.0, "head": 0.0, "mixture": 0.0}

    def score(self, passages: Sequence[Passage], want_greedy: bool) -> list[list[tuple[float, bool]]]:
        """Score a batch of passages.

        Returns
        -------
        For each passage and each of its continuations: the sum of its tokens' log-probabilities (natural
        logarithm), and whether each of them is the most probable one (False where ``want_greedy`` is).
        """
        with self._timed("forward"):
            padded = pad_sequence([torch.tensor(passage.tokens) for passage in passages], batch_first=True)
            keys, hidden = self.model.encode(padded)
            lengths = [max(map(len, passage.continuations)) for passage in passages]
            scored = [slice(len(p.tokens) - n, len(p.tokens)) for p, n in zip(passages, lengths, strict=True)]
            queries = torch.cat([keys[i, rows] for i, rows in enumerate(scored)])
            hidden = torch.cat([hidden[i, rows] for i, rows in enumerate(scored)])
        # Every (row of hidden, target) pair that some continuation asks for, continuation after continuation.
        ends = torch.tensor(lengths).cumsum(0).tolist()
        asked = [(end, c) for end, p in zip(ends, passages, strict=True) for c in p.continuations]
        rows = torch.cat([torch.arange(end - len(c), end) for end, c in asked])
        targets = torch.tensor([token for _, c in asked for token in c])
        order = rows.argsort(stable=True)
        log_probs, greedy = self._score_pairs(queries, hidden, rows[order], targets[order], want_greedy)
        back = order.argsort()
        sizes = [len(c) for _, c in asked]
        results = [
            (float(log_prob.sum()), bool(is_greedy.all()))
            for log_prob, is_greedy in zip(log_probs[back].split(sizes), greedy[back].split(sizes), strict=True)
        ]
        self.tokens_scored += len(rows)
        results_left = iter(results)
        return [[next(results_left) for _ in passage.continuations] for passage in passages]

    @torch.inference_mode()
    def _score_pairs(
        self, queries: Tensor, hidden: Tensor, rows: Tensor, targets: Tensor, want_greedy: bool
    ) -> tuple[Tensor, Tensor]:
        """log p and "is the greedy token" of each (row of ``hidden``, target) pair; rows ascend."""
        log_probs, greedy = [], []
        device = hidden.device
        rows, targets = rows.to(device), targets.to(device)
        block = max(1, NEIGHBOURS_PER_BLOCK // self.retriever.k) if self.retriever else len(hidden)
        # The first chunk is one position, which tells how large the vocabulary is.
        chunk, start, block_end, weights, values = 1, 0, 0, None, None
        while start < len(hidden):
            if self.retriever and start == block_end:
                block_start, block_end = start, min(start + block, len(hidden))
                distances, values, _ = self.retriever.search(queries[block_start:block_end])
                with self._timed("mixture"):
                    weights = neighbour_log_weights(distances.to(device), self.knn_temp)
                    values = values.to(device)
            stop = min(start + chunk, block_end if self.retriever else len(hidden))
            with self._timed("head"):
                logits = self.model.logits(hidden[start:stop])
                lm_log_probs = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
                chunk = max(1, LOGITS_BYTES // (logits.shape[-1] * logits.element_size()))
                begin, end = torch.searchsorted(rows, torch.tensor([start, stop], device=device)).tolist()
                at, target = rows[begin:end] - start, targets[begin:end]
                lm_log_prob = lm_log_probs[at, target]
            with self._timed("mixture"):
                if weights is None or values is None:
                    log_probs.append(lm_log_prob)
                    if want_greedy:
                        greedy.append(lm_log_probs.argmax(dim=-1)[at] == target)
                else:
                    here = slice(start - block_start, stop - block_start)
                    knn = knn_log_prob(weights[here][at], values[here][at], target)
                    log_probs.append(mix(lm_log_prob.float(), knn, self.lmbda))
                    if want_greedy:
                        best = greedy_tokens(lm_log_probs, weights[here], values[here], self.lmbda)
                        greedy.append(best[at] == target)
            start = stop
        is_greedy = torch.cat(greedy) if want_greedy else torch.zeros(len(rows), dtype=torch.bool)
        return torch.cat(log_probs).cpu(), is_greedy.cpu()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start
