"""Tokens and their neighbours as a page: text coloured by what retrieval brought, neighbours on click."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knn_lm_eval.report.rendering import render
from knn_lm_eval.report.token_details import TokenDetails, details_of
from knn_lm_eval.report.tokens import InspectedToken

STRONGEST = 3.0  # nats; gains and losses beyond this have the deepest colour
DEEPEST = 0.75  # opacity
MORE_PROBABLE, LESS_PROBABLE = "47 127 209", "224 122 32"  # red, green and blue


@dataclass(frozen=True)
class TokenButton:
    """A token as a page shows it: in one line, with the line ends that follow; ``saved`` is dotted."""

    text: str
    colour: str
    saved: bool
    line_ends: int

    def classes(self, chosen: bool) -> str:
        """The button's classes."""
        return " ".join(["saved"] * self.saved + ["chosen"] * chosen)


@dataclass(frozen=True)
class TokenView:
    """What the templates show of some tokens.

    Attributes
    ----------
    settings : a heading.
    buttons : the text.
    details : of each token; none where they are asked for one by one.
    chosen : the token whose details are open.
    scale : the legend's colours, from the largest loss to the largest gain.
    """

    settings: str
    buttons: list[TokenButton]
    details: list[TokenDetails]
    chosen: int
    scale: tuple[str, ...]
    strongest_factor: str = f"{math.exp(STRONGEST):.0f}"

    @property
    def saves(self) -> bool:
        """Whether some token was not searched."""
        return any(button.saved for button in self.buttons)


def token_page(tokens: Sequence[InspectedToken], title: str, settings: str) -> str:
    """A whole page, which needs nothing from a network."""
    return render("token_page.html.j2", title=title, subtitle=settings, view=view_tokens(tokens, settings))


def view_tokens(tokens: Sequence[InspectedToken], settings: str) -> TokenView:
    """Tokens made ready for the template, the one that retrieval changed most chosen."""
    several_stores = len({neighbour.store for token in tokens for neighbour in token.neighbours}) > 1
    details = [details_of(token, number, several_stores) for number, token in enumerate(tokens, start=1)]
    return TokenView(settings, buttons_of(tokens), details, most_changed(tokens), SCALE)


def buttons_of(tokens: Sequence[InspectedToken]) -> list[TokenButton]:
    """The tokens as a page shows them."""
    # A button is a box of its own, in which a line's end would not end the line.
    return [
        TokenButton(token.text.replace("\n", "⏎"), colour_of(token.gain), not token.searched, token.text.count("\n"))
        for token in tokens
    ]


def most_changed(tokens: Sequence[InspectedToken]) -> int:
    """The number of the token that retrieval made more, or less, probable by the largest factor."""
    return max(range(len(tokens)), key=lambda i: abs(tokens[i].gain), default=0)


def colour_of(gain: float) -> str:
    """What retrieval brought, in nats, as a colour of CSS."""
    strength = min(abs(gain), STRONGEST) / STRONGEST
    return f"rgb({MORE_PROBABLE if gain > 0 else LESS_PROBABLE} / {DEEPEST * strength:.3f})"


SCALE = tuple(colour_of(STRONGEST * step / 2) for step in (-2, -1, 0, 1, 2))
