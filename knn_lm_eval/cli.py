"""The command `knn-lm-eval <verb>`: the scripts by name, for those who installed the package."""

import ast
import difflib
import sys
from pathlib import Path
from types import ModuleType

from knn_lm_eval import __version__
from knn_lm_eval.paths import scripts_dir

PROG = "knn-lm-eval"


def verbs() -> dict[str, Path]:
    """Each verb and its script."""
    return {path.stem: path for path in sorted(scripts_dir().glob("*.py")) if not path.stem.startswith("_")}


def summary(script: Path) -> str:
    """The first line of a script's docstring, read without running the script."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def usage() -> str:
    scripts = verbs()
    width = max(map(len, scripts), default=0)
    lines = [f"  {verb:{width}}  {summary(script)}".rstrip() for verb, script in scripts.items()]
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


def run(script: Path, args: list[str]) -> None:
    """Run a script as `python script args` would, but under our command's name in its messages."""
    main_module = ModuleType("__main__")
    main_module.__file__ = str(script)
    sys.modules["__main__"] = main_module
    sys.argv = [f"{PROG} {script.stem}", *args]
    exec(compile(script.read_bytes(), str(script), "exec"), vars(main_module))


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    verb = args[0].replace("-", "_")
    scripts = verbs()
    if verb in scripts:
        run(scripts[verb], args[1:])
        return 0
    near = difflib.get_close_matches(verb, scripts) or list(scripts)
    print(f"{PROG}: no verb '{args[0]}'; did you mean {' or '.join(near)}?", file=sys.stderr)
    return 2
