"""The parts of the explorer's page, each a piece of HTML; all texts are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knn_lm_eval.report.rendering import render, render_macro
from knn_lm_eval.report.token_details import details_of, probability
from knn_lm_eval.report.token_page import SCALE, TokenView, buttons_of
from knn_lm_eval.report.tokens import CAME_BY, InspectedToken

TEMPLATE = "explore.html.j2"


@dataclass(frozen=True)
class Said:
    """A sentence's numbers: perplexities, what changed, how the text was read, and the settings."""

    mixed: str
    lm: str
    change: str
    read: str
    model_args: str


@dataclass(frozen=True)
class WalkRow:
    """A step's cells; ``shares`` are (how candidates came, percent of p_kNN)."""

    text: str
    survivors: str
    pointers: str
    members: str
    found: str
    shares: list[tuple[str, str]]
    p_knn: str
    p: str


@dataclass(frozen=True)
class Sides:
    """Two continuations: what both begin with, and how each goes on."""

    same: str
    with_retrieval: str
    by_lm: str
    said: str


def style() -> str:
    """The page's style sheet."""
    return render("explore.css.j2")


def heading(title: str, subtitle: str) -> str:
    """The page's title."""
    return render_macro(TEMPLATE, "heading", title, subtitle)


def complaint(sentence: str) -> str:
    """What is wrong."""
    return render_macro(TEMPLATE, "complaint", sentence)


def note(sentence: str) -> str:
    """A sentence in place of what is not there."""
    return render_macro(TEMPLATE, "note", sentence)


def summary(tokens: Sequence[InspectedToken], read: str, model_args: str) -> str:
    """What retrieval did to a text as a whole; ``read`` says how it was read, ``model_args`` with which settings."""
    mixed, lm = perplexity([token.p for token in tokens]), perplexity([token.p_lm for token in tokens])
    change = f"{mixed / lm - 1:+.1%}" if 0 < lm < math.inf and mixed < math.inf else "no finite change"
    return render_macro(TEMPLATE, "summary", Said(_number(mixed), _number(lm), change, read, model_args))


def perplexity(probabilities: Sequence[float]) -> float:
    """Per token; infinity where one is impossible."""
    if not all(probabilities):
        return math.inf
    mean = sum(map(math.log, probabilities)) / len(probabilities)
    return math.exp(-mean) if mean > -700 else math.inf


def coloured_tokens(tokens: Sequence[InspectedToken], chosen: int) -> str:
    """The text, coloured by what retrieval brought; the ``chosen`` token is outlined."""
    return render_macro(TEMPLATE, "tokens", TokenView("", buttons_of(tokens), [], chosen, SCALE))


def token_details(token: InspectedToken, number: int, named: bool) -> str:
    """The details of the ``number``-th token, from 1; ``named`` says whether the neighbours' stores are named."""
    return render_macro(TEMPLATE, "details", details_of(token, number, named))


def walk(tokens: Sequence[InspectedToken]) -> str:
    """RetoMaton's steps, one by one."""
    return render_macro(TEMPLATE, "walk", [_walk_row(token) for token in tokens])


def continuations(same: str, with_retrieval: str, by_lm: str, said: str) -> str:
    """Two continuations side by side: what both begin with, and how each goes on."""
    return render_macro(TEMPLATE, "sides", Sides(same, with_retrieval, by_lm, said))


def _walk_row(token: InspectedToken) -> WalkRow:
    step = token.step
    assert step is not None, "asked only of a walk"
    weights = step.pointer_weight, step.member_weight, step.found_weight
    row: dict[str, Any] = {name: f"{getattr(step, name):,}" for name in ("survivors", "pointers", "members")}
    return WalkRow(
        text=token.text.replace("\n", "⏎"),
        found=f"{step.found:,}" if token.searched else "–",
        shares=[(name, f"{100 * weight:.1f}") for name, weight in zip(CAME_BY, weights, strict=True)],
        p_knn=probability(token.p_knn),
        p=probability(token.p),
        **row,
    )


def _number(perplexity: float) -> str:
    return "infinite" if math.isinf(perplexity) else f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.1e}"
