"""Tokens and their neighbours as a page: text coloured by what retrieval brought, neighbours on click."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knn_lm_eval.report.rendering import render
from knn_lm_eval.report.tokens import InspectedToken

STRONGEST = 3.0  # nats; gains and losses beyond this have the deepest colour
MORE_PROBABLE, LESS_PROBABLE = "47 127 209", "224 122 32"  # red, green and blue
LARGEST_GAIN = 1e9  # JSON has no infinity


@dataclass(frozen=True)
class TokenButton:
    """A token as a page shows it: in one line, with the line ends that follow; ``saved`` is dotted."""

    text: str
    colour: str
    saved: bool
    line_ends: int


@dataclass(frozen=True)
class TokenView:
    """What the template shows of some tokens; ``data`` is for the page's script."""

    settings: str
    buttons: list[TokenButton]
    data: list[dict[str, Any]]
    strongest_factor: str = f"{math.exp(STRONGEST):.0f}"


def token_page(tokens: Sequence[InspectedToken], title: str, settings: str) -> str:
    """A whole page, which needs nothing from a network."""
    return render("token_page.html.j2", title=title, subtitle=settings, view=view_tokens(tokens, settings))


def view_tokens(tokens: Sequence[InspectedToken], settings: str) -> TokenView:
    """Tokens made ready for the template."""
    return TokenView(settings, [_button(token) for token in tokens], [_data(token) for token in tokens])


def _button(token: InspectedToken) -> TokenButton:
    strength = min(abs(token.gain), STRONGEST) / STRONGEST
    colour = f"rgb({MORE_PROBABLE if token.gain > 0 else LESS_PROBABLE} / {0.75 * strength:.3f})"
    # A button is a box of its own, in which a line's end would not end the line.
    return TokenButton(token.text.replace("\n", "⏎"), colour, not token.searched, token.text.count("\n"))


def _data(token: InspectedToken) -> dict[str, Any]:
    return asdict(token) | {"gain": max(-LARGEST_GAIN, min(LARGEST_GAIN, token.gain))}
