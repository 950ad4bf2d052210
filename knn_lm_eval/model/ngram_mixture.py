"""The n-gram LM of the datastore's text, mixed into what the LM, or LM and neighbours, give.

    p(y) = (1 - ngram_lmbda) p_others(y) + ngram_lmbda p_ngram(y)

and p_others alone where the n-gram LM has no p. It looks at the tokens that the LM reads, in the same window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knn_lm_eval.lm.reading import Reading
from knn_lm_eval.methods.mixture import mix
from knn_lm_eval.methods.ngrams import Matches, Ngrams
from knn_lm_eval.system.timing import StageTimer

CPU = torch.device("cpu")


class Context(NamedTuple):
    """Tokens, at each of whose last ``rows`` positions the next one is predicted."""

    tokens: Sequence[int] | np.ndarray
    rows: int


@dataclass(frozen=True)
class NgramMixture:
    """An n-gram LM and its weight, from above 0 to 1."""

    ngrams: Ngrams
    lmbda: float


class NgramReader:
    """Looks up what is read, and counts what that took.

    Parameters
    ----------
    mixture : None looks nothing up.

    Attributes
    ----------
    seconds : by stage, ``ngrams``.
    """

    def __init__(self, mixture: NgramMixture | None) -> None:
        self.mixture = mixture
        self._timed = StageTimer(("ngrams",), CPU)
        self._rows, self._length = 0, 0

    @property
    def seconds(self) -> dict[str, float]:
        return {} if self.mixture is None else self._timed.seconds

    @property
    def counts(self) -> dict[str, float]:
        """Positions that were looked up, and how many tokens were matched at all of them together."""
        return {} if self.mixture is None else {"ngram_rows": self._rows, "ngram_tokens": self._length}

    def of_reading(self, reading: Reading) -> NgramRows | None:
        """The matches of a batch's rows."""
        if self.mixture is None:
            return None
        return self.of_contexts([Context(passage.tokens, passage.rows) for passage in reading.passages])

    def of_contexts(self, contexts: Sequence[Context]) -> NgramRows:
        """The matches of all contexts' rows, one context after the other."""
        assert self.mixture is not None, "asked only of a mixture"
        with self._timed("ngrams"):
            ngrams = self.mixture.ngrams
            found = [ngrams.matches(tokens, len(tokens) - rows + 1, rows) for tokens, rows in contexts]
            matches = Matches(*(np.concatenate(part, axis=-1) for part in zip(*found, strict=True)))
        self._rows += len(matches.lengths)
        self._length += int(matches.lengths.sum())
        return NgramRows(self.mixture, matches, self._timed)


@dataclass(frozen=True)
class NgramRows:
    """What the n-gram LM has to say at some positions, its rows."""

    mixture: NgramMixture
    matches: Matches
    timed: StageTimer

    def of_rows(self, rows: Tensor) -> NgramRows:
        """The same of some rows, perhaps in another order."""
        at = rows.cpu().numpy()
        return NgramRows(self.mixture, Matches(*(part[..., at] for part in self.matches)), self.timed)

    def mixed(self, log_probs: Tensor, log_p: Tensor) -> Tensor:
        """log p of some targets, from theirs without n-grams and by n-grams alone, as of ``log_probs``."""
        return mix(log_probs.double(), log_p.to(log_probs.device), self.mixture.lmbda).to(log_probs.dtype)

    def log_probs(self, rows: Tensor, targets: Tensor) -> Tensor:
        """log p_ngram of each target at its row, float64 ``[pairs]`` on the CPU; NaN where there is none."""
        with self.timed("ngrams"):
            at = rows.cpu().numpy(), targets.cpu().numpy()
            return torch.from_numpy(self.mixture.ngrams.probabilities(self.matches, *at)).log()

    def mix_into(self, table: Tensor, start: int) -> None:
        """Mix them into the log-probabilities ``[n, vocabulary]`` of all tokens, at the rows from ``start`` on."""
        lmbda = self.mixture.lmbda
        with self.timed("ngrams"):
            for row in range(len(table)):
                tokens, p = self.mixture.ngrams.next_tokens(self.matches, start + row)
                if not len(tokens):
                    continue
                at = torch.from_numpy(tokens).to(table.device)
                log_p = torch.from_numpy(p).log().to(table.device)
                following = mix(table[row, at].double(), log_p, lmbda).to(table.dtype)
                table[row] += math.log1p(-lmbda) if lmbda < 1 else -math.inf
                table[row, at] = following
