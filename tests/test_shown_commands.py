"""Each command that README, docs and help show runs and writes what it says, or is marked with why it is not run."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import lm_eval.tasks
import pytest
from helpers.hub_server import Hub, hub_server
from helpers.places import REPO
from helpers.shown_commands import Block, Shown, shown_blocks, shown_commands
from helpers.shown_folder import make_folder, publish
from helpers.shown_running import run_line
from helpers.shown_tables import BEFORE, FILES, NOT_RUN, REPLACED, STAND_INS
from lm_eval._cli import HarnessCLI
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex
from lm_eval.utils import simple_parse_args_string
from transformers import PreTrainedTokenizerBase

from knn_lm_eval.model.settings import RetrievalSettings

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
COMMANDS = shown_commands()
BLOCKS = [block for block in shown_blocks() if any(not shown.not_run for shown in block.commands)]
PARSED = [shown for shown in COMMANDS if shown.not_run and shown.program]
OWN_TASKS = ("arc", "gsm8k")  # those of lm-eval's own that pages name; it takes seconds to find all
# What many commands import, once for all of them.
SHARED = (
    "aiohttp",
    "matplotlib.pyplot",
    "pytablewriter",
    "rich.table",
    "scipy.stats",
    *(f"knn_lm_eval.{name}" for name in ("benchmark.runner", "report.analysis_page", "reproduce.run", "study.tuning")),
)
# What lm-eval's hf hands on to transformers.
OF_TRANSFORMERS = {"load_in_4bit", "load_in_8bit", "attn_implementation", "bnb_4bit_quant_type"}
KNOWN = set(RetrievalSettings.names()) | set(inspect.signature(HFLM.__init__).parameters) | OF_TRANSFORMERS


# --------------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """What is there before a page's commands."""
    folder = tmp_path_factory.mktemp("shown") / "here"
    make_folder(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def shown_hub(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hub]:
    with hub_server(tmp_path_factory.mktemp("hub") / "hub") as hub:
        publish(hub, tokenizer, folder, tmp_path_factory.mktemp("published"))
        yield hub


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Nothing takes seconds for nothing."""
    build, own = TaskIndex.build, Path(lm_eval.tasks.__file__).parent

    def of_few(paths: list[Path], **how: bool) -> dict:
        return build([few for path in paths for few in ([own / name for name in OWN_TASKS] if path == own else [path])])

    for module in SHARED:
        import_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        patch.setattr(TaskIndex, "build", staticmethod(of_few))
        yield


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it."""
    yield shutil.copytree(folder, tmp_path / "here", symlinks=True)
    shutil.rmtree(tmp_path / "here")


@needs_fork
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_commands_of_a_block_run(block: Block, here: Path, shown_hub: Hub) -> None:
    if any("explore" in shown.line for shown in block.commands):
        pytest.importorskip("gradio", reason="the page needs gradio")
    for name, content in [*FILES.get(str(block.page.relative_to(REPO)), {}).items(), *block.files]:
        (here / name).write_text(content, encoding="utf-8")
    for shown in block.commands:
        if shown.not_run:
            continue
        for beginning, lines in BEFORE.items():
            for line in lines if shown.line.startswith(beginning) else []:
                run_line(line, here, shown_hub)
        run_line(shown.run_as, here, shown_hub)


@needs_fork
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("knn-lm-eval verify_datastore M", "M is not a datastore"),
        ("knn-lm-eval --version --output new", r"has not written \['new'\]"),
        ("make new", "the tests can run no such program"),
        ("scripts/first_run.sh", "the tests can run no such program"),
        ("python a.py && python b.py", "more than one command"),
    ],
)
def test_a_command_that_fails_or_does_not_write_is_noticed(line: str, message: str, here: Path, shown_hub: Hub) -> None:
    with pytest.raises(AssertionError, match=message):
        run_line(line, here, shown_hub)


def test_nothing_in_the_tables_is_left_over() -> None:
    """Each command has its state, and each entry of a table a command."""
    run = [shown for shown in COMMANDS if not shown.not_run]
    assert len(run) > 80
    assert {beginning for beginning in NOT_RUN for shown in COMMANDS if shown.line.startswith(beginning)} == set(
        NOT_RUN
    )
    assert {old for shown in run for old in shown.replaced} == set(REPLACED)
    assert {option for shown in run for option in STAND_INS if option in shown.line} == set(STAND_INS)
    assert {beginning for beginning in BEFORE for shown in run if shown.line.startswith(beginning)} == set(BEFORE)
    for page, files in FILES.items():
        text = (REPO / page).read_text(encoding="utf-8")
        assert all(f" {name}" in text for name in files)


# ----------------------------------------------------------------------------------------------- not run


def parse(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a command's program says of its arguments: its --model_args; raises SystemExit where it refuses them."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if program == "lm_eval":
        parsed = HarnessCLI().parse_args()
    else:
        parsed = import_module(f"knn_lm_eval.cli.{program}").parse_arguments()
    return getattr(parsed, "model_args", None)


def unknown(model_args: object) -> set[str]:
    given = model_args if isinstance(model_args, dict) else simple_parse_args_string(str(model_args or ""))
    return set(given) - KNOWN


@pytest.mark.parametrize("shown", PARSED, ids=lambda shown: shown.line[:50])
def test_what_is_not_run_is_taken_by_its_program(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown.program and not unknown(parse(*shown.program, monkeypatch))


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
        parse(program, arguments, monkeypatch)


def test_a_wrong_model_argument_is_found() -> None:
    assert unknown("datastore=a,lmbda=0.1,dtype=float32,knn_tmp=2") == {"knn_tmp"}
