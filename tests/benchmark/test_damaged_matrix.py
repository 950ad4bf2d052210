"""Whatever stands in a benchmark's file, it is read or one sentence says what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.mutations import mutated_text

from knn_lm_eval.benchmark.matrix import read_matrix
from knn_lm_eval.errors import UserError, printable

MUTATIONS = int(os.environ.get("KNN_LM_EVAL_MUTATIONS", "100"))
MATRIX: dict[str, Any] = {
    "output": "results",
    "models": {"gpt2": {"pretrained": "gpt2", "max_length": 1024}, "other": {"pretrained": "x", "dtype": "float16"}},
    "datastores": {"law": "stores/law", "wiki": {"path": "stores/wiki", "models": ["gpt2"], "index": "small"}},
    "methods": {"base": {"model": "hf"}, "knn": {"k": 8}, "tuned": {"params": "{model}-{datastore}.json"}},
    "tasks": {"law": {"limit": 5, "metadata": {"data_dir": "DATA"}}, "wiki": {"task": "wikitext103", "num_fewshot": 0}},
    "metadata": {"split": "test"},
    "include_path": ["tasks"],
    "batch_size": 4,
    "device": "cpu",
    "seed": 7,
}


def read(file: Path) -> None:
    """Read it, and all that is asked of the cells before they are run."""
    matrix = read_matrix(file)
    for cell in matrix.cells:
        str(cell), cell.folder, cell.checksum(), cell.lm_args


def says(file: Path) -> str | None:
    """The sentence about a file; None where it is read."""
    try:
        read(file)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000 and str(error) == printable(str(error))
        return str(error)
    return None


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
def test_mutated_files(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "benchmark.yaml"
    file.write_text(write(MATRIX))
    assert says(file) is None
    for seed in range(MUTATIONS // 2):
        file.write_bytes(mutated_text(MATRIX, write, seed))
        try:
            says(file)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


BOMB = "a: &a0 [x]\n" + "".join(f"b{n}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60)) + "models: *a60\n"


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "models: " + BOMB.replace("\n", "\n  ").replace("a: ", "\n  a: ", 1),
        "models: &m {a: *m}\n",
        "models: &m\n  a: {pretrained: *m}\nmethods: {base: }\ntasks: {law: }\n",
        "[" * 5000,
        "models: " + "{a: " * 5000,
        "- " * 5000,
        "models: !!python/object/apply:os.system [touch x]",
        "models: !unknown {}",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "models: 2026-99-99",
        "models: [{a: b}]\nmethods: [base]\ntasks: [law]",
        "models: " + "9" * 9000,
        "seed: 0x" + "f" * 9000,
        "a: b\n---\nc: d",
        "\x00",
        "",
        "null",
        "'",
        "%YAML 9.9\n---\n",
        "*a",
        "models: {<<: [1, 2]}",
    ],
)
def test_files_that_are_no_matrix(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmark.yaml").write_text(text)
    assert says(tmp_path / "benchmark.yaml") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.yaml"]


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "benchmark.yaml").write_text("# " + "x" * 2**21)
    assert "has 2,097,154 bytes" in str(says(tmp_path / "benchmark.yaml"))
