"""Pages from the templates beside this module: all that is put in is escaped, whatever it holds."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from knn_lm_eval.report.look import PALETTE

# CSS variable -> its colour in light and in dark: what only pages use, beside what pictures use.
PAGE_PALETTE = PALETTE | {
    "muted": ("#59626e", "#a3adba"),
    "line": ("#d5dae1", "#303843"),
    "page": ("#f6f7f9", "#0b0e12"),
    "warning": ("#8a4b00", "#ffc977"),
    "warning-back": ("#fff3dc", "#2e230f"),
    "marked": ("#bcd7f2", "#1f4a75"),
}


def render(template: str, **values: Any) -> str:
    """A page from ``templates/TEMPLATE``; raises jinja2's UndefinedError where a value is missing."""
    return _environment().get_template(template).render(palette=PAGE_PALETTE, **values)


def render_macro(template: str, macro: str, *values: Any) -> str:
    """A part of a page, from a macro of ``templates/TEMPLATE``; what is put in is escaped as in ``render``."""
    return str(getattr(_environment().get_template(template).module, macro)(*values))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("knn_lm_eval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
