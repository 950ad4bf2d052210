"""Tokens and their neighbours as HTML: text coloured by what retrieval brought, neighbours on click."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from string import Template

from knn_lm_eval.report.tokens import InspectedToken

STRONGEST = 3.0  # nats; gains and losses beyond this have the deepest colour

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; font: 1rem/1.9 ui-monospace, monospace; }
.tokens button { all: unset; cursor: pointer; border-radius: 3px; white-space: pre-wrap; }
.tokens button:focus-visible, .tokens button:hover { outline: 2px solid currentColor; }
.tokens button.chosen { outline: 2px solid currentColor; }
.tokens button.saved { text-decoration: underline dotted; text-underline-offset: 4px; }
.neighbours { overflow-x: auto; }
.neighbours table { border-collapse: collapse; width: 100%; font-size: .9rem; }
.neighbours th, .neighbours td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8885; }
.neighbours th:last-child, .neighbours td:last-child { text-align: left; white-space: pre-wrap; }
.neighbours mark { background: #2f7fd155; color: inherit; border-radius: 3px; }
"""

SCRIPT = """
function showNeighbours(view, tokens) {
  const panel = view.querySelector(".neighbours"), buttons = view.querySelectorAll(".tokens button");
  const number = (x) => x === null ? "0" : x >= 0.001 ? x.toFixed(3) : x.toExponential(1);
  const cell = (row, text, tag = "td") => { const c = document.createElement(tag); c.textContent = text;
    row.append(c); return c; };
  function show(i) {
    buttons.forEach((b, j) => b.classList.toggle("chosen", i === j));
    const t = tokens[i], title = document.createElement("p"), table = document.createElement("table");
    title.textContent = `${JSON.stringify(t.text)}: p_LM ${number(t.p_lm)}, p_kNN ${number(t.p_knn)}, ` +
      `mixture ${number(t.p)}` + (t.searched ? "" : " (no search)");
    const head = table.insertRow();
    for (const name of ["weight", "distance", "entry", "context and value"]) cell(head, name, "th");
    for (const n of t.neighbours) {
      const row = table.insertRow();
      cell(row, n.weight.toFixed(4)); cell(row, n.distance.toFixed(1)); cell(row, n.entry);
      const text = cell(row, n.context), mark = document.createElement("mark");
      mark.textContent = n.value; text.append(mark);
    }
    panel.replaceChildren(title, table);
  }
  buttons.forEach((b, i) => b.addEventListener("click", () => show(i)));
  if (tokens.length) show(tokens.reduce((best, t, i) => t.gain > tokens[best].gain ? i : best, 0));
}
"""

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
$style
</style></head><body>
<h1>$title</h1>
$body
</body></html>
""")


def token_page(tokens: Sequence[InspectedToken], title: str, settings: str) -> str:
    """A whole page, which needs nothing from a network."""
    body = f"<p>{html.escape(settings)}</p>\n{token_view(tokens)}"
    return PAGE.substitute(title=html.escape(title), style=STYLE, body=f"<script>{SCRIPT}</script>\n{body}")


def token_view(tokens: Sequence[InspectedToken]) -> str:
    """The coloured text and the panel for neighbours; the page around it has ``STYLE`` and ``SCRIPT``."""
    buttons = "".join(_button(token) for token in tokens)
    data = [
        {
            "text": token.text,
            "p_lm": token.p_lm,
            "p_knn": token.p_knn,
            "p": token.p,
            "gain": max(-1e9, min(1e9, token.gain)),  # JSON has no infinity
            "searched": token.searched,
            "neighbours": [vars(neighbour) for neighbour in token.neighbours],
        }
        for token in tokens
    ]
    # Inside a script element "<" may end it, whatever it stands in.
    numbers = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<div class="token-view">\n'
        "<p>Blue: retrieval made the token more probable; orange: less. The deepest colour is a factor of "
        f"{math.exp(STRONGEST):.0f}. Dotted: no search was made. Click a token for its neighbours.</p>\n"
        f'<div class="tokens">{buttons}</div>\n<div class="neighbours"></div>\n'
        f"<script>showNeighbours(document.currentScript.parentElement, {numbers})</script>\n</div>\n"
    )


def _button(token: InspectedToken) -> str:
    strength = min(abs(token.gain), STRONGEST) / STRONGEST
    colour = f"rgb({'47 127 209' if token.gain > 0 else '224 122 32'} / {0.75 * strength:.3f})"
    saved = "" if token.searched else ' class="saved"'
    # A button is a box of its own, in which a line's end would not end the line.
    text = html.escape(token.text.replace("\n", "⏎"))
    return f'<button{saved} style="background:{colour}">{text}</button>' + "<br>" * token.text.count("\n")
