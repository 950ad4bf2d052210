"""What retrieval did to each token of a text: plain figures and texts, for the terminal, for JSON and for pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

CAME_BY = ("pointer", "cluster", "search")


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
    came_by : how a walk came to it, of ``CAME_BY``; None of a search alone.
    """

    entry: int
    distance: float
    weight: float
    value: str
    context: str
    store: str | None = None
    document: int | None = None
    came_by: str | None = None


@dataclass(frozen=True)
class WalkStep:
    """A step of RetoMaton's walk, at which a token is predicted.

    Attributes
    ----------
    survivors : how many candidates of the step before had its token and an entry after them.
    pointers, members, found : how many candidates came as pointers, from the pointers' clusters, and by the search;
        whatever came in several ways counts as the first of these.
    pointer_weight, member_weight, found_weight : their shares of p_kNN.
    """

    survivors: int
    pointers: int
    members: int
    found: int
    pointer_weight: float
    member_weight: float
    found_weight: float


@dataclass(frozen=True)
class InspectedToken:
    """One token of the text.

    Attributes
    ----------
    text : the token, decoded.
    p_lm, p_knn, p : its probability by the LM, by the neighbours, and by their mixture.
    searched : whether the index was searched for it.
    neighbours : those of most weight, heaviest first.
    p_ngram : its probability by the n-grams; None where they are not mixed in, or have none.
    step : of RetoMaton's walk; None without one.
    found, hits : how many neighbours there are, and how many have the token as their value; None where nobody counted.
    """

    text: str
    p_lm: float
    p_knn: float
    p: float
    searched: bool
    neighbours: list[Neighbour]
    p_ngram: float | None = None
    step: WalkStep | None = None
    found: int | None = None
    hits: int | None = None

    @property
    def gain(self) -> float:
        """log p - log p_LM, in nats: what retrieval brought."""
        return math.log(self.p / self.p_lm) if self.p and self.p_lm else math.copysign(math.inf, self.p - self.p_lm)


def read_token(plain: dict[str, Any]) -> InspectedToken:
    """A token from what ``dataclasses.asdict`` made of it; raises KeyError or TypeError for what is none."""
    neighbours = [Neighbour(**neighbour) for neighbour in plain["neighbours"]]
    step = plain.get("step")
    return InspectedToken(**plain | {"neighbours": neighbours, "step": None if step is None else WalkStep(**step)})
