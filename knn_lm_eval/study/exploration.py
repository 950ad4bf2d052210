"""A text that is looked at with one setting after the other: what was found is kept, the mixture is computed anew.

Two settings take more than the mixture: RetoMaton walks anew for another k or min_knns, over searches that are kept;
and an index whose first neighbours of many are not those of a search for few is searched again for another k.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.errors import UserError, counted
from knn_lm_eval.lm.reading import Passage, Reader
from knn_lm_eval.methods.adaptive import Constant
from knn_lm_eval.methods.automaton import Automaton, Walk, padded_neighbours
from knn_lm_eval.methods.mixture import Mixture
from knn_lm_eval.methods.walk_origins import StepOrigins, walk_origins
from knn_lm_eval.model.knn_hf import KNNHF
from knn_lm_eval.model.ngram_mixture import NgramReader
from knn_lm_eval.model.opening import Augmentation
from knn_lm_eval.report.tokens import InspectedToken
from knn_lm_eval.search.retriever import Retriever
from knn_lm_eval.study.inspection import TokenRows, ngram_weight, windows_of
from knn_lm_eval.study.token_mixture import (
    Figures,
    FoundForTokens,
    LMFigures,
    lm_figures,
    mixed_figures,
)

MAX_TOKENS = 1024
CHARACTERS_OF_A_TOKEN = 64  # no text has as many on average: a longer one is refused before it is cut into tokens


@dataclass(frozen=True)
class ExploredSettings:
    """What can be changed while a text is looked at; a number out of range raises UserError.

    Attributes
    ----------
    k : neighbours, from 1 to the k that was opened.
    lmbda : their weight; None is the model's own, which may differ from token to token.
    knn_temp : the temperature, above 0.
    min_knns : RetoMaton searches where fewer candidates survived.
    """

    k: int
    lmbda: float | None
    knn_temp: float
    min_knns: float = 1

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"k={self.k} must be at least 1.")
        if self.lmbda is not None and not 0 <= self.lmbda <= 1:
            raise UserError(f"lmbda={self.lmbda} is not between 0 and 1.")
        if not 0 < self.knn_temp < float("inf"):
            raise UserError(f"knn_temp={self.knn_temp} must be above 0.")
        if not self.min_knns >= 0:
            raise UserError(f"min_knns={self.min_knns} must be at least 0.")


class Walked(NamedTuple):
    """RetoMaton's walk along a text: what it found, and where that came from."""

    found: FoundForTokens
    origins: list[StepOrigins]


class KeptText:
    """A text that was read once, and all that its mixtures are made of.

    Attributes
    ----------
    texts : its ``n`` tokens, decoded.
    lm_said : of these.
    queries : float32 ``[n, dimension]``.
    windows : how many tokens each window has.
    found : by a search for the k that was opened.
    """

    def __init__(
        self, texts: list[str], lm_said: LMFigures, queries: Tensor, windows: Sequence[int], found: FoundForTokens
    ) -> None:
        self.texts, self.lm_said, self.queries, self.windows = texts, lm_said, queries, tuple(windows)
        self.found = found
        # The last walk, or the last search for another k, and the settings that it is of.
        self.searched: tuple[int, FoundForTokens] | None = None
        self.walked: tuple[tuple[int, float], Walked] | None = None

    def __len__(self) -> int:
        return len(self.texts)


class MixedText(NamedTuple):
    """A text with one setting: what was found, the probabilities, and of a walk where candidates came from."""

    kept: KeptText
    settings: ExploredSettings
    found: FoundForTokens
    figures: Figures
    origins: list[StepOrigins] | None

    @property
    def log_probs(self) -> Tensor:
        """log p of the tokens, float64 ``[n]``."""
        return self.figures.log_prob

    @property
    def searches(self) -> int:
        """Tokens for which the index was searched."""
        return int(self.figures.searched.sum())


class Explorer:
    """Reads texts with one LM and datastore, and mixes them with any setting; several threads may ask it.

    Parameters
    ----------
    lm : a loaded ``knn-hf``; it decides between kNN-LM and RetoMaton, and its k is the largest.
    max_tokens : of a text, so that what is kept of it is at most so many times k neighbours of 16 bytes, of a walk
        k + max_knns.

    Attributes
    ----------
    first : the settings that ``lm`` was opened with.
    """

    def __init__(self, lm: KNNHF, max_tokens: int = MAX_TOKENS) -> None:
        self.lm, self.max_tokens = lm, max_tokens
        opened = lm.augmentation
        if opened.exclusion is not None:
            raise UserError(
                "exclude_overlap is not for exploring, which looks at all that searches find: leave it out."
            )
        settings = opened.settings
        if settings.retomaton and not settings.no_pointer and opened.automaton is None:
            raise UserError("With lmbda=0 RetoMaton does not walk: give another lmbda, and set it to 0 on the page.")
        assert settings.min_knns is not None or not settings.retomaton
        min_knns = 1.0 if settings.min_knns is None else settings.min_knns
        self.first = ExploredSettings(
            opened.retriever.k, opened.mixture.weight.constant, opened.mixture.knn_temp, min_knns
        )
        self._lock = threading.RLock()  # the LM, and searches, are asked by one at a time

    @property
    def walks(self) -> bool:
        """Whether this is RetoMaton."""
        return self.lm.augmentation.automaton is not None

    @property
    def weight_per_token(self) -> str | None:
        """The kind of the model's own weight where it differs from token to token."""
        plain = self.lm.augmentation.mixture.weight.plain()
        return str(plain["kind"]) if isinstance(plain, dict) else None

    def read(self, text: str) -> KeptText:
        """Have the LM read a text in windows, as in scoring, and find each token's neighbours.

        Raises
        ------
        UserError
            Where the text is empty or has too many tokens.
        """
        tokens = self._tokens(text)
        with self._lock:
            reader, ngrams = Reader(self.lm.language_model, torch.float32), NgramReader(self.lm.augmentation.ngrams)
            of_windows, queries, windows = [], [], []
            for context, targets in windows_of(self.lm, tokens):
                reading = reader.read([Passage((context + targets)[:-1], [targets])])
                of_windows.append(lm_figures(reader, reading, self.lm.augmentation.mixture.weight, ngrams))
                queries.append(reading.queries.float().cpu())
                windows.append(len(targets))
            of_text = torch.cat(queries)
            found = FoundForTokens(*self.lm.retriever.search(of_text), None)
        texts = [self.lm.tokenizer.decode([token]) for token in tokens]
        return KeptText(texts, LMFigures.of_windows(of_windows), of_text, windows, found)

    def _tokens(self, text: str) -> list[int]:
        if not text:
            raise UserError("The text is empty: type or paste one.")
        limit = counted(self.max_tokens, "token")
        if len(text) > CHARACTERS_OF_A_TOKEN * self.max_tokens:
            raise UserError(f"The text has {len(text):,} characters, and at most {limit} are read: give a shorter one.")
        tokens: list[int] = self.lm.tok_encode(text)
        if len(tokens) > self.max_tokens:
            raise UserError(f"The text has {len(tokens):,} tokens, and at most {limit} are read: give a shorter one.")
        return tokens

    def mix(self, kept: KeptText, settings: ExploredSettings) -> MixedText:
        """The text with these settings.

        Raises
        ------
        UserError
            Where k is above the one that was opened.
        """
        if settings.k > self.first.k:
            raise UserError(f"k={settings.k} is above the k={self.first.k} that was opened.")
        if self.walks:
            found, origins = self._walk(kept, settings)
        else:
            found, origins = self._found(kept, settings.k), None
        mixture = self._mixture(settings)
        figures = mixed_figures(mixture, ngram_weight(self.lm), kept.lm_said, found)
        return MixedText(kept, settings, found, figures, origins)

    def token(self, mixed: MixedText, row: int, *, num_neighbours: int = 8, context_tokens: int = 24) -> InspectedToken:
        """One token of the text with its heaviest neighbours, among them or behind them one that has the token."""
        return self._rows(mixed).inspected(row, num_neighbours, context_tokens, heaviest_hit=True)

    def tokens(self, mixed: MixedText) -> list[InspectedToken]:
        """All tokens, without their neighbours."""
        figures, rows = mixed.figures, self._rows(mixed)
        p_knn = figures.knn_log_prob.exp().nan_to_num(0.0)
        of_all = (figures.lm_log_prob.exp(), p_knn, figures.log_prob.exp(), figures.searched)
        numbers = zip(mixed.kept.texts, *(part.tolist() for part in of_all), strict=True)
        return [
            InspectedToken(text, p_lm, p_knn, p, searched, [], step=rows.step(row))
            for row, (text, p_lm, p_knn, p, searched) in enumerate(numbers)
        ]

    def _rows(self, mixed: MixedText) -> TokenRows:
        return TokenRows(self.lm, mixed.kept.lm_said, mixed.found, mixed.figures, mixed.origins)

    def augmentation(self, settings: ExploredSettings) -> Augmentation:
        """What is mixed into the LM with these settings."""
        opened = self.lm.augmentation
        retriever = self._retriever(settings.k)
        return replace(
            opened,
            mixture=self._mixture(settings),
            retriever=retriever,
            automaton=None if opened.automaton is None else self._automaton(opened.automaton, retriever, settings),
        )

    @property
    def lock(self) -> threading.RLock:
        """To be held while the LM or the retriever is used from elsewhere."""
        return self._lock

    def _mixture(self, settings: ExploredSettings) -> Mixture:
        own = self.lm.augmentation.mixture.weight
        return Mixture(own if settings.lmbda is None else Constant(settings.lmbda), settings.knn_temp)

    def _retriever(self, k: int) -> Retriever:
        retriever = self.lm.retriever
        return retriever if k == retriever.k else retriever.with_settings(k=k)

    def _automaton(self, opened: Automaton, retriever: Retriever, settings: ExploredSettings) -> Automaton:
        asked = replace(opened.settings, k=settings.k, knn_temp=settings.knn_temp, min_knns=settings.min_knns)
        return opened.with_settings(asked, retriever.find)

    def _found(self, kept: KeptText, k: int) -> FoundForTokens:
        """What a search for ``k`` neighbours finds."""
        if k == self.first.k or self.lm.retriever.first_of_more_are_fewer:
            return kept.found.of_first(k)
        with self._lock:
            if kept.searched is None or kept.searched[0] != k:
                kept.searched = k, FoundForTokens(*self._retriever(k).search(kept.queries), None)
            return kept.searched[1]

    def _walk(self, kept: KeptText, settings: ExploredSettings) -> Walked:
        """What a walk with these settings finds; of the temperature it does not depend."""
        asked = settings.k, settings.min_knns
        with self._lock:
            if kept.walked is None or kept.walked[0] != asked:
                kept.walked = asked, self._walk_anew(kept, settings)
            return kept.walked[1]

    def _walk_anew(self, kept: KeptText, settings: ExploredSettings) -> Walked:
        opened = self.lm.augmentation.automaton
        assert opened is not None, "asked only where there is one"
        automaton = self._automaton(opened, self._retriever(settings.k), settings)
        found = self._found(kept, settings.k)
        queries, targets = kept.queries.numpy(), kept.lm_said.targets.numpy()
        distances, entries = found.distances.numpy(), found.entries.numpy()  # [n, k]
        walks: list[Walk] = []
        ends = np.cumsum(kept.windows)
        for begin, end in zip(ends - kept.windows, ends, strict=True):
            walk = Walk(queries[begin:end], targets[begin:end], found=(distances[begin:end], entries[begin:end]))
            if walks and self.lm.carry_state:
                walk.survivors = walks[-1].survivors_at_end
            automaton.walk([walk], keep_neighbours=True)
            walks.append(walk)
        neighbours = [step for walk in walks for step in walk.neighbours]
        padded = padded_neighbours(neighbours, automaton.values)
        searched = torch.from_numpy(np.concatenate([walk.searched for walk in walks]))
        return Walked(
            FoundForTokens(*padded, None, searched),
            [origins for walk in walks for origins in walk_origins(automaton, walk)],
        )
