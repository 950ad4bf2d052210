"""Time and memory of ``knn-hf`` beside lm-eval's ``hf``, a bare faiss search and the published code, in one run."""

from __future__ import annotations

import io
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.reading import Reader
from knn_lm_eval.model.accounting import Work, retrieval_work
from knn_lm_eval.model.retomaton import RetomatonScorer
from knn_lm_eval.model.scoring import KNNScorer, PassageScorer
from knn_lm_eval.search.retriever import Found, Retriever
from knn_lm_eval.study.run import MAX_LENGTH, first_tokens, load_knn_hf
from knn_lm_eval.system.memory import resident_bytes
from knn_lm_eval.system.timing import counting_by

# Arguments of hf that change what it computes; the others only say how the model is loaded.
SHARED_ARGUMENTS = ("add_bos_token", "prefix_token_id", "softmax_dtype", "mixed_precision_dtype")
HF, SEARCH, OURS, PUBLISHED = "hf", "bare search", "knn-hf", "knn-transformers"
OUR_RETOMATON, PUBLISHED_RETOMATON = f"{OURS} RetoMaton", f"{PUBLISHED} RetoMaton"
# The stages of ours that are the LM's own, or lm-eval's.
NOT_RETRIEVAL = ("forward", "head", "other")
WARM_UP_TOKENS = 8

Stages = dict[str, float]


@dataclass
class Timing:
    """What one system gave: seconds; the text's log-likelihood, saved searches and stages where it has such."""

    seconds: float
    log_likelihood: float | None = None
    saved_searches: float | None = None
    stages: Stages | None = None


ScoreTheText = Callable[[], Timing]


class RecordingRetriever:
    """A retriever that keeps the queries it is asked for, batch by batch; all else is the other's."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self.batches: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._retriever, name)

    def search(self, queries: Tensor) -> Found:
        """As ``Retriever.search``."""
        self.batches.append(queries.float().cpu().numpy().copy())
        return self._retriever.search(queries)


class SpeedComparison:
    """One model, one datastore and one text; the systems to compare, each a function that scores the text.

    With ``retomaton=True`` RetoMaton is a system beside kNN-LM, here and in the published code.

    Parameters
    ----------
    model_args : as for ``KNNHF``; windows have at most ``MAX_LENGTH`` tokens where they don't say it.
    text : scored as one stream.
    tokens : score the first so many tokens; None is all.
    threads : CPU threads; None leaves it to torch and faiss.
    cpu_time : count CPU seconds on one thread, not the clock's: for a machine on which other programs run.
    checkout : of knn-transformers, whose wrapper is then a system, too.

    Raises
    ------
    UserError
        Where the settings have nothing in ``hf`` to compare with, or the text is empty.
    """

    def __init__(
        self,
        model_args: dict[str, Any],
        text: str,
        *,
        tokens: int | None = None,
        threads: int | None = None,
        cpu_time: bool = False,
        checkout: Path | None = None,
    ) -> None:
        # With one thread, since a thread that waits for another may count as busy.
        if threads := 1 if cpu_time else threads:
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(threads)
        self._clock = time.process_time if cpu_time else time.perf_counter
        self._cpu_time, self._checkout = cpu_time, checkout
        self.lm = load_knn_hf(model_args, most_tokens=MAX_LENGTH)
        if self.lm.context_len != 1:
            raise UserError("hf has no sliding windows to compare with; leave context_len out.")
        if not str(self.lm.batch_size).isdigit():
            raise UserError(f"batch_size={self.lm.batch_size} must be a number: all systems have the same.")
        self._batch_size = int(self.lm.batch_size)
        self._hf = HFLM(
            pretrained=self.lm.model,
            tokenizer=self.lm.tokenizer,
            batch_size=self._batch_size,
            max_length=self.lm.max_length,
            **{name: model_args[name] for name in SHARED_ARGUMENTS if name in model_args},
        )
        self._scorers: dict[str, PassageScorer] = {OURS: self.lm.scorer}
        if isinstance(self.lm.scorer, RetomatonScorer):
            self._scorers = {OURS: self._knn_scorer(self.lm.retriever), OUR_RETOMATON: self.lm.scorer}
        self._text = first_tokens(self.lm, text, tokens)
        self.tokens = len(self.lm.tok_encode(self._text))
        if not self.tokens:
            raise UserError("The text is empty: there is nothing to score.")

    def times(self, repeats: int) -> dict[str, Any]:
        """Seconds, log-likelihoods and stages of so many rounds after a warm-up, the systems taking turns."""
        with tempfile.TemporaryDirectory() as folder, counting_by(self._clock):
            batches = self._query_batches()
            systems = self._systems(Path(folder))
            systems = {HF: systems.pop(HF), SEARCH: partial(self._bare_search, batches), **systems}
            first = {name: score() for name, score in systems.items()}
            rounds: dict[str, list[Timing]] = {name: [] for name in systems}
            for number in range(repeats):
                for name, score in systems.items():
                    rounds[name].append(score())
                took = ", ".join(f"{name} {timings[-1].seconds:.2f} s" for name, timings in rounds.items())
                print(f"round {number + 1}: {took}", file=sys.stderr)
        retriever = self.lm.retriever
        return {
            "tokens": self.tokens,
            "queries": sum(map(len, batches)),
            "windows": self.lm.max_length,
            "batch_size": self._batch_size,
            "cpu_time": self._cpu_time,
            "entries": len(retriever.datastore),
            "index": retriever.factory,
            "settings": self.lm.settings,
            "seconds": {name: [timing.seconds for timing in timings] for name, timings in rounds.items()},
            "stages": {name: [timing.stages for timing in rounds[name]] for name in self._scorers},
            "perplexity": {
                name: None if timing.log_likelihood is None else math.exp(-timing.log_likelihood / self.tokens)
                for name, timing in first.items()
            },
            "saved_searches": {name: timing.saved_searches for name, timing in first.items()},
        }

    def memory(self, name: str) -> dict[str, int]:
        """Resident bytes: before the system ``name`` scores the text, at the peak, and newly read from mapped files.

        In a process of its own, or what other systems left would count. On Linux only.
        """
        with tempfile.TemporaryDirectory() as folder:
            score = self._systems(Path(folder))[name]
            # A few tokens first: weights may be read from disk, and libraries loaded, only when used.
            text, self._text = self._text, first_tokens(self.lm, self._text, WARM_UP_TOKENS)
            score()
            self._text = text
            before = resident_bytes()
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
            score()
            after = resident_bytes()
        assert before and after  # as where clear_refs is
        return {
            "loaded": before["anonymous"] + before["mapped_files"],
            "peak": after["peak_resident"],
            "newly mapped": after["mapped_files"] - before["mapped_files"],
        }

    def _knn_scorer(self, retriever: Retriever) -> KNNScorer:
        return KNNScorer(Reader(self.lm.language_model, self.lm.softmax_dtype), retriever, self.lm.augmentation.mixture)

    def _query_batches(self) -> list[np.ndarray]:
        """The queries that kNN-LM searches for, ``[n, dimension]``, batch by batch."""
        if self.lm.augmentation.mixture.is_lm_alone:
            return []
        recorder: Any = RecordingRetriever(self.lm.retriever)
        with self.lm.scored_by(self._knn_scorer(recorder)):
            self._rolling(self.lm)
        return recorder.batches

    def _systems(self, folder: Path) -> dict[str, ScoreTheText]:
        """What is compared, but for the bare search; ``folder`` is for the published code's files."""
        systems: dict[str, ScoreTheText] = {HF: lambda: self._rolling(self._hf)}
        systems |= {name: partial(self._ours, scorer) for name, scorer in self._scorers.items()}
        if self._checkout is None:
            return systems

        from knn_lm_eval.study.published_code import PublishedCode, ScoreText, why_not

        if reason := why_not(self.lm):
            print(f"{PUBLISHED} is left out: {reason}.", file=sys.stderr)
            return systems

        def published(score: ScoreText) -> Timing:
            return Timing(*score(self._text))

        code = PublishedCode(self.lm, self._checkout, folder)
        systems[PUBLISHED] = partial(published, code.knn_lm(self._batch_size))
        if OUR_RETOMATON in systems:
            walk = (self.lm.settings[name] for name in ("min_knns", "max_knns", "clusters"))
            systems[PUBLISHED_RETOMATON] = partial(published, code.retomaton(*walk))
        return systems

    def _rolling(self, lm: HFLM) -> Timing:
        """Score the text as lm-eval's perplexity tasks do."""
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(self._text,), idx=0)
        with redirect_stderr(io.StringIO()):  # hf shows a progress bar for each batch, asked or not
            start = self._clock()
            (log_likelihood,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
            seconds = self._clock() - start
        searches = getattr(log_likelihood, "num_searches", None)
        return Timing(seconds, float(log_likelihood), None if searches is None else 1 - searches / self.tokens)

    def _ours(self, scorer: PassageScorer) -> Timing:
        """One of our scorers, with its seconds by stage."""
        before = self._stages(scorer)
        with self.lm.scored_by(scorer):
            timing = self._rolling(self.lm)
        timing.stages = {stage: value - before[stage] for stage, value in self._stages(scorer).items()}
        timing.stages["other"] = timing.seconds - sum(timing.stages.values())
        return timing

    def _bare_search(self, batches: list[np.ndarray]) -> Timing:
        """Nothing but the search, for the same queries in the same batches."""
        retriever = self.lm.retriever.with_settings()  # whose statistics are its own
        start = self._clock()
        for queries in batches:
            retriever.find(queries)
        return Timing(self._clock() - start)

    def _stages(self, scorer: PassageScorer) -> Stages:
        """Seconds that a scorer and the retriever have spent so far, by stage."""
        work = Work({}, scorer.seconds).plus(retrieval_work(self.lm.retriever))
        return dict(work.seconds)


def ratios(report: dict[str, Any]) -> dict[str, list[float]]:
    """How much longer one takes than another, in each round, from ``SpeedComparison.times``."""
    seconds = report["seconds"]
    hf, retrieval = seconds[HF], retrieval_seconds(report)
    with_search = [a + b for a, b in zip(hf, seconds[SEARCH], strict=True)]
    compared = [name for name in seconds if name not in (HF, SEARCH)]
    found: dict[str, list[float]] = {}
    for name in compared:
        found[f"{name} / ({HF} + {SEARCH})"] = _divided(seconds[name], with_search)
        found[f"{name} / {HF}"] = _divided(seconds[name], hf)
    for name, published in ((OURS, PUBLISHED), (OUR_RETOMATON, PUBLISHED_RETOMATON)):
        if published in compared:
            beyond = [a - b for a, b in zip(seconds[published], hf, strict=True)]
            found[f"{published} beyond {HF} / retrieval of {name}"] = _divided(beyond, retrieval[name])
    return found


def retrieval_seconds(report: dict[str, Any]) -> dict[str, list[float]]:
    """What retrieval takes in each of our systems, in each round."""
    return {
        name: [sum(stages[stage] for stage in stages if stage not in NOT_RETRIEVAL) for stages in rounds]
        for name, rounds in report["stages"].items()
    }


def _divided(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
