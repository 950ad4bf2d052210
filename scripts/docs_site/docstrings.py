"""How this project writes docstrings, for mkdocstrings' parser.

NumPy's style has a parameter's type behind its name. Here the type stands in the signature alone, and what it is, with
its shape, stands behind the name: ``values : int32 [count], the tokens``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Parameters|Attributes)\n-{3,}\n(?:(?!\n\w[\w ]*\n-{3,}\n).)*", re.MULTILINE | re.DOTALL)
DESCRIBED = re.compile(r"^([\w*, ]+) : (.+)$", re.MULTILINE)


class DescriptionsBehindNames(griffe.Extension):
    """Puts what stands behind a parameter's name where NumPy's style has descriptions: below it."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_numpy_has_it(obj.docstring.value)


def as_numpy_has_it(docstring: str) -> str:
    """The docstring with each parameter's description on lines of its own."""
    return SECTION.sub(lambda section: DESCRIBED.sub(r"\1\n    \2", section[0]), docstring)
