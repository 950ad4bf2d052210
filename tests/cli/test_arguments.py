"""Arguments that verbs share: what is an option may stand in --model_args as well, and the two may not contradict."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH

from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.cli.arguments import add_memory, merge_model_args
from knn_lm_eval.cli.main import verb
from knn_lm_eval.lm.loading import CausalHFLM

# With what is needed beside --model_args; {text} and {output} are filled in.
COMMANDS = {
    "dump_datastore": ["--text", "{text}", "--output", "{output}"],
    "tune": ["--tasks", "python_docs", "--allow_test", "--output", "{output}.json"],
    "foss_curve": ["--tasks", "python_docs", "--output", "{output}"],
    "store_sizes": ["--tasks", "python_docs", "--output", "{output}"],
    "speed": ["--text", "{text}"],
    "compare_indexes": ["--text", "{text}", "--indexes", "index", "--output", "{output}"],
    "inspect_neighbours": ["--text", "words"],
    "explore": [],
}
VALUES = {"max_length": 32, "batch_size": 2, "device": "cpu"}
OPTIONS = [
    (name, option)
    for name in COMMANDS
    for option in VALUES
    if name not in ("inspect_neighbours", "explore") or option != "batch_size"
]

Call = Callable[..., None]


class Loading(Exception):
    """Stands for a model that is being loaded."""


@pytest.fixture(autouse=True)
def levels_of_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs set the levels of some loggers for their process, which here goes on to other tests."""
    for name in (None, "lm_eval", "knn_lm_eval", "faiss"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logger.level)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs a verb as from a shell."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # a verb sets one
    (tmp_path / "text.txt").write_text(EVAL_TEXT, encoding="utf-8")

    def call(name: str, model_args: str, *more: object) -> None:
        rest = [part.format(text=tmp_path / "text.txt", output=tmp_path / "output") for part in COMMANDS[name]]
        monkeypatch.setattr(sys, "argv", [name, "--model_args", model_args, *rest, *map(str, more)])
        import_module(f"knn_lm_eval.cli.{name}").main()

    return call


@pytest.fixture
def loaded_with(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the LM is loaded with; nothing is loaded."""
    arguments: dict[str, Any] = {}

    def note(self: object, *args: Any, **kwargs: Any) -> None:
        arguments.update(kwargs)
        raise Loading

    monkeypatch.setattr(KNNHF, "__init__", note)
    monkeypatch.setattr(CausalHFLM, "__init__", note)
    return arguments


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_may_stand_in_model_args(
    name: str, option: str, call: Call, loaded_with: dict[str, Any], store: Datastore
) -> None:
    value = VALUES[option]
    model_args = "pretrained=tiny" if name == "dump_datastore" else f"datastore={store.path}"
    # The windows of a dump are the dump's: as options they are not told to the LM.
    told = name != "dump_datastore" or option == "device"
    for in_args, as_option in ((True, False), (True, True), (False, True)):
        loaded_with.clear()
        with pytest.raises(Loading):
            given = f",{option}={value}" if in_args else ""
            call(name, model_args + given, *([f"--{option}", value] if as_option else []))
        assert loaded_with.get(option) == (value if told or not as_option else None)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_and_model_args_may_not_contradict(name: str, option: str, call: Call) -> None:
    other = {"max_length": 64, "batch_size": 3, "device": "cuda"}[option]
    sentence = f"--{option} {other} and {option}={VALUES[option]} in --model_args contradict each other: leave one out."
    with pytest.raises(UserError) as caught:
        call(name, f"datastore=nowhere,{option}={VALUES[option]}", f"--{option}", other)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("place", ["option", "model_args", "both"])
def test_a_dump_has_windows_as_either_place_says(place: str, call: Call, model_folder: Path, tmp_path: Path) -> None:
    in_args = "" if place == "option" else ",max_length=16,batch_size=3,device=cpu"
    options = [] if place == "model_args" else ["--max_length", 16, "--batch_size", 3, "--device", "cpu"]
    call("dump_datastore", f"pretrained={model_folder}{in_args}", *options)
    manifest = Datastore.open(tmp_path / "output").manifest
    assert manifest.windows["max_length"] == 16
    # An option is about this dump; what the model's arguments say holds in evaluations, too. A device is neither's.
    recorded = {"max_length": 16, "batch_size": 3} if place == "model_args" else {}
    assert {name: value for name, value in manifest.model["args"].items() if name != "pretrained"} == recorded


def test_windows_are_short_only_where_nobody_says_how_long(
    store: Datastore, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compare_indexes once took max_length as an option alone."""
    lengths = []
    monkeypatch.setattr("knn_lm_eval.study.run.MAX_LENGTH", 24)
    monkeypatch.setattr("knn_lm_eval.study.index_comparison.MAX_LENGTH", 24)
    monkeypatch.setattr(
        "knn_lm_eval.study.index_comparison.collect_queries", lambda lm, _: lengths.append(lm.max_length) or 1 / 0
    )
    for more, options in (("", []), (",max_length=40", []), ("", ["--max_length", 40])):
        with pytest.raises(ZeroDivisionError):
            call("compare_indexes", f"datastore={store.path},lmbda=0.4{more}", "--k", 5, *options)
    assert lengths == [24, 40, 40]
    assert MAX_LENGTH > 40


def test_numbers_are_read_as_model_args_are() -> None:
    assert merge_model_args("a=1,batch_size=auto", {"batch_size": "auto", "device": None}) == {
        "a": 1,
        "batch_size": "auto",
    }
    assert merge_model_args("", {"max_length": 7}) == {"max_length": 7}
    with pytest.raises(UserError, match="--batch_size auto and batch_size=4 in --model_args"):
        merge_model_args("batch_size=4", {"batch_size": "auto"})


def test_what_must_be_a_number_is(call: Call, store: Datastore) -> None:
    with pytest.raises(UserError, match="batch_size=auto must be a whole number of at least 1"):
        call("dump_datastore", "pretrained=tiny,batch_size=auto")
    with pytest.raises(UserError, match="batch_size=auto must be a number"):
        call("speed", f"datastore={store.path},batch_size=auto")
    with pytest.raises(UserError, match="--max_length 0 must be at least 1"):
        call("tune", f"datastore={store.path}", "--max_length", 0)


def test_a_verb_s_main_says_what_the_user_can_mend(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import argparse

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: levels.append(settings["level"]))
    levels: list[str] = []

    @verb(lambda: argparse.Namespace(number=3), "INFO")
    def main(arguments: argparse.Namespace) -> None:
        """Adds."""
        raise UserError(f"{arguments.number} is wrong.")

    assert main.__doc__ == "Adds." and levels == []
    with pytest.raises(UserError) as caught:
        main()
    assert levels == ["INFO"]
    sys.excepthook(UserError, caught.value, None)
    assert capsys.readouterr().err == "error: 3 is wrong.\n"


def test_memory_is_given_with_its_unit(capsys) -> None:
    parser = argparse.ArgumentParser()
    add_memory(parser, "this")
    assert parser.parse_args([]).memory is None
    assert parser.parse_args(["--memory", "512MiB"]).memory == 2**29
    with pytest.raises(SystemExit):
        parser.parse_args(["--memory", "much"])
    assert "'much' is no size of memory: give a number with its unit, such as 8GiB" in capsys.readouterr().err
