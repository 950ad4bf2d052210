"""Python processes that begin with everything imported: a server, which has done nothing but import it, forks them.

An interpreter takes seconds until it has imported torch, transformers and lm-eval; these take milliseconds. Unlike a
`forks.Child` they know nothing of what the tests have done, and so begin also where a test's own threads would be in
the way of a fork. What is read from the environment while modules are imported is as the tests' is, whatever is given.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

from helpers.forks import as_an_interpreter, print_to
from helpers.places import SCRIPTS

# What the verbs import, at their beginning and when they load the tests' LM; and pytest, the tests' own beginning.
IMPORTED = [
    "datasets",
    "knn_lm_eval.benchmark.runner",
    "knn_lm_eval.cli.benchmark",
    "knn_lm_eval.cli.dump_datastore",
    "knn_lm_eval.make.dump",
    "knn_lm_eval.model.knn_hf",
    "knn_lm_eval.model.opening",
    "knn_lm_eval.search.indexing",
    "knn_lm_eval.system.processes",
    "pytest",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


class Ready:
    """A process under way, in the manner of ``subprocess.Popen``.

    Parameters
    ----------
    work : what it does; a function of a module, or a ``partial`` of one.
    environment : its variables.
    """

    def __init__(self, work: Callable[[], object], environment: Mapping[str, str] | None = None) -> None:
        self._folder = TemporaryDirectory(prefix="ready")
        self._printed = [Path(self._folder.name) / name for name in ("output", "errors")]
        for file in self._printed:
            file.touch()
        variables = dict(os.environ if environment is None else environment)
        self._process = _context.Process(target=_be, args=(work, variables, os.getcwd(), *map(str, self._printed)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status (below 0: the signal that killed it); None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, when it has ended."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise TimeoutError(f"still running after {timeout} seconds: {self.printed()}")
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def printed(self) -> tuple[str, str]:
        """Output and errors so far."""
        output, errors = (file.read_text(encoding="utf-8", errors="replace") for file in self._printed)
        return output, errors

    def completed(self, timeout: float = 600) -> CompletedProcess[str]:
        """What it came to, when it has ended."""
        status = self.wait(timeout)
        return CompletedProcess([], status, *self.printed())


def script(name: str, *arguments: object) -> Callable[[], object]:
    """What `python scripts/NAME.py ARGUMENTS` does."""
    return partial(_run_script, name, [str(argument) for argument in arguments])


def launch(work: Callable[[], object], processes: int, environment: Mapping[str, str]) -> list[Ready]:
    """Start processes as torchrun does, each with its rank; nobody ends the others where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = map(str, range(processes))
    return [Ready(work, {**environment, **world, **place, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]


def _run_script(name: str, arguments: list[str]) -> None:
    file = SCRIPTS / f"{name}.py"
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(SCRIPTS))
    runpy.run_path(str(file), run_name="__main__")


def _be(work: Callable[[], object], variables: dict[str, str], folder: str, output: str, errors: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    print_to(*(os.open(file, os.O_WRONLY | os.O_APPEND) for file in (output, errors)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = as_an_interpreter(work)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
