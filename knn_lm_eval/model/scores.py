"""What scoring yields: a score per continuation, and a float per whole text that knows what it was summed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from knn_lm_eval.lm.reading import Reading
from knn_lm_eval.model.token_figures import TokenFigures

# A text's parts: of each the sum of its tokens' log-probabilities (natural logarithm), and how many tokens it has.
Spans = list[tuple[float, int]]
MOST_SPANS = 400  # of a text: windows that overlap but for one token are as many as tokens


class Score(NamedTuple):
    """A continuation's score.

    Attributes
    ----------
    log_prob : the sum of its tokens' log-probabilities (natural logarithm).
    is_greedy : whether each token is the most probable one; False where nobody asked.
    searches : full searches made for it; None where every token is searched.
    figures : what is known of its tokens; None where nobody keeps records.
    """

    log_prob: float
    is_greedy: bool
    searches: int | None = None
    figures: TokenFigures | None = None


def sum_up(
    reading: Reading,
    log_probs: Tensor,
    greedy: Tensor | None = None,
    searches: Sequence[int] | None = None,
    figures: TokenFigures | None = None,
) -> list[list[Score]]:
    """The scores of each passage's continuations, from those of their tokens.

    Parameters
    ----------
    log_probs : ``[tokens]``, in the order of ``reading.pairs()``.
    greedy : bool ``[tokens]``; None where nobody asked.
    searches : full searches made, per continuation; None where every token is searched.
    figures : of all tokens; None where nobody keeps records.
    """
    lengths = reading.lengths
    sums = [float(part.sum()) for part in log_probs.split(lengths)]
    all_greedy = [False] * len(lengths) if greedy is None else [bool(part.all()) for part in greedy.split(lengths)]
    made = [None] * len(lengths) if searches is None else searches
    known = [None] * len(lengths) if figures is None else figures.split(lengths)
    scores = (Score(*score) for score in zip(sums, all_greedy, made, known, strict=True))
    return [[next(scores) for _ in passage.continuations] for passage in reading.passages]


class RollingLoglikelihood(float):
    """The sum of a text's token log-probabilities (natural logarithm) that knows how many there were.

    lm-eval asks for a plain float and hands it on to the task untouched. A float that carries its counts lets
    the task compute perplexity per token without guessing how the LM split the text.
    """

    num_tokens: int  # tokens scored, of the LM's own tokenizer
    num_searches: int | None  # full searches made for them; None where every token is searched
    spans: Spans | None  # the sum's parts, in the text's order; None where nobody kept them

    def __new__(
        cls, value: float, num_tokens: int, num_searches: int | None = None, spans: Spans | None = None
    ) -> RollingLoglikelihood:
        self = super().__new__(cls, value)
        self.num_tokens = num_tokens
        self.num_searches = num_searches
        self.spans = spans
        return self

    def __getnewargs__(self) -> tuple[float, int, int | None, Spans | None]:  # type: ignore[override]
        # float's own gives the value only, which __new__ above could not do with when unpickling.
        return float(self), self.num_tokens, self.num_searches, self.spans


def spans_of(windows: Sequence[tuple[float, int]]) -> Spans:
    """Sums of consecutive windows: of each, or of several where there are very many.

    Parameters
    ----------
    windows : sums of log-probabilities and numbers of tokens, in the text's order.
    """
    size = -(-len(windows) // MOST_SPANS) or 1
    parts = [windows[start : start + size] for start in range(0, len(windows), size)]
    return [(sum(log_prob for log_prob, _ in part), sum(tokens for _, tokens in part)) for part in parts]
