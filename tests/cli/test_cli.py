"""The command `knn-lm-eval`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.places import SCRIPTS

import knn_lm_eval.cli
from knn_lm_eval.cli import main as cli
from knn_lm_eval.version import __version__

MODULE = '''
"""Count to a number.

More about counting.
"""

import argparse


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=int, required=True)
    print(__name__, *range(parser.parse_args().to))
'''

OWN_VERBS = ("count_up", "speed", "tune")


@pytest.fixture
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of verbs of our own; what running one changes in this process is set back."""
    (tmp_path / "count_up.py").write_text(MODULE)
    (tmp_path / "speed.py").write_text('"""Measure."""\n\n\ndef main():\n    print("measured")\n')
    (tmp_path / "tune.py").write_text('"""Tune."""\nimport no_such_module\n')
    for name in cli.NOT_VERBS:
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "main.py"))
    monkeypatch.setattr(knn_lm_eval.cli, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in OWN_VERBS:
        monkeypatch.delitem(sys.modules, f"knn_lm_eval.cli.{name}", raising=False)
    yield tmp_path
    for name in OWN_VERBS:
        sys.modules.pop(f"knn_lm_eval.cli.{name}", None)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_verbs_in_their_order(
    verbs: Path, args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "GROUPS", {"look": ("gone",), "evaluate": ("tune",), "measure": ("speed",)})
    assert cli.main(args) == 0
    assert capsys.readouterr().out.splitlines()[2:-2] == [
        *("evaluate:", "  tune      Tune.", ""),
        *("measure:", "  speed     Measure.", ""),
        *("more:", "  count_up  Count to a number."),
    ]


@pytest.mark.parametrize("verb", ["count_up", "count-up"])
def test_runs_the_verb_s_module(verbs: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--to", "3"]) == 0
    assert capsys.readouterr().out.split() == ["knn_lm_eval.cli.count_up", "0", "1", "2"]


def test_messages_name_the_command(verbs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["count_up"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: knn-lm-eval count_up [-h] --to TO")


def test_unknown_verb(verbs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["count-upp"]) == 2
    assert capsys.readouterr().err == "knn-lm-eval: no verb 'count-upp'; did you mean count_up?\n"
    assert cli.main(["xyz"]) == 2
    assert capsys.readouterr().err == "knn-lm-eval: no verb 'xyz'; knn-lm-eval alone lists them\n"


def test_old_name_answers_and_says_so(verbs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 0
    assert capsys.readouterr() == ("measured\n", "knn-lm-eval: bench is called speed now.\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"knn-lm-eval {__version__}\n"


def test_every_verb_says_what_it_does() -> None:
    assert set(cli.verbs()) | set(cli.RENAMED) == {path.stem for path in SCRIPTS.glob("*.py")}
    for verb, module in cli.verbs().items():
        assert cli.summary(module), verb


def test_lazy_names() -> None:
    """The package itself imports nothing until one of its classes is asked for."""
    source = "import sys, knn_lm_eval; assert 'knn_lm_eval.errors' not in sys.modules; knn_lm_eval.UserError"
    subprocess.run([sys.executable, "-c", source], check=True, cwd=SCRIPTS.parent)
    import knn_lm_eval

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = knn_lm_eval.nonsense
