"""What a page says of one token: its probabilities, its step of a walk, and its neighbours, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knn_lm_eval.errors import counted
from knn_lm_eval.report.tokens import InspectedToken, Neighbour, WalkStep


@dataclass(frozen=True)
class Figure:
    """A probability: its name, the number in words, and as a bar, whose ``width`` is in percent."""

    name: str
    number: str
    width: str
    kind: str


@dataclass(frozen=True)
class NeighbourRow:
    """A neighbour's cells; ``hit`` says whether its value is the token."""

    weight: str
    distance: str
    came_by: str
    store: str
    document: str
    entry: str
    context: str
    value: str
    hit: bool


@dataclass(frozen=True)
class TokenDetails:
    """What is shown of a token.

    Attributes
    ----------
    text, number : the token, visible, and its place in the text, from 1.
    change : what retrieval brought.
    figures : the probabilities.
    hits : how many of the neighbours have the token; empty where that is not known.
    step : of a walk; empty without one.
    named : whether the neighbours' stores are named.
    """

    text: str
    number: int
    change: str
    figures: list[Figure]
    hits: str
    step: str
    neighbours: list[NeighbourRow]
    named: bool


def details_of(token: InspectedToken, number: int, named: bool) -> TokenDetails:
    """What is shown of a token, the ``number``-th; ``named`` as for ``TokenDetails``."""
    figures = [("LM", token.p_lm, "lm"), ("neighbours", token.p_knn, "knn")]
    if token.p_ngram is not None:
        figures.append(("n-grams", token.p_ngram, "knn"))
    figures.append(("mixture", token.p, "mixed"))
    return TokenDetails(
        text=_visible(token.text),
        number=number,
        change=change_in_words(token),
        figures=[Figure(name, probability(p), f"{100 * p:.2f}", kind) for name, p, kind in figures],
        hits="" if token.hits is None else hits_in_words(token.found or 0, token.hits),
        step=step_in_words(token.step, token.searched) if token.step else "",
        neighbours=[_row(neighbour, token) for neighbour in token.neighbours],
        named=named,
    )


def change_in_words(token: InspectedToken) -> str:
    """What retrieval brought, and whether there was a search."""
    if math.isinf(token.gain):
        change = "possible by retrieval alone" if token.gain > 0 else "made impossible by retrieval"
    elif abs(token.gain) < 5e-4:
        change = "retrieval changes nothing"
    else:
        factor, more = math.exp(min(abs(token.gain), 700)), "more" if token.gain > 0 else "less"
        times = f"{factor:,.2f}" if factor < 100 else f"{factor:,.0f}" if factor < 1e6 else f"{factor:.1e}"
        change = f"{times} times {more} probable by retrieval ({token.gain:+.3f} nats)"
    return change if token.searched else f"{change}; no search was made"


def hits_in_words(found: int, hits: int) -> str:
    """How many of the neighbours have the token as their value."""
    if not found:
        return ""
    return f"{hits:,} of {counted(found, 'neighbour')} {'has' if hits == 1 else 'have'} this token as value."


def step_in_words(step: WalkStep, searched: bool) -> str:
    """A step of a walk, in a sentence."""
    before = f"{counted(step.survivors, 'candidate')} of the step before had its token and led on"
    came = [f"{step.pointers:,} came as pointers"]
    if step.members:
        came.append(f"{step.members:,} from the pointers' clusters")
    came.append(f"{step.found:,} more by a search" if searched else "none by a search")
    return f"RetoMaton: {before}; {', '.join(came)}."


def probability(p: float) -> str:
    """A probability, with three digits that count."""
    return "0" if p == 0 else f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"


def _row(neighbour: Neighbour, token: InspectedToken) -> NeighbourRow:
    return NeighbourRow(
        weight=probability(neighbour.weight),
        distance=f"{neighbour.distance:,.1f}",
        came_by=neighbour.came_by or "",
        store=neighbour.store or "",
        document="" if neighbour.document is None else str(neighbour.document),
        entry=str(neighbour.entry),
        context=neighbour.context,
        value=_visible(neighbour.value),
        hit=neighbour.value == token.text,
    )


def _visible(text: str) -> str:
    return text.replace("\n", "⏎")
