"""Whatever stands in results and samples files, comparing and drawing them works or says in one sentence why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.mutations import mutated_text
from helpers.results import documents, knn_config, write_results

from knn_lm_eval.errors import UserError
from knn_lm_eval.report.comparison import compare
from knn_lm_eval.report.comparison_tables import as_csv, tables_of
from knn_lm_eval.report.page import report_page
from knn_lm_eval.report.results import read_folder
from knn_lm_eval.report.tables import as_latex, as_markdown, print_tables

MUTATIONS = int(os.environ.get("KNN_LM_EVAL_MUTATIONS", "40"))
CURVE = {
    "settings": {"k": 8},
    "points": [
        {"min_knns": knns, "clusters": None, "perplexity": 10.0 + knns, "saved_searches": 0.1 * knns}
        for knns in (1, 3, 5)
    ],
}
SIZES = {"store_sizes": [{"entries": 10**n, "perplexity": 20.0 - n, "fraction": 0.1 * n} for n in (2, 3, 4)]}
TEXT = {
    "tokens": [{"token": "a", "p_lm": 0.5, "p_knn": 0.2, "p": 0.4, "neighbours": []}] * 3,
    "settings": {"k": 4},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two results with samples, and what else a report draws."""
    ours, baseline = documents(8, 0.2)
    write_results(tmp_path / "base", baseline)
    write_results(tmp_path / "knn", ours, config=knn_config())
    for name, content in (("curve", CURVE), ("sizes", SIZES), ("text", TEXT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "grid.csv").write_text("k,lmbda,perplexity\n1,0.1,9\n1,0.2,8\n2,0.1,7\n2,0.2,6\n")
    return tmp_path


def draw(folder: Path, page: bool = True) -> None:
    """All that compare makes of a folder."""
    results, others = read_folder([folder])
    for baseline in (None, "hf"):
        comparison = compare(results, baseline, resamples=50)
        tables = tables_of(comparison)
        print_tables(tables)
        as_markdown(tables), as_latex(tables), as_csv(comparison)
        if page and baseline:
            report_page(comparison, others, sorted(folder.rglob("*.csv")), "Results")


def dumped_lines(content: Any) -> str:
    """One JSON document a line."""
    return "".join(json.dumps(each) + "\n" for each in (content if isinstance(content, list) else [content]))


FILES = ("base/results_1.json", "knn/results_1.json", "knn/samples_law_1.jsonl", "base/samples_law_1.jsonl")


@pytest.mark.parametrize("name", FILES)
def test_mutated_results(folder: Path, name: str) -> None:
    lines = name.endswith("l")
    text = (folder / name).read_text()
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    draw(folder)
    for seed in range(MUTATIONS):
        (folder / name).write_bytes(mutated_text(content, dumped_lines if lines else json.dumps, seed))
        works_or_says(folder, seed, page=seed % 10 == 0)


@pytest.mark.parametrize("name", ["curve.json", "sizes.json", "text.json"])
def test_mutated_files_beside_results(folder: Path, name: str) -> None:
    content = json.loads((folder / name).read_text())
    for seed in range(MUTATIONS // 4):
        (folder / name).write_bytes(mutated_text(content, json.dumps, seed))
        works_or_says(folder, seed, page=True)


def works_or_says(folder: Path, seed: int, page: bool) -> None:
    """Draw it; what that raises is one sentence."""
    try:
        draw(folder, page)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 20_000, seed
    except Exception as error:
        raise AssertionError(f"seed {seed}") from error
