"""The command `knn-lm-eval <verb>`: each module of this folder that has a `main` is a verb, by its name.

Verbs import what they need when their arguments are parsed: help and mistyped arguments should not wait for torch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from knn_lm_eval.errors import naming_missing_packages, report_user_errors, say_interrupted
from knn_lm_eval.version import __version__

if TYPE_CHECKING:
    import argparse

PROG = "knn-lm-eval"
NOTHING_KEPT = "nothing was written; start again."
WITH_RESUME = "what is done is kept; go on with the same command and --resume."
SAME_COMMAND = "what is done is kept; the same command goes on."
NOT_VERBS = ("__init__", "__main__", "arguments", "main")
RENAMED = {"bench": "speed"}  # old names, which still answer


def verb(
    parse_arguments: Callable[[], argparse.Namespace],
    log_level: str = "WARNING",
    kept: str | Callable[[argparse.Namespace], str] = NOTHING_KEPT,
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[], None]]:
    """Make a verb's ``main`` of a function that takes the parsed arguments.

    User errors, missing packages, Ctrl-C and SIGTERM end the program with one sentence, which says of the latter two
    what is ``kept`` and how to go on (it may depend on the arguments), and messages of ``log_level`` and above go to
    standard error.
    """

    def decorate(work: Callable[[argparse.Namespace], None]) -> Callable[[], None]:
        @functools.wraps(work)
        def main() -> None:
            import logging

            report_user_errors()
            arguments = parse_arguments()
            said = kept if isinstance(kept, str) else kept(arguments)
            report_user_errors(said)
            logging.basicConfig(level=log_level, format="%(levelname)s %(message)s")
            try:
                with naming_missing_packages():
                    work(arguments)
            except KeyboardInterrupt:
                say_interrupted(said)
                raise SystemExit(130) from None

        return main

    return decorate


def verbs() -> dict[str, Path]:
    """Each verb and its module's file."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in NOT_VERBS}


def summary(module: Path) -> str:
    """The first line of a module's docstring, read without importing it."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def usage() -> str:
    """What `knn-lm-eval --help` prints."""
    modules = verbs()
    width = max(map(len, modules))
    lines = [f"  {name:{width}}  {summary(module)}".rstrip() for name, module in modules.items()]
    return "\n".join(
        [
            f"usage: {PROG} <verb> [arguments]",
            "",
            "verbs:",
            *lines,
            "",
            f"`{PROG} <verb> --help` explains a verb's arguments.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the verb that the arguments name; returns the exit status."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    name = args[0].replace("-", "_")
    if name in RENAMED:
        print(f"{PROG}: {name} is called {RENAMED[name]} now.", file=sys.stderr)
        name = RENAMED[name]
    known = verbs()
    if name not in known:
        near = difflib.get_close_matches(name, known) or list(known)
        print(f"{PROG}: no verb '{args[0]}'; did you mean {' or '.join(near)}?", file=sys.stderr)
        return 2
    sys.argv = [f"{PROG} {name}", *args[1:]]  # argparse names the program by it
    try:
        import_module(f"knn_lm_eval.cli.{name}").main()
    except KeyboardInterrupt:  # while its modules were read
        say_interrupted(NOTHING_KEPT)
        return 130
    return 0
