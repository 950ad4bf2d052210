"""What is compiled needs no place to be kept in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import knn_lm_eval

WALK = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
import knn_lm_eval.search.code_distances, knn_lm_eval.make.pruning
from knn_lm_eval.methods.automaton_kernels import _add
import numpy as np
print(_add(np.full(16, -1), 3), knn_lm_eval.__file__)
"""


@pytest.mark.parametrize("place", ["temporary", "taken by a link", "open to all"])
def test_without_a_place_for_what_is_compiled(tmp_path: Path, place: str) -> None:
    """As in a container: the package cannot be written to, and there is no home."""
    package = tmp_path / "package" / "knn_lm_eval"
    ignored = shutil.ignore_patterns("__pycache__", "tasks")
    shutil.copytree(Path(knn_lm_eval.__file__).parent, package, ignore=ignored)
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()  # nobody, root included, can write below it
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    cache = temporary / f"knn_lm_eval-numba-{os.getuid()}"
    if place == "taken by a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    elif place == "open to all":
        cache.mkdir()
        cache.chmod(0o777)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG"))}
    environment |= {"HOME": "/dev/null", "TMPDIR": str(temporary), "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", WALK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"True {package / '__init__.py'}\n"
    assert done.stderr.count("WARNING numba can write neither") == 1
    kept = list(cache.rglob("*.nbc"))
    assert bool(kept) == (place == "temporary") and ("in every run" in done.stderr) == (place != "temporary")
