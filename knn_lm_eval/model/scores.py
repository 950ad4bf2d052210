"""What scoring a whole text yields."""

from __future__ import annotations


class RollingLoglikelihood(float):
    """The sum of a text's token log-probabilities (natural logarithm) that knows how many there were.

    lm-eval asks for a plain float and hands it on to the task untouched. A float that carries its counts lets
    the task compute perplexity per token without guessing how the LM split the text.
    """

    num_tokens: int  # tokens scored, of the LM's own tokenizer
    num_searches: int | None  # full searches made for them; None where every token is searched

    def __new__(cls, value: float, num_tokens: int, num_searches: int | None = None) -> RollingLoglikelihood:
        self = super().__new__(cls, value)
        self.num_tokens = num_tokens
        self.num_searches = num_searches
        return self

    def __getnewargs__(self) -> tuple[float, int, int | None]:  # type: ignore[override]
        # float's own gives the value only, which __new__ above could not do with when unpickling.
        return float(self), self.num_tokens, self.num_searches
