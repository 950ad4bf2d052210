"""Completing verbs, options and model arguments in a shell, with argcomplete (extra `completion`)."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

COMPLETING = "_ARGCOMPLETE"  # argcomplete's variable, which is set where a shell asks what a command may go on to

# Model arguments that are folders or files; of a datastore there may be several, with + between them.
PATHS = ("datastore", "pretrained", "tokenizer", "peft", "delta", "params", "records")
# The arguments of hf that one gives most; lm-eval would take seconds to tell them all.
LM_ARGUMENTS = ("pretrained", "dtype", "max_length", "batch_size", "device", "softmax_dtype", "peft", "revision")


def complete_command(prog: str, verbs: Collection[str]) -> None:
    """Answer the shell, and end: with verbs, or with what may follow one."""
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    *_, before, _ = argcomplete.split_line(line, point)  # last but one, the words before the one that is completed
    words = before[int(os.environ[COMPLETING]) :]
    verb = words[0].replace("-", "_") if words else ""
    if verb in verbs:
        os.environ[COMPLETING] = str(int(os.environ[COMPLETING]) + 1)
        sys.argv = [f"{prog} {verb}", *words[1:]]
        import_module(f"knn_lm_eval.cli.{verb}").parse_arguments()  # its parser calls complete_options
    parser = argparse.ArgumentParser(prog)
    parser.add_argument("verb", choices=sorted(verbs))
    parser.add_argument("--version", action="store_true")
    argcomplete.autocomplete(parser)


def complete_options(parser: argparse.ArgumentParser, actions: Collection[argparse.Action]) -> None:
    """Answer the shell with a verb's options or their values, and end."""
    import argcomplete

    for action in actions:
        if action.dest == "model_args":
            action.completer = complete_model_args  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def complete_model_args(prefix: str, **_: Any) -> list[str]:
    """What ``prefix`` (``pretrained=M,datas``) may go on to: arguments' names, and paths behind those that take one."""
    from argcomplete.completers import FilesCompleter

    last = prefix.rpartition(",")[2]
    name, sign, value = last.partition("=")
    if not sign:
        head = prefix[: len(prefix) - len(last)]
        known = dict.fromkeys((*LM_ARGUMENTS, *setting_names()))
        return [f"{head}{one}=" for one in known if one.startswith(last)]
    if name not in PATHS:
        return []
    path = value.rpartition("+")[2] if name == "datastore" else value
    head = prefix[: len(prefix) - len(path)]
    return [f"{head}{found}" for found in FilesCompleter()(path)]


def setting_names() -> list[str]:
    """The retrieval settings' names, read without importing what they need, for which no shell would wait."""
    source = Path(__file__).parents[1] / "model" / "settings.py"
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    (settings,) = (one for one in classes if one.name == "RetrievalSettings")
    fields = [node.target for node in settings.body if isinstance(node, ast.AnnAssign)]
    return [field.id for field in fields if isinstance(field, ast.Name)]
