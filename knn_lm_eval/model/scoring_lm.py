"""lm-eval's log-likelihood requests -> passages -> batches -> scores, whatever scores them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.lm.reading import Passage, WholeText
from knn_lm_eval.model.records import RecordedTexts, RecordFolder, RecordWriter, label_requests
from knn_lm_eval.model.scores import RollingLoglikelihood, Score, spans_of
from knn_lm_eval.model.scoring import PassageScorer

# A CPU gains nothing from larger batches and cannot find its limit by trial: batch_size=auto takes this many
# tokens there.
CPU_BATCH_TOKENS = 4096


# Tokens of context, and those that follow and are scored.
Window = tuple[list[int], list[int]]


class ScoredText(NamedTuple):
    """A text that is scored, or the end of one.

    Attributes
    ----------
    whole : the text, without a prefix token.
    start : the place of its first scored token.
    windows : in the text's order; those of the scored tokens.
    """

    whole: WholeText
    start: int
    windows: list[Window]

    @property
    def places(self) -> list[int]:
        """Of each window the place of its first scored token."""
        lengths = [len(continuation) for _, continuation in self.windows]
        return list(itertools.accumulate(lengths[:-1], initial=self.start)) if lengths else []


class Group(NamedTuple):
    """Batches that are scored in one go, and the names of their passages, in order."""

    names: list[Any]
    batches: list[list[Passage]]


class ScoringLM(CausalHFLM):
    """lm-eval's ``hf`` with a scorer in the place of its own log-likelihoods.

    Who derives from it sets these in ``__init__``.

    Attributes
    ----------
    scorer : scores passages.
    context_len : in rolling windows, the tokens of context that each token has at least.
    carry_state : whether windows are scored in the text's order, since each goes on where the one before ended.
    records : where each scored token leaves a record, of a scorer that keeps figures; None leaves none.
    """

    scorer: PassageScorer
    context_len: int
    carry_state = False
    records: RecordFolder | None = None
    _asked: Sequence[Instance] | None = None  # the requests whose tokens are being scored

    @property
    def language_model(self) -> LanguageModel:
        """The LM, taken apart for retrieval."""
        return self.scorer.reader.model

    def check_context_len(self) -> None:
        """Raise UserError where windows cannot have so much context."""
        if not 1 <= self.context_len <= self.max_length:
            raise UserError(f"context_len={self.context_len} must be between 1 and max_length={self.max_length}.")

    @contextmanager
    def scored_by(self, scorer: PassageScorer) -> Iterator[None]:
        """Inside, ``scorer`` has the requests, and nothing is recorded."""
        usual, self.scorer, self.records = (self.scorer, self.records), scorer, None
        try:
            yield
        finally:
            self.scorer, self.records = usual

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's whole text, in windows with ``context_len`` tokens of context.

        Returns
        -------
        One ``RollingLoglikelihood`` per request: the sum, which also knows the number of tokens and its parts.
        """
        tokens_of = (self.tok_encode(request.args[0]) for request in requests)
        texts = [ScoredText(WholeText.of(tokens[:-1]), 0, self._rolling_windows(tokens)) for tokens in tokens_of]
        results = [RollingLoglikelihood(0.0, 0, None)] * len(requests)
        with self.recording("loglikelihood_rolling", requests, texts) as records:
            for number, of_windows in self._score_in_windows(texts, False, disable_tqdm, records=records):
                searches = [score.searches for score in of_windows.values() if score.searches is not None]
                tokens = [len(continuation) for _, continuation in texts[number].windows]
                results[number] = RollingLoglikelihood(
                    sum(score.log_prob for score in of_windows.values()),
                    sum(tokens),
                    sum(searches) if searches else None,
                    spans_of([(of_windows[place].log_prob, length) for place, length in enumerate(tokens)]),
                )
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, results[number])
        return list(results)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's; records say which documents the requests are of."""
        self._asked = requests
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._asked = None

    def recording(
        self, kind: str, requests: Sequence[Instance] | None, texts: Sequence[ScoredText]
    ) -> AbstractContextManager[RecordWriter | None]:
        """What writes the records of these texts; nothing where none are asked for."""
        if self.records is None:
            return nullcontext()
        labelled = label_requests(requests, len(texts))
        windows, starts = [text.windows for text in texts], [text.start for text in texts]
        return self.records.writing(kind, RecordedTexts(*labelled, windows, starts, self.max_length))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of an empty continuation
        texts = []
        for _, context, continuation in requests:
            # A prefix token that stands for an empty context is none of the text's own.
            own = [] if context == [self.prefix_token_id] else context
            whole = WholeText.of((own + continuation)[:-1])
            texts.append(ScoredText(whole, len(own), self._windows(context, continuation)))
        with self.recording("loglikelihood", self._asked, texts) as records:
            for number, of_windows in self._score_in_windows(texts, True, disable_tqdm, override_bs, records):
                log_prob = sum(score.log_prob for score in of_windows.values())
                results[number] = log_prob, all(score.is_greedy for score in of_windows.values())
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
        return results

    def _rolling_windows(self, tokens: list[int]) -> list[Window]:
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, self.context_len)
        return [make_disjoint_window(window) for window in windows]

    def _windows(self, context: list[int], continuation: list[int]) -> list[Window]:
        """One (context, continuation), or several where the continuation is longer than what is read at once.

        lm-eval takes a context of white space for a part of the continuation, and leaves none: the prefix token is the
        context of an empty one.
        """
        text = (context or [self.prefix_token_id]) + continuation
        ends = range(len(text), len(text) - len(continuation), -self.max_length)
        windows = [(end, min(self.max_length, len(continuation) - (len(text) - end))) for end in ends]
        # As in rolling windows: a full window, of which the last tokens are asked for.
        return [
            (text[max(0, end - self.max_length - 1) : end - length], text[end - length : end])
            for end, length in reversed(windows)
        ]

    def _score_in_windows(
        self,
        texts: Sequence[ScoredText],
        want_greedy: bool,
        disable_tqdm: bool = False,
        batch_size: int | None = None,
        records: RecordWriter | None = None,
    ) -> Iterator[tuple[int, dict[int, Score]]]:
        """Score texts in windows; yields (the text's number, its scores by window) as they get done."""
        places = [(text, place) for text, of_text in enumerate(texts) for place in range(len(of_text.windows))]
        scores: dict[int, dict[int, Score]] = {}
        for number, score in self._score(texts, want_greedy, disable_tqdm, batch_size):
            text, place = places[number]
            if records is not None:
                assert score.figures is not None, "the scorer keeps figures where there are records"
                records.add(text, place, score.figures)
                score = score._replace(figures=None)  # written; a long text's would take memory until it is done
            of_text = scores.setdefault(text, {})
            of_text[place] = score
            if len(of_text) == len(texts[text].windows):
                yield text, scores.pop(text)

    def _score(
        self,
        texts: Sequence[ScoredText],
        want_greedy: bool,
        disable_tqdm: bool,
        batch_size: int | None,
    ) -> Iterator[tuple[int, Score]]:
        """Score all windows of texts, numbered through; yields (number, score) as batches get done."""
        self.scorer.begin_texts()
        passages: dict[Any, Passage] = {}
        askers: dict[Any, list[int]] = {}
        requests = [
            (number, window, place)
            for number, text in enumerate(texts)
            for window, place in zip(text.windows, text.places, strict=True)
        ]
        for number, (of_text, (context, continuation), place) in enumerate(requests):
            text, whole = context + continuation, texts[of_text].whole
            read = text[-(self.max_length + 1) : -1]
            start = place + len(continuation) - 1 - len(read)
            # Requests that read the same tokens of the same text share the forward pass, as in HFLM.
            shared = (tuple(text[:-1]), whole, start) if self.logits_cache and not self.carry_state else number
            passage = passages.setdefault(shared, Passage(read, whole=whole, start=start))
            passage.text = of_text
            passage.continuations.append(continuation)
            askers.setdefault(shared, []).append(number)
        order = list(passages)
        if not self.carry_state:
            # Longest first: similar lengths share a batch, and too large a batch shows at once.
            order.sort(key=lambda shared: -len(passages[shared].tokens))
        groups = self._groups(passages, order, batch_size, want_greedy)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring with retrieval") as bar:
            upcoming = next(groups, None)
            while (group := upcoming) is not None:
                upcoming = next(groups, None)
                following = upcoming.batches[0] if upcoming else None
                results = self.score_passages(group.batches, want_greedy, following)
                for shared, scores in zip(group.names, results, strict=True):
                    yield from zip(askers[shared], scores, strict=True)
                    bar.update(len(scores))

    def _groups(
        self, passages: dict[Any, Passage], order: list[Any], batch_size: int | None, want_greedy: bool
    ) -> Iterator[Group]:
        """The passages in batches, as many batches together as the scorer wants."""
        start, rows = 0, 0
        group = Group([], [])
        while start < len(order):
            names = order[start : start + (batch_size or self._size_of_batch(passages[order[start]], want_greedy))]
            group.names.extend(names)
            group.batches.append([passages[name] for name in names])
            rows += sum(passage.rows for passage in group.batches[-1])
            start += len(names)
            if rows >= self.scorer.rows_at_once or start >= len(order):
                yield group
                group, rows = Group([], []), 0

    def score_passages(
        self, batches: list[list[Passage]], want_greedy: bool, following: list[Passage] | None = None
    ) -> list[list[Score]]:
        """The scorer's ``score``; the place for what has scores from elsewhere."""
        return self.scorer.score(batches, want_greedy, following)

    def _size_of_batch(self, longest: Passage, want_greedy: bool) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        length = len(longest.tokens)
        if self.device.type == "cpu":
            return max(1, CPU_BATCH_TOKENS // length)
        asked = length, want_greedy  # which takes more memory
        if asked not in self.batch_sizes:
            probe = Passage([self.prefix_token_id] * length, [[self.prefix_token_id] * length])

            @find_executable_batch_size(starting_batch_size=self.max_batch_size)
            def try_batch(batch_size: int) -> int:
                batches = [[probe] * batch_size for _ in range(2)]  # two, for the second may be read ahead
                if self.scorer.reads_all_first:
                    self.scorer.try_out(batches, want_greedy)
                else:
                    self.score_passages(batches, want_greedy)
                return batch_size

            # A size that holds for this length holds for all that follow, which are shorter.
            longer = [size for (_, greedy), size in self.batch_sizes.items() if greedy == want_greedy]
            self.batch_sizes[asked] = max([try_batch(), *longer])
        return self.batch_sizes[asked]

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        # HFLM asks this where batch_size=auto and it generates.
        if self.device.type == "cpu":
            return max(1, CPU_BATCH_TOKENS // self.max_length)
        return super()._detect_batch_size(requests, pos)
