"""The command `knn-lm-eval`."""

import subprocess
import sys
from pathlib import Path

import pytest

from knn_lm_eval import __version__, cli
from knn_lm_eval.paths import scripts_dir

SCRIPT = '''
"""Count to a number.

More about counting.
"""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=int, required=True)
    print(__file__, *range(parser.parse_args().to))
'''


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts of our own; what running one changes in this process is set back."""
    (tmp_path / "count_up.py").write_text(SCRIPT)
    (tmp_path / "tune.py").write_text('"""Tune."""\nimport no_such_module\n')
    (tmp_path / "_shared.py").write_text("")
    (tmp_path / "run_tests.sh").write_text("")
    monkeypatch.setattr(cli, "scripts_dir", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return tmp_path


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_verbs(scripts: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("verbs:") + 1 :][:3] == [
        "  count_up  Count to a number.",
        "  tune      Tune.",
        "",
    ]


@pytest.mark.parametrize("verb", ["count_up", "count-up"])
def test_runs_script(scripts: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--to", "3"]) == 0
    assert capsys.readouterr().out.split() == [str(scripts / "count_up.py"), "0", "1", "2"]


def test_messages_name_the_command(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["count_up"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: knn-lm-eval count_up [-h] --to TO")


def test_unknown_verb(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["count-upp"]) == 2
    assert capsys.readouterr().err == "knn-lm-eval: no verb 'count-upp'; did you mean count_up?\n"
    assert cli.main(["xyz"]) == 2
    assert capsys.readouterr().err == "knn-lm-eval: no verb 'xyz'; did you mean count_up or tune?\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"knn-lm-eval {__version__}\n"


def test_every_script_says_what_it_does() -> None:
    assert cli.verbs()
    for verb, script in cli.verbs().items():
        assert cli.summary(script), verb


def test_lazy_names() -> None:
    """The package itself imports nothing until one of its classes is asked for."""
    source = "import sys, knn_lm_eval; assert 'knn_lm_eval.errors' not in sys.modules; knn_lm_eval.UserError"
    subprocess.run([sys.executable, "-c", source], check=True, cwd=scripts_dir().parent)
    import knn_lm_eval

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = knn_lm_eval.nonsense
