"""What a verb reads its arguments with: help that ends with an example, and mistyped options that are told."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from knn_lm_eval.cli.completion import COMPLETING, complete_options
from knn_lm_eval.errors import did_you_mean

NUMBER = re.compile(r"-(\d|\.\d|inf)")  # a value that begins as an option does


class VerbParser(argparse.ArgumentParser):
    """argparse's, with an example at the end of the help; of options that are not there the nearest one is named.

    Parameters
    ----------
    about : what the verb does.
    example : a whole command that runs, `knn-lm-eval VERB ...`.
    **settings : of ``argparse.ArgumentParser``.
    """

    def __init__(self, about: str | None, example: str, **settings: Any) -> None:
        super().__init__(description=about, **settings)
        self.example = example
        self.given: list[str] = []

    def format_help(self) -> str:
        return f"{super().format_help()}\nexample:\n  {self.example}\n"

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if COMPLETING in os.environ:
            complete_options(self, self._actions)
        return super().parse_args(args, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        # An option that isn't there comes before what argparse has to say, which may be a consequence (the option that
        # was meant is missing, say).
        unknown = unknown_options(self.given, self._option_string_actions)
        super().error("; ".join(unknown) or message)


def unknown_options(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """A part of a sentence for each option in ``given`` that is none of the ``known`` ones, nor begins one."""
    said = []
    for argument in given:
        if argument == "--":
            break
        name = argument.partition("=")[0]
        is_option = len(name) > 1 and name.startswith("-") and " " not in name and not NUMBER.match(name)
        if is_option and not any(option.startswith(name) for option in known):
            meant = f"--{name.lstrip('-')}"
            said.append(f"there is no option {name}{did_you_mean(meant, known) or '; --help shows them'}")
    return said
