"""What the LM gives for every token of some texts: the queries that they ask, and how likely it finds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from knn_lm_eval.lm.reading import Reader, Reading
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.scores import Score, sum_up
from knn_lm_eval.model.scoring import PassageScorer


@dataclass
class Queries:
    """What the LM gave for every token of the texts, text by text.

    Attributes
    ----------
    queries : float32 ``[tokens, dimension]``.
    targets : int64 ``[tokens]``.
    lm_log_probs : float64 ``[tokens]``.
    texts : the number of tokens of each text, by its name.
    """

    queries: Tensor
    targets: Tensor
    lm_log_probs: Tensor
    texts: dict[str, int]


class QueryCollector(PassageScorer):
    """Keeps the query and the LM's log-probability of every token; its scores are the LM's.

    Attributes
    ----------
    parts : queries ``[tokens, dimension]``, targets and log-probabilities ``[tokens]``, batch by batch.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def score_readings(self, readings: Sequence[Reading], want_greedy: bool) -> list[list[Score]]:
        scores = []
        for reading in readings:
            rows, targets = reading.pairs()  # [tokens]
            log_probs = self.reader.target_log_probs(reading)  # [tokens]
            queries = reading.queries[rows.to(reading.queries.device)].float().cpu()  # [tokens, dimension]
            self.parts.append((queries, targets, log_probs))
            self.tokens_scored += len(targets)
            scores += sum_up(reading, log_probs)
        return scores


def collect_queries(lm: KNNHF, texts: dict[str, str]) -> Queries:
    """Let the LM read the texts, as lm-eval's perplexity tasks do."""
    collector, counts = QueryCollector(Reader(lm.language_model, lm.softmax_dtype)), {}
    with lm.scored_by(collector):
        for name, text in texts.items():
            before = collector.tokens_scored
            lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
            counts[name] = collector.tokens_scored - before
    queries, targets, log_probs = (torch.cat(part) for part in zip(*collector.parts, strict=True))
    return Queries(queries, targets, log_probs.double(), counts)
