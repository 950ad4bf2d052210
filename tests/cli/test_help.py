"""Help that helps: examples, verbs in order, and what was meant where something is mistyped."""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from knn_lm_eval.cli import main as cli
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.model.knn_hf import KNNHF


@pytest.fixture(autouse=True)
def of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verbs change in their process is set back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name in (None, "lm_eval", "knn_lm_eval", "faiss"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logger.level)


def example_of(verb: str) -> list[str]:
    """The arguments of the example with which a verb's help ends."""
    with contextlib.redirect_stdout(io.StringIO()) as page, pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    *_, title, example = page.getvalue().splitlines()
    assert title == "example:"
    program, named, *arguments = shlex.split(example)
    assert (program, named) == (cli.PROG, verb)
    return arguments


@pytest.mark.parametrize("verb", sorted(cli.verbs()))
def test_each_help_ends_with_an_example_that_parses(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = example_of(verb)
    monkeypatch.setattr(sys, "argv", [f"{cli.PROG} {verb}", *example])
    import_module(f"knn_lm_eval.cli.{verb}").parse_arguments()


def test_every_verb_has_its_place() -> None:
    placed = [name for names in cli.GROUPS.values() for name in names]
    assert sorted(placed) == sorted(cli.verbs())


def test_a_verb_without_a_place_is_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "GROUPS", {"begin": ("tune",)})
    lines = cli.usage().splitlines()
    assert [line.split()[0] for line in lines[lines.index("more:") + 1 : -2]] == sorted(cli.verbs().keys() - {"tune"})


@pytest.mark.parametrize("columns", ["60", "200"])
def test_each_verb_has_one_line(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = [line for line in cli.usage().splitlines() if line.startswith("  ")]
    assert len(lines) == len(cli.verbs()) and max(map(len, lines)) <= int(columns)
    assert any(line.endswith("...") for line in lines) == (columns == "60")


Parse = Callable[[str], str]


@pytest.fixture
def parse(capsys: pytest.CaptureFixture[str]) -> Parse:
    """What a parser says of a command line; nothing where it takes it."""
    parser = VerbParser("Tries.", "knn-lm-eval try --output x", prog="knn-lm-eval try")
    parser.add_argument("--output", required=True)
    parser.add_argument("--knn_temp", type=float)
    parser.add_argument("text", nargs="*")

    def parse(line: str) -> str:
        try:
            parser.parse_args(shlex.split(line))
        except SystemExit as end:
            assert end.code == 2
        error = capsys.readouterr().err
        return error.splitlines()[-1].removeprefix("knn-lm-eval try: error: ") if error else ""

    return parse


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--output x --knn_temp -3", ""),
        ("--out x --knn_temp=-.5 a b", ""),
        ("--output x -- --outputs", ""),
        ("--outptu x", "there is no option --outptu; did you mean --output?"),
        ("--output x --knn-temp=3", "there is no option --knn-temp; did you mean --knn_temp?"),
        ("-output x", "there is no option -output; did you mean --output?"),
        ("--output x --zzz 3", "there is no option --zzz; --help shows them"),
        (
            "--otput x --nn_temp 1",
            "there is no option --otput; did you mean --output?; there is no option --nn_temp; did",
        ),
        ("--knn_temp 3", "the following arguments are required: --output"),
        ("--output x --knn_temp -y", "there is no option -y; --help shows them"),
        ("--output x --knn_temp y", "argument --knn_temp: invalid float value: 'y'"),
    ],
)
def test_a_mistyped_option(line: str, said: str, parse: Parse) -> None:
    found = parse(line)
    assert found.startswith(said) if said else not found


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("index", "build_index or compare_indexes"),
        ("dmp_datastore", "dump_datastore"),
        ("cluster", "cluster_datastore"),
    ],
)
def test_a_mistyped_verb(wrong: str, meant: str) -> None:
    assert cli.meant(wrong, cli.verbs()) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        (KNNHF, {"pretrained": "nowhere", "datastor": "x"}, "'datastor'; did you mean datastore?"),
        (KNNHF, {"datastore": "nowhere", "pretraind": "x"}, "'pretraind'; did you mean pretrained?"),
        (KNNHF, {"datastore": "nowhere", "max_lenght": 3}, "'max_lenght'; did you mean max_length?"),
        (CausalHFLM, {"pretrained": "nowhere", "max_lenght": 3}, "'max_lenght'; did you mean max_length?"),
    ],
)
def test_a_mistyped_model_argument_is_told_before_anything_is_loaded(model: type, given: dict, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        model(**given)
    assert str(caught.value) == f"Unknown model argument {sentence}"


def test_other_model_arguments_are_the_model_s_own(model_folder: Path) -> None:
    KNNHF.refuse_mistyped(["max_memory", "device_map", "attn_implementation", "load_in_8bit", "k", "trust_remote_code"])
    with pytest.raises(UserError, match=r"^Unknown model argument 'lmda'; did you mean lmbda\?$"):
        KNNHF.refuse_mistyped(["lmda"])
    with pytest.raises(UserError, match=r"^Unknown model argument 'quite_unknown'\.$"):
        CausalHFLM(str(model_folder), device="cpu", quite_unknown=1)
