"""Scripts and lm-eval's command, run to their end in processes that begin with everything imported."""

from __future__ import annotations

import json
import runpy
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

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


CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode() + b"\\n")
    status, output, errors = json.load(server.makefile())
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(status)
"""


@contextmanager
def ready_command() -> Iterator[Path]:
    """A folder for a shell's PATH with a `knn-lm-eval` whose verbs are done by processes that have all imported.

    What they print appears when they have ended; whoever measures its process measures one that waits.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            (verb, *arguments), environment = json.loads(self.rfile.readline())
            done = Ready(script(verb, *arguments), environment).completed()
            self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode())

    with (
        TemporaryDirectory(prefix="ready") as folder,  # its name is short, as that of a socket must be
        socketserver.ThreadingUnixStreamServer(f"{folder}/socket", Handler) as server,
    ):
        command = Path(folder) / "knn-lm-eval"
        command.write_text(CLIENT.format(python=sys.executable, address=f"{folder}/socket"))
        command.chmod(0o755)
        threading.Thread(target=server.serve_forever).start()
        try:
            yield Path(folder)
        finally:
            server.shutdown()


def others_task_files(folder: Path) -> Iterator[Path]:
    """The task files below a folder, as lm-eval finds them, but none of lm-eval's own."""
    from lm_eval import tasks

    own = Path(tasks.__file__).parent
    yield from (() if folder == own else sorted(folder.glob("**/*.yaml")))
