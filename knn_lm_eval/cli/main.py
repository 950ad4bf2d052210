"""The command `knn-lm-eval <verb>`: each module of this folder that has a `main` is a verb, by its name.

Verbs import what they need when their arguments are parsed: help and mistyped arguments should not wait for torch.
"""

from __future__ import annotations

import ast
import functools
import os
import shutil
import sys
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from knn_lm_eval.cli.completion import COMPLETING, complete_command
from knn_lm_eval.errors import did_you_mean, naming_missing_packages, report_user_errors, say_interrupted
from knn_lm_eval.version import __version__

if TYPE_CHECKING:
    import argparse

PROG = "knn-lm-eval"
NOTHING_KEPT = "nothing was written; start again."
WITH_RESUME = "what is done is kept; go on with the same command and --resume."
SAME_COMMAND = "what is done is kept; the same command goes on."
NOT_VERBS = ("__init__", "__main__", "arguments", "completion", "main", "parsing")
# All verbs, in the order in which one comes to need them.
GROUPS = {
    "begin": ("doctor", "first_run", "reproduce"),
    "make a datastore": (
        *("dump_datastore", "fetch_datastore", "import_datastore", "build_index", "cluster_datastore"),
        *("build_suffix_array", "verify_datastore", "push_datastore"),
    ),
    # Where evaluating itself is looked for and not found among the verbs.
    "evaluate (lm_eval --model knn-hf --model_args datastore=STORE --tasks TASKS, and many settings by)": (
        *("tune", "benchmark", "compare", "foss_curve", "store_sizes"),
    ),
    "look inside": ("explore", "inspect_neighbours", "analyse"),
    "change it, or make it smaller": (
        *("append_datastore", "remove_documents", "compact_datastore", "prune_datastore", "project_datastore"),
    ),
    "measure": ("speed", "compare_indexes", "grow_datastore"),
}
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
    """What `knn-lm-eval` and `knn-lm-eval --help` print: a line per verb, as wide as the terminal."""
    modules = verbs()
    grouped = {title: [name for name in names if name in modules] for title, names in GROUPS.items()}
    grouped["more"] = [name for name in modules if not any(name in names for names in GROUPS.values())]
    width, room = max(map(len, modules)), shutil.get_terminal_size((120, 24)).columns
    lines = [f"usage: {PROG} VERB [arguments]"]
    for title, names in grouped.items():
        if names:
            lines += ["", f"{title}:"]
            lines += [_shortened(f"  {name:{width}}  {summary(modules[name])}", room) for name in names]
    return "\n".join([*lines, "", f"`{PROG} VERB --help` explains a verb's arguments, with an example."])


def _shortened(line: str, room: int) -> str:
    return line if len(line) <= room else f"{line[: room - 3].rstrip()}..."


def meant(name: str, known: Collection[str]) -> str:
    """The end of a sentence about a verb that isn't there: those that have its words, or the nearest one."""
    having = [verb for verb in known if name in verb]
    if having:
        return f"; did you mean {' or '.join(having)}?"
    return did_you_mean(name, known) or f"; {PROG} alone lists them"


def main(argv: list[str] | None = None) -> int:
    """Run the verb that the arguments name; returns the exit status."""
    args = sys.argv[1:] if argv is None else argv
    if COMPLETING in os.environ:
        complete_command(PROG, verbs())
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
        print(f"{PROG}: no verb '{args[0]}'{meant(name, known)}", file=sys.stderr)
        return 2
    sys.argv = [f"{PROG} {name}", *args[1:]]  # argparse names the program by it
    try:
        import_module(f"knn_lm_eval.cli.{name}").main()
    except KeyboardInterrupt:  # while its modules were read
        say_interrupted(NOTHING_KEPT)
        return 130
    return 0
