"""What a shell is told that a command may go on to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.places import REPO

from knn_lm_eval.cli.completion import complete_model_args, setting_names
from knn_lm_eval.model.settings import RetrievalSettings

pytest.importorskip("argcomplete")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("stores/law", "stores/wiki", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tuned.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(line: str, folder: Path) -> list[str]:
    """What bash is told at the end of ``line``; as argcomplete has it, which writes to descriptor 8."""
    source = "import os; os.dup2(1, 8); os.dup2(2, 9); from knn_lm_eval.cli.main import main; main([])"
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    variables |= {
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path]),
    }
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, env=os.environ | variables, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n") if done.stdout else []


def test_names_are_those_of_the_settings() -> None:
    assert setting_names() == RetrievalSettings.names()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("knn-lm-eval build_", ["build_index ", "build_suffix_array "]),
        ("knn-lm-eval compact-datastore --da", ["--datastore "]),
        ("knn-lm-eval cluster_datastore --method k", ["kmeans "]),
        # Behind a word break the shell wants what comes after it.
        ("knn-lm-eval tune --model_args pretrained=models,datastore=st", ["stores/"]),
        ("knn-lm-eval tune --model_args datastore=stores/law+stores/w", ["stores/law+stores/wiki/"]),
        ("knn-lm-eval tune --model_args lmb", ["lmbda="]),
        ("knn-lm-eval nothing_such --x", []),
    ],
)
def test_a_shell_is_told(line: str, told: list[str], folder: Path) -> None:
    assert [one.strip() for one in asked(line, folder)] == [one.strip() for one in told]


def test_model_arguments(folder: Path) -> None:
    assert complete_model_args("datastore=stores/law,knn_t") == ["datastore=stores/law,knn_temp="]
    assert complete_model_args("params=tu") == ["params=tuned.json"]
    assert complete_model_args("lmbda=0") == []
    assert {"pretrained=", "datastore=", "lmbda="} <= set(complete_model_args(""))
