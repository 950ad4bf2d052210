"""The verb `reproduce`: its plans, without a network, and its mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from knn_lm_eval.cli import main as cli
from knn_lm_eval.errors import UserError
from knn_lm_eval.reproduce.recipe import recipe_names


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing may be asked of a network, and plans write nothing."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan asks no network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("knn_lm_eval.reproduce.plan.matrix_product_speed", lambda: 1e12)
    monkeypatch.setattr("sys.argv", [])  # which a verb changes
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", recipe_names())
def test_the_plan_of_each(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--fraction", "0.01"]) if name != "gpt2_published_files" else ([],):
        cli.main(["reproduce", name, "--dry_run", "--set", "data_dir=DATA", *more])
        said = capsys.readouterr().out
        assert "evaluate" in said and "$ knn-lm-eval benchmark reproduced/" in said
        assert ("? is unknown" in said) == (name in ("gpt2_published_files", "knnlm_limits"))
    assert not list(tmp_path.iterdir())


def test_without_a_name_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["reproduce"])
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in recipe_names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gtp2"], "did you mean gpt2"),
        (["gpt2", "--fraction", "2"], "--fraction 2 must be above 0"),
        (["gpt2", "--output", "a,b"], "--output a,b has a comma"),
        (["gpt2", "--set", "dump.strid=3"], "did you mean 'stride'"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cli.main(["reproduce", *arguments])
