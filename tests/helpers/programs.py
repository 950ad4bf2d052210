"""Scripts and lm-eval's command, run to their end in processes that begin with everything imported."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

from helpers.ready import Ready, script


def run_script(name: str, *arguments: object) -> CompletedProcess[str]:
    """`python scripts/NAME.py ARGUMENTS`."""
    return Ready(script(name, *arguments)).completed()


def run_lm_eval(*arguments: object, environment: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """`python -m lm_eval ARGUMENTS`, as `lm_eval_command` does it."""
    return Ready(lm_eval_command(*arguments), environment).completed()


def lm_eval_command(*arguments: object) -> Callable[[], object]:
    """What `python -m lm_eval ARGUMENTS` does, but for what takes most of its time: it doesn't look at the machine, nor
    through its own thousands of tasks."""
    return partial(be_lm_eval, [str(argument) for argument in arguments])


def be_lm_eval(arguments: list[str]) -> None:
    from lm_eval import evaluator
    from lm_eval.tasks._index import TaskIndex

    evaluator.add_env_info = lambda _: None
    TaskIndex._iter_yaml_files = staticmethod(others_task_files)
    sys.argv = ["lm_eval", *arguments]
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)


def others_task_files(folder: Path) -> Iterator[Path]:
    """The task files below a folder, as lm-eval finds them, but none of lm-eval's own."""
    from lm_eval import tasks

    own = Path(tasks.__file__).parent
    yield from (() if folder == own else sorted(folder.glob("**/*.yaml")))
