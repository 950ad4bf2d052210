"""The commands that do a recipe's steps by hand, as one would type them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

PROG = "knn-lm-eval"


def command_line(verb: str, positional: Sequence[str], **options: Any) -> str:
    """A verb with its options: None and False are left out, True is the option alone, lists are joined by commas."""
    words = [PROG, verb, *positional]
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    return shlex.join(words)


def model_args_text(args: Mapping[str, Any]) -> str:
    """Arguments as ``--model_args`` and ``--metadata`` take them."""
    return ",".join(f"{name}={value}" for name, value in args.items())
