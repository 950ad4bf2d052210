"""What retrieval did to each token of a text: plain figures and texts, for the terminal, for JSON and for pages."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Neighbour:
    """One entry of the datastore that was found.

    Attributes
    ----------
    entry : its number in its datastore.
    distance : squared L2, or the negated inner product.
    weight : its share of p_kNN.
    value, context : the token that it proposes, and the text before it, decoded; no text where the store is in no
        text order.
    store, document : the name of the datastore, and the document's number in it; None where the store is in no text
        order, or nobody noted it.
    """

    entry: int
    distance: float
    weight: float
    value: str
    context: str
    store: str | None = None
    document: int | None = None


@dataclass(frozen=True)
class InspectedToken:
    """One token of the text.

    Attributes
    ----------
    text : the token, decoded.
    p_lm, p_knn, p : its probability by the LM, by the neighbours, and by their mixture.
    searched : whether the index was searched for it.
    neighbours : those of most weight, heaviest first.
    """

    text: str
    p_lm: float
    p_knn: float
    p: float
    searched: bool
    neighbours: list[Neighbour]

    @property
    def gain(self) -> float:
        """log p - log p_LM, in nats: what retrieval brought."""
        return math.log(self.p / self.p_lm) if self.p and self.p_lm else math.copysign(math.inf, self.p - self.p_lm)
