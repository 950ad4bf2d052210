"""What starting costs, counted in modules: what isn't imported takes no time."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.places import REPO

from knn_lm_eval.cli.main import verbs

HEAVY = {
    "datasets",
    "faiss",
    "lm_eval",
    "matplotlib",
    "numba",
    "numpy",
    "ray",
    "rich",
    "scipy",
    "torch",
    "transformers",
}


def loaded_by(source: str, *options: str) -> set[str]:
    """The modules that an interpreter has loaded for ``source``, which may print as well."""
    source = f"import sys\nbefore = set(sys.modules)\n{source}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, *options, "-c", source], cwd=REPO, check=True, capture_output=True, text=True
    )
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


def test_the_package_itself_loads_nothing_else() -> None:
    # Without site-packages, and so without the start-up hook, which has loaded the package where it is installed.
    assert loaded_by("import knn_lm_eval", "-S") == {"knn_lm_eval"}


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_the_command_starts_without_libraries(argument: str) -> None:
    loaded = loaded_by(f"from knn_lm_eval.cli.main import main\nassert main(['{argument}']) == 0")
    assert "knn_lm_eval.cli.main" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_a_verbs_help_waits_for_no_library(verb: str) -> None:
    source = f"from knn_lm_eval.cli.main import main\ntry:\n    main(['{verb}', '--help'])\nexcept SystemExit as end:"
    loaded = loaded_by(f"{source}\n    assert end.code == 0")
    assert f"knn_lm_eval.cli.{verb}" in loaded
    assert not loaded & HEAVY


def test_an_unknown_verb_is_told_without_libraries() -> None:
    assert not loaded_by("from knn_lm_eval.cli.main import main\nassert main(['tunes']) == 2") & HEAVY
