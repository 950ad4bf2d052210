"""Evaluations that share one LM: it is loaded once, and one pass over a task's texts scores for all of them.

A pass reads the texts with one evaluation's requests and keeps every evaluation's scores. Each evaluation then runs
through lm-eval as if it were alone, and finds its scores ready. What it doesn't find (generated text, texts of
another task) it computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance

from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.reading import Passage, Reader
from knn_lm_eval.model.accounting import rounded
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.records import RecordWriter
from knn_lm_eval.model.scores import Score
from knn_lm_eval.model.scoring import LMScorer, PassageScorer
from knn_lm_eval.model.scoring_lm import ScoredText, ScoringLM


class ReadingEnds(Exception):
    """There is nothing (more) that a pass could share."""


class LoadedModel:
    """The place for a model that several LMs use: the first to need it loads it."""

    model: Any = None


class _Sharing(ScoringLM):
    """An LM that can take its model, and scores, from others; who derives from it says how it scores."""

    loaded: LoadedModel
    shared_pass: SharedPass | None = None

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        if self.loaded.model is None:
            super()._create_model(*args, **kwargs)
            self.loaded.model = self.model
        self._model: Any = self.loaded.model

    def score_passages(
        self, batches: list[list[Passage]], want_greedy: bool, following: list[Passage] | None = None
    ) -> list[list[Score]]:
        """As the scorer's ``score``, or what a shared pass made of it."""
        if self.shared_pass is None:
            return super().score_passages(batches, want_greedy, following)
        return self.shared_pass.score(self, batches, want_greedy)

    def recording(
        self, kind: str, requests: Sequence[Instance] | None, texts: Sequence[ScoredText]
    ) -> AbstractContextManager[RecordWriter | None]:
        """As ``ScoringLM``'s; while scores are made for all, nobody writes records of them."""
        if self.shared_pass is not None and self.shared_pass.reading:
            return nullcontext()
        return super().recording(kind, requests, texts)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As ``hf``'s; each evaluation generates for itself."""
        if self.shared_pass is not None and self.shared_pass.reading:
            raise ReadingEnds("generated text is each evaluation's own")
        return super().generate_until(requests, disable_tqdm)


class SharedLM(_Sharing, KNNHF):
    """A ``knn-hf`` that can take its model, and scores, from others.

    Parameters
    ----------
    loaded : where the model is, or will be.
    **kwargs : as for ``KNNHF``.
    """

    def __init__(self, loaded: LoadedModel, **kwargs: Any) -> None:
        self.loaded = loaded
        super().__init__(**kwargs)


class SharedBaseLM(_Sharing):
    """The LM alone, as lm-eval's ``hf``, for the same passes.

    Parameters
    ----------
    loaded : where the model is, or will be.
    pretrained, **kwargs : as for ``hf``.
    context_len : as for ``KNNHF``.
    """

    def __init__(self, loaded: LoadedModel, pretrained: str, context_len: int = 1, **kwargs: Any) -> None:
        self.loaded = loaded
        super().__init__(pretrained, **kwargs)
        self.context_len = context_len
        self.check_context_len()
        # Any key type will do, for nobody looks at the keys; this one every architecture has.
        model = LanguageModel(self.model, "last_ffn_output", self.mixed_precision_dtype)
        self.scorer = LMScorer(Reader(model, self.softmax_dtype))

    def get_model_info(self) -> dict[str, Any]:
        """As ``hf``'s, with what comparisons need to know."""
        return super().get_model_info() | {
            "knn": {
                "lmbda": 0.0,
                "context_len": self.context_len,
                "tokens_scored": self.scorer.tokens_scored,
                "seconds": rounded(self.scorer.seconds),
            }
        }


class SharedPass:
    """The scores of several LMs, which one of them has the others' made while it makes its own.

    Parameters
    ----------
    lms : of one model, with the same windows; those that read keys read the same ones.

    Attributes
    ----------
    reader : the LM whose requests are run first; while ``reading``, all scores are made.
    """

    def __init__(self, lms: Sequence[SharedLM | SharedBaseLM]) -> None:
        self.lms = lms
        # RetoMaton wants many passages at once; the others don't mind.
        self.reader = max(lms, key=lambda lm: lm.scorer.rows_at_once)
        self.reading = True
        # By LM: the scores, or the error that it ended with.
        self.scores: list[dict[bytes, list[Score]]] = [{} for _ in lms]
        self.errors: list[Exception | None] = [None for _ in lms]
        for lm in lms:
            lm.shared_pass = self

    def score(self, lm: _Sharing, batches: list[list[Passage]], want_greedy: bool) -> list[list[Score]]:
        """The scores of ``lm``; raises the error that it ended with while they were made."""
        number = next(number for number, other in enumerate(self.lms) if other is lm)
        keys = [_key(passage, want_greedy) for batch in batches for passage in batch]
        if self.reading:
            self._score_all(batches, keys, want_greedy)
            # The reader's own results are thrown away, so anybody's scores will do.
            for scores, error in zip(self.scores, self.errors, strict=True):
                if error is None:
                    return [scores[key] for key in keys]
            raise ReadingEnds("none of the evaluations is left")
        if (error := self.errors[number]) is not None:
            raise error
        if all(key in self.scores[number] for key in keys):
            return [self.scores[number][key] for key in keys]
        return lm.scorer.score(batches, want_greedy)

    def _score_all(self, batches: list[list[Passage]], keys: list[bytes], want_greedy: bool) -> None:
        alive = [number for number, error in enumerate(self.errors) if error is None]
        scored = score_together([self.lms[number].scorer for number in alive], batches, want_greedy)
        for number, result in zip(alive, scored, strict=True):
            if isinstance(result, Exception):
                self.errors[number] = result
            else:
                self.scores[number].update(zip(keys, result, strict=True))


def score_together(
    scorers: Sequence[PassageScorer], batches: Sequence[Sequence[Passage]], want_greedy: bool
) -> list[list[list[Score]] | Exception]:
    """Score batches by several scorers of one LM, which reads each batch once.

    All that look at keys must look at the same ones. Each scorer counts the seconds of the reading as its own, as if
    it had been alone.

    Returns
    -------
    What each scorer's ``score`` gives, or the exception that it ended with. Where memory runs out it is raised,
    so that the caller can try smaller batches.
    """
    # Of the LM alone nobody knows which key it reads.
    who_reads = next((scorer for scorer in scorers if not isinstance(scorer, LMScorer)), scorers[0])
    before = who_reads.reader.seconds["forward"]
    readings = [who_reads.reader.read(batch) for batch in batches]
    forward_seconds = who_reads.reader.seconds["forward"] - before
    results: list[list[list[Score]] | Exception] = []
    for scorer in scorers:
        if scorer is not who_reads:
            scorer.reader.also_took(forward_seconds)
        try:
            results.append(scorer.score_readings(readings, want_greedy))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever it is, the others' scores are worth having
            results.append(error)
    return results


def _key(passage: Passage, want_greedy: bool) -> bytes:
    """Names what was asked: 16 bytes, so that a long text's requests need not be kept."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in (passage.tokens, *passage.continuations, [int(want_greedy)]):
        digest.update(np.array([len(tokens), *tokens], dtype=np.int64).tobytes())
    if passage.whole is not None:  # what is left out of its neighbours depends on all of it
        digest.update(passage.whole.digest + passage.start.to_bytes(8, "little", signed=True))
    return digest.digest()
