"""The command `knn-lm-eval <verb>`: each module of this folder that has a `main` is a verb, by its name."""

from __future__ import annotations

import ast
import difflib
import sys
from importlib import import_module
from pathlib import Path

from knn_lm_eval.version import __version__

PROG = "knn-lm-eval"
NOT_VERBS = ("__init__", "__main__", "arguments", "main")
RENAMED = {"bench": "speed"}  # old names, which still answer


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
    lines = [f"  {verb:{width}}  {summary(module)}".rstrip() for verb, module in modules.items()]
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
    verb = args[0].replace("-", "_")
    if verb in RENAMED:
        print(f"{PROG}: {verb} is called {RENAMED[verb]} now.", file=sys.stderr)
        verb = RENAMED[verb]
    known = verbs()
    if verb not in known:
        near = difflib.get_close_matches(verb, known) or list(known)
        print(f"{PROG}: no verb '{args[0]}'; did you mean {' or '.join(near)}?", file=sys.stderr)
        return 2
    sys.argv = [f"{PROG} {verb}", *args[1:]]  # argparse names the program by it
    import_module(f"knn_lm_eval.cli.{verb}").main()
    return 0
