"""A shown command, run as a shell's user runs it, in a child process that begins with everything imported."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.loggers
import pytest
from helpers.forks import Child, Ended
from helpers.hub_contents import Hub
from helpers.shown_tables import STAND_INS

from knn_lm_eval.store.index_files import DEFAULT_INDEX
from knn_lm_eval.store.manifest import Manifest

PROGRAMS = ("knn-lm-eval", "lm_eval", "python", "torchrun")
# Prints the number of its arguments, these, and its environment, each with a null byte behind it.
SHIM = '#!/bin/bash\nprintf "%s\\0" "$(($# + 1))" "${0##*/}" "$@"\n/usr/bin/env -0\n'
OUTPUTS = ("--output", "--output_path", "--html", "--report", "--json")
RECORDS = re.compile(r"(?:^|,)records=([^,]+)")
ARRAY_JOB = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "16"}
SERVED, INTERRUPTED = re.compile(r"Open (http://\S+/) in a browser"), 130
SERVING_SECONDS = 300


def run_line(line: str, here: Path, hub: Hub) -> Ended:
    """Run a command line in the folder ``here``, where its network is the hub.

    What it says that it writes is not there before and must be there afterwards.

    Raises
    ------
    AssertionError
        where it is not a single call of a program that is known here, fails, or has not written what it was to.
    """
    arguments, environment = as_the_shell_has_it(line, here, os.environ | hub.environment() | ARRAY_JOB)
    outputs = [here / path for path in written(arguments)]
    for path in outputs:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    take_away(arguments, here)

    def work() -> object:
        of_this_hub(hub)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(here)
        for option, logger in STAND_INS.items():
            if option in arguments:
                setattr(lm_eval.loggers, logger, Told)
        sys.argv = list(arguments)
        return call(arguments)

    ended = Child(visited(work) if arguments[1:2] == ["explore"] else work, here).ended()
    expected = INTERRUPTED if arguments[1:2] == ["explore"] else 0
    assert ended.status == expected and "Traceback" not in ended.said, f"{line}\n{ended.said[-5000:]}"
    missing = [str(path.relative_to(here)) for path in outputs if not path.exists()]
    assert not missing, f"{line}\nhas not written {missing}:\n{ended.said[-5000:]}"
    return ended


def as_the_shell_has_it(line: str, here: Path, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment that bash gives to the program; it runs nothing but what the tests know."""
    shims = here / ".shims"
    shims.mkdir(exist_ok=True)
    for name in PROGRAMS:
        (shims / name).write_text(SHIM)
        (shims / name).chmod(0o755)
    command = ["/bin/bash", "--restricted", "-c", line]
    shell = subprocess.run(command, cwd=here, env={**environment, "PATH": str(shims)}, capture_output=True, text=True)
    assert shell.returncode == 0 and shell.stdout, f"{line}: the tests can run no such program: {shell.stderr}"
    count, *words = shell.stdout.split("\0")[:-1]
    arguments, variables = words[: int(count)], words[int(count) :]
    assert all("=" in variable for variable in variables), f"{line}: more than one command"
    return arguments, dict(variable.split("=", 1) for variable in variables) | {"PATH": environment["PATH"]}


def take_away(arguments: Sequence[str], here: Path) -> None:
    """Take the index, or the clusters, that a command makes out of the store that it makes them in."""
    given = dict(zip(arguments, arguments[1:], strict=False))
    if arguments[1] == "build_index":
        name = given.get("--name", DEFAULT_INDEX)
        made: tuple[str, ...] = (f"{name}.json", f"{name}.faiss")
    elif arguments[1] == "cluster_datastore":
        made = (f"clusters/{given.get('--name', given['--method'])}/",)
    else:
        return
    store = here / given["--datastore"]
    manifest = Manifest.read(store)
    derived = {name: record for name, record in manifest.derived.items() if not name.startswith(made)}
    for name in manifest.derived.keys() - derived.keys():
        (store / name).unlink()
    replace(manifest, derived=derived).write(store)


def written(arguments: Sequence[str]) -> list[str]:
    """The files and folders that a command's arguments name as what it writes."""
    named = [value for name, value in zip(arguments, arguments[1:], strict=False) if name in OUTPUTS]
    return named + [found for word in arguments for found in RECORDS.findall(word)]


def call(arguments: Sequence[str]) -> object:
    """What the program does."""
    program, *rest = arguments
    if program == "knn-lm-eval":
        from knn_lm_eval.cli import main as cli

        sys.exit(cli.main())
    if program == "lm_eval":
        from lm_eval.__main__ import cli_evaluate

        return cli_evaluate()
    if program == "torchrun":
        return run_with_torchrun(rest)
    sys.argv = list(rest)
    return runpy.run_path(rest[0], run_name="__main__")


def run_with_torchrun(arguments: Sequence[str]) -> None:
    """As ``torchrun`` does, but its processes are forks of this one, so that they have everything imported."""
    from torch.distributed import run
    from torch.distributed.launcher import elastic_launch

    def launch(config: Any, entrypoint: object) -> Callable[..., object]:
        config.start_method = "fork"
        return elastic_launch(config, one_of_several)

    run.elastic_launch = launch  # type: ignore[assignment, misc]
    run.main(list(arguments))


def one_of_several(*words: str) -> None:
    """What one of torchrun's processes does: ``-u SCRIPT ARGUMENTS`` or ``-u -m MODULE ARGUMENTS``."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 (it knows of one process)
    PartialState._reset_state()  # noqa: SLF001
    program = list(words[1:])
    sys.argv = program[1:] if program[0] == "-m" else program
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


class Told:
    """Stands for lm-eval's logger of a tracker that is not installed: what the run must have told it at the end."""

    def __init__(self, given: dict[str, Any], config: dict[str, Any] | None = None) -> None:
        assert given == {"project": "knn"}
        self.run, self.told = self, list[str]()

    def post_init(self, results: dict[str, Any]) -> None:
        self.told += ["settings"] if results["config"]["knn"]["k"] else []

    def log_eval_result(self) -> None:
        self.told.append("results")

    def log_eval_samples(self, samples: dict[str, Any]) -> None:
        self.told.append("samples")

    def finish(self) -> None:
        assert self.told == ["settings", "results", "samples"]


def visited(work: Callable[[], object]) -> Callable[[], object]:
    """Work that serves a page: a visitor fetches it, and then Ctrl-C is pressed."""

    def visit() -> None:
        until, said = time.monotonic() + SERVING_SECONDS, ""
        try:
            while time.monotonic() < until and not SERVED.search(said):
                time.sleep(0.05)
                said = os.pread(1, 2**20, 0).decode(errors="replace")  # where Child keeps what is printed
            urllib.request.urlopen(SERVED.findall(said)[0]).close()
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            traceback.print_exc()
            os.kill(os.getpid(), signal.SIGTERM)

    def serve() -> object:
        threading.Thread(target=visit, daemon=True).start()
        return work()

    return serve


def of_this_hub(hub: Hub) -> None:
    """Have the libraries of this process, which is to end, ask the hub."""
    patch = pytest.MonkeyPatch()
    hub.patch(patch)
    home = Path(hub.environment()["HF_HOME"])
    for name, value in {
        "datasets.config.HF_ENDPOINT": hub.url,
        "datasets.config.HF_HUB_OFFLINE": False,
        "datasets.config.HF_DATASETS_CACHE": home / "data_sets",
        "huggingface_hub.constants.HF_HUB_CACHE": str(home / "models"),
    }.items():
        patch.setattr(name, value)
