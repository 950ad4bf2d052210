"""Each command that README and docs show is one that its program takes: options, values, model arguments."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module

import pytest
from helpers.places import REPO
from helpers.shown_commands import Shown, shown_commands
from lm_eval._cli import HarnessCLI
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from knn_lm_eval.cli import main as cli
from knn_lm_eval.model.settings import RetrievalSettings

# What lm-eval's hf hands on to transformers.
OF_TRANSFORMERS = {"load_in_4bit", "load_in_8bit", "attn_implementation", "bnb_4bit_quant_type"}
KNOWN = set(RetrievalSettings.names()) | set(inspect.signature(HFLM.__init__).parameters) | OF_TRANSFORMERS

COMMANDS = [shown for shown in shown_commands() if shown.program]
WHOLE = [shown for shown in COMMANDS if shown.is_whole]  # of the others test_docs.py looks the options up


def parse(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a command's program says of its arguments: its --model_args; raises SystemExit where it refuses them."""
    monkeypatch.setattr(sys, "argv", [str(shown.program), *shown.arguments])
    if shown.program == "lm_eval":
        arguments = HarnessCLI().parse_args()
    else:
        name = cli.RENAMED.get(str(shown.program), str(shown.program))
        arguments = import_module(f"knn_lm_eval.cli.{name}").parse_arguments()
    return getattr(arguments, "model_args", None)


def unknown(model_args: object) -> set[str]:
    given = model_args if isinstance(model_args, dict) else simple_parse_args_string(str(model_args or ""))
    return set(given) - KNOWN


def test_there_are_commands_of_many_programs() -> None:
    assert len(WHOLE) > 50 and len({shown.program for shown in WHOLE}) > 15


@pytest.mark.parametrize("shown", WHOLE, ids=lambda one: f"{one.page.relative_to(REPO)}: {one.line[:50]}")
def test_a_command_is_taken_by_its_program(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not unknown(parse(shown, monkeypatch))


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("tune", ["--tasks", "law_valid", "--output", "a.json", "--model_args", "datastore=a", "--kk", "1"]),
        ("dump_datastore", ["--model_args", "pretrained=M", "--text", "a.txt"]),  # no --output
        ("lm_eval", ["--model", "knn-hf", "--taskss", "law"]),
    ],
)
def test_a_wrong_command_is_refused(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parse(Shown(REPO, "", program, arguments), monkeypatch)


def test_a_wrong_model_argument_is_found() -> None:
    assert unknown("datastore=a,lmbda=0.1,dtype=float32,knn_tmp=2") == {"knn_tmp"}
