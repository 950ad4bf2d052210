"""Comparing results: files of several origins, tables in every format, what does not compare."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.programs import run_script
from helpers.results import documents, knn_config, write_results

from knn_lm_eval.errors import UserError
from knn_lm_eval.report.comparison import compare, differences
from knn_lm_eval.report.comparison_tables import as_csv, tables_of
from knn_lm_eval.report.intervals import paired_interval
from knn_lm_eval.report.results import read_folder
from knn_lm_eval.report.tables import as_latex, as_markdown

# ------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ours, baseline = documents(200, 0.2)
    write_results(tmp_path / "hf" / "m", baseline)
    write_results(tmp_path / "knn" / "m", ours, config=knn_config())
    return tmp_path


def test_differences_intervals_and_costs_from_files(folder: Path) -> None:
    results, _ = read_folder([folder])
    comparison = compare(results, "hf", resamples=2000)
    (task,) = comparison.tasks
    base, knn = task.rows
    ours, baseline = documents(200, 0.2)
    perplexities = [math.exp(-pairs[:, 0].sum() / pairs[:, 1].sum()) for pairs in (ours, baseline)]
    assert (knn.value, base.value) == pytest.approx(tuple(perplexities))
    assert base.is_baseline and base.difference is None
    assert knn.difference == pytest.approx(perplexities[0] - perplexities[1])
    assert knn.interval == paired_interval(ours, baseline, "weighted_perplexity", resamples=2000)
    assert knn.label == "kNN-LM k=1024 lmbda=0.25 knn_temp=1.0"
    assert knn.result.tokens_per_second == 400 and knn.result.retrieval_bytes == 3 * 2**20 + 4000
    assert not task.warnings and not task.notes
    assert [one.model for one in task.published] == ["wmt19.en (fairseq)"] * 3 + ["wmt19.en, fine-tuned (fairseq)"] * 3


def test_accuracies_and_their_filters(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = {"a": generator.integers(0, 2, 100), "b": generator.integers(0, 2, 100)}
    for name, right in values.items():
        folder = tmp_path / name
        folder.mkdir()
        content = {
            "results": {"gsm8k": {"exact_match,strict": float(right.mean()), "exact_match,flexible": 0.5}},
            "config": {"model": name},
        }
        (folder / "results_1.json").write_text(json.dumps(content))
        with open(folder / "samples_gsm8k_1.jsonl", "w") as file:
            for number, value in enumerate(right):
                for filter_name, figure in (("strict", int(value)), ("flexible", 0.0)):
                    line = {"doc_id": number, "doc_hash": "", "filter": filter_name, "exact_match": figure}
                    file.write(json.dumps(line) + "\n")
    results, _ = read_folder([tmp_path])
    (task,) = compare(results, "a").tasks
    assert task.metric == "exact_match,strict" and task.higher_is_better
    assert task.rows[1].difference == pytest.approx(values["b"].mean() - values["a"].mean())
    assert task.rows[1].interval is not None
    # The other filter's samples do not give the figure that the file reports: no interval is made of them.
    (task,) = compare(results, "a", "exact_match,flexible").tasks
    assert task.rows[1].interval is None and "no intervals" in task.notes[0]


def test_files_of_a_leaderboard(tmp_path: Path) -> None:
    early = {
        "config_general": {"model_name": "org/model"},
        "results": {"harness|arc:challenge|25": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6}, "all": {"acc": 0.5}},
        "versions": {"harness|arc:challenge|25": 0},
    }
    late = {
        "model_name": "org/model",
        "results": {"leaderboard_bbh": {"acc_norm,none": 0.4, "acc_norm_stderr,none": 0.01, "alias": "bbh"}},
        "config": {"model": "hf", "model_args": "pretrained=org/model,dtype=bfloat16"},
    }
    (tmp_path / "early.json").write_text(json.dumps(early))
    (tmp_path / "late.json").write_text(json.dumps(late))
    results, _ = read_folder([tmp_path])
    assert {(r.task, r.model, tuple(sorted(r.metrics.items()))) for r in results} == {
        ("arc:challenge", "org/model", (("acc", 0.5), ("acc_norm", 0.6))),
        ("all", "org/model", (("acc", 0.5),)),
        ("leaderboard_bbh", "org/model", (("acc_norm", 0.4),)),
    }
    assert tables_of(compare(results))[0].header[0] == "method"


def test_the_newest_of_equal_results_counts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_results(folder / "hf" / "m", None, 5.0, stamp="2", date=2.0)
    results, _ = read_folder([folder])
    assert sorted(result.metrics["token_perplexity"] for result in results if result.kind == "hf") == [5.0]
    assert "1 older results" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_length": 2048}, "windows (max_length) 2048 and 1024"),
        ({"config": knn_config(context_len=512)}, "windows (context_len) 512 and 1"),
        ({"versions": {"law": 2.0}}, "task versions 2.0 and 1.0"),
        ({"n-shot": {"law": 5}}, "few-shot examples 5 and 0"),
    ],
)
def test_rows_that_may_not_compare(folder: Path, change: dict[str, Any], reason: str) -> None:
    write_results(folder / "knn" / "m", documents(200, 0.2)[0], **{"config": knn_config()} | change)
    (task,) = compare(read_folder([folder])[0], "hf").tasks
    assert task.warnings == [f"kNN-LM k=1024 lmbda=0.25 knn_temp=1.0 and hf may not compare: {reason}"]
    assert f"Warning: {task.warnings[0]}." in tables_of(compare(read_folder([folder])[0], "hf"))[0].notes


@pytest.mark.parametrize(
    ("given", "recorded", "reasons"),
    [
        ({}, {"model_dtype": "torch.bfloat16"}, ["softmax_dtype bfloat16 and float32", "dtype bfloat16 and float32"]),
        ({"softmax_dtype": "float64"}, {}, ["softmax_dtype float64 and float32"]),
        ({"softmax_dtype": "float32", "trust_remote_code": True, "batch_size": 8, "truncation": False}, {}, []),
        ({}, {"model_revision": "step1000"}, ["revision step1000 and main"]),
        ({}, {"model_sha": "abc"}, ["commit (model_sha) abc and def"]),
        ({"add_bos_token": True}, {}, ["add_bos_token True and not given"]),
        ({"peft": "adapter"}, {}, ["peft adapter and not given"]),
        ({"delta": "delta"}, {}, ["delta delta and not given"]),
        ({"load_in_8bit": True}, {}, ["load_in_8bit True and not given"]),
        ({"gguf_file": "a.gguf"}, {}, ["gguf_file a.gguf and not given"]),
        ({"mixed_precision_dtype": "float16"}, {}, ["mixed_precision_dtype float16 and not given"]),
    ],
)
@pytest.mark.parametrize("way", ["given", "as text", "by the store"])
def test_what_changes_the_lm_itself_is_named(
    tmp_path: Path, given: dict[str, Any], recorded: dict[str, Any], reasons: list[str], way: str
) -> None:
    ours, baseline = documents(20, 0.2)
    common = {"model_dtype": "torch.float32", "model_revision": "main", "model_sha": "def"}
    hf = {"model": "hf", "model_args": {"pretrained": "models/m"}, "limit": None}
    write_results(tmp_path / "hf", baseline, config=hf | common)
    knn = knn_config(**({"lm_arguments": given} if way == "by the store" else {}))
    if way != "by the store":
        knn["model_args"] |= {"pretrained": "models/m"} | given
    if way == "as text":
        knn["model_args"] = ",".join(f"{name}={value}" for name, value in knn["model_args"].items())
    write_results(tmp_path / "knn", ours, config=knn | common | recorded)
    (task,) = compare(read_folder([tmp_path])[0], "hf").tasks
    start = "kNN-LM k=1024 lmbda=0.25 knn_temp=1.0 and hf may not compare: "
    assert sorted(task.warnings) == sorted(start + reason for reason in reasons)


def test_other_prompts_and_other_generation_are_named(tmp_path: Path) -> None:
    ours, baseline = documents(20, 0.2)
    write_results(tmp_path / "hf", baseline, chat_template_sha=None, system_instruction_sha=None)
    config = knn_config() | {"gen_kwargs": {"temperature": 0.5}}
    prompts = {"chat_template_sha": "c" * 64, "system_instruction_sha": "d" * 64, "fewshot_as_multiturn": True}
    write_results(tmp_path / "knn", ours, config=config, **prompts)
    (task,) = compare(read_folder([tmp_path])[0], "hf").tasks
    assert [warning.partition(": ")[2] for warning in task.warnings] == [
        f"chat_template {'c' * 12} and not given",
        f"system_instruction {'d' * 12} and not given",
    ]


def test_another_lm_may_have_another_dtype(tmp_path: Path) -> None:
    ours, baseline = documents(20, 0.2)
    for name, pairs, dtype in (("a", ours, "torch.float32"), ("b", baseline, "torch.bfloat16")):
        config = {"model": "hf", "model_args": {"pretrained": name}, "limit": None, "model_dtype": dtype}
        write_results(tmp_path / name, pairs, config=config)
    (task,) = compare(read_folder([tmp_path])[0]).tasks
    assert not task.warnings


def test_published_figures_that_others_could_not_reproduce_are_told_as_such(tmp_path: Path) -> None:
    pairs = documents(20, 0.2)[0]
    write_results(tmp_path, pairs)
    (file,) = tmp_path.glob("results_*.json")
    file.write_text(file.read_text().replace('"law"', '"wikitext103_valid"'))
    (samples,) = tmp_path.glob("samples_*.jsonl")
    samples.rename(tmp_path / "samples_wikitext103_valid_1.jsonl")
    (table,) = tables_of(compare(read_folder([tmp_path])[0]))
    (note,) = [note for note in table.notes if "15.03" in note]
    for said in ("12.57", "issues 14, 17 and 18", "17.34", "knn_temp=13"):
        assert said in note
    assert note in as_markdown([table]).replace("\\", "") and "14.71" not in note


def test_other_documents_and_other_tokenizers(folder: Path) -> None:
    pairs = documents(200, 0.2)[0]
    write_results(folder / "knn" / "m", pairs[:150], config=knn_config())
    (task,) = compare(read_folder([folder])[0], "hf").tasks
    assert any("numbers of documents 150 and 200" in warning for warning in task.warnings)
    assert any("other documents: no interval" in warning for warning in task.warnings)
    assert task.rows[1].interval is None
    pairs[0, 1] += 1
    write_results(folder / "knn" / "m", pairs, config=knn_config())
    (task,) = compare(read_folder([folder])[0], "hf").tasks
    assert any("other tokenizers" in warning and "word_perplexity" in warning for warning in task.warnings)
    one, other = read_folder([folder])[0]
    assert differences(one, other, "word_perplexity") == []


def test_each_model_has_its_own_baseline(folder: Path) -> None:
    ours, baseline = documents(200, 0.3, seed=8)
    other = {"model_args": {"pretrained": "models/other"}, "limit": None}
    write_results(folder / "hf" / "other", baseline, config={"model": "hf"} | other)
    knn = knn_config()
    knn["model_args"] = {"pretrained": "models/other"}
    write_results(folder / "knn" / "other", ours, config=knn)
    (task,) = compare(read_folder([folder])[0], "hf").tasks
    rows = {row.label: row for row in task.rows}
    assert list(rows) == [
        "m · hf",
        "other · hf",
        "m · kNN-LM k=1024 lmbda=0.25 knn_temp=1.0",
        "other · kNN-LM k=1024 lmbda=0.25 knn_temp=1.0",
    ]
    for model in ("m", "other"):
        base, knn_row = (row for label, row in rows.items() if label.startswith(model))
        assert base.is_baseline and knn_row.difference == pytest.approx(knn_row.value - base.value)


def test_half_written_files_are_named_and_the_rest_is_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (file,) = (folder / "hf" / "m").glob("results_*.json")
    whole = file.read_text()
    (folder / "results_broken.json").write_text(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        results, _ = read_folder([folder])
    assert len(results) == 2
    assert f"{folder / 'results_broken.json'} is damaged or half-written" in caplog.text
    (samples,) = (folder / "hf" / "m").glob("samples_*.jsonl")
    samples.write_bytes(samples.read_bytes()[:-20])
    (task,) = compare(results, "hf").tasks
    assert task.rows[1].interval is None and f"{samples} is damaged" in caplog.text


def test_texts_in_samples_may_hold_any_character(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in folder.rglob("samples_*.jsonl"):
        lines = [json.loads(line) | {"doc": {"page": "a\x85b\u2028c\x1cd"}} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    results, _ = read_folder([folder])
    (task,) = compare(results, "hf").tasks
    assert task.rows[1].interval is not None and not caplog.text
    assert "doc" not in results[0].samples[0]  # many texts would fill the memory


def test_a_document_may_have_two_windows(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in folder.rglob("samples_*.jsonl"):
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        windows = {"token_perplexity_stderr": [[-12.5, 4.0], [-3.25, 2.0]]}  # of which each is a pair, not a number
        file.write_text("".join(json.dumps(sample | windows) + "\n" for sample in samples))
    (task,) = compare(read_folder([folder])[0], "hf").tasks
    assert task.rows[1].interval is not None and not caplog.text


def test_models_of_one_name_in_two_folders_have_rows_of_their_own(folder: Path) -> None:
    _, baseline = documents(200, 0.3, seed=8)
    theirs = {"model": "hf", "model_args": {"pretrained": "others/m"}, "limit": None}
    write_results(folder / "hf" / "other", baseline, config=theirs)
    (task,) = compare(read_folder([folder])[0], "hf").tasks
    assert [row.label for row in task.rows if row.is_baseline] == ["models/m · hf", "others/m · hf"]


def test_tables_in_every_format(folder: Path) -> None:
    results, _ = read_folder([folder])
    comparison = compare(results, "hf", resamples=1000)
    (table,) = tables_of(comparison)
    knn = comparison.tasks[0].rows[1]
    assert table.rows[1][:2] == ["kNN-LM k=1024 lmbda=0.25 knn_temp=1.0", f"{knn.value:.2f}"]
    assert table.rows[1][2] == f"{knn.difference:+.2f}".replace("-", "−")
    assert table.rows[1][4] == "<0.001" and table.marked == set(range(2, len(table.rows))) != set()
    markdown = as_markdown([table]).splitlines()
    rows = [line for line in markdown if line.startswith("|")]
    assert len(rows) == 2 + len(table.rows) and len({len(line) for line in rows}) == 1  # a grid
    latex = as_latex([table])
    assert r"token\_perplexity $\downarrow$" in latex and latex.count(r"\\") == 1 + len(table.rows)
    assert latex.count("{") == latex.count("}")
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [line["method"] for line in lines[:2]] == ["hf", "kNN-LM k=1024 lmbda=0.25 knn_temp=1.0"]
    assert float(lines[1]["difference"]) == knn.difference and float(lines[1]["low"]) == knn.interval.low
    assert lines[1]["seed"] == "0" and lines[2]["source"].startswith("github.com/")


def test_no_interval_from_one_document(tmp_path: Path) -> None:
    ours, baseline = documents(1, 0.2)
    write_results(tmp_path / "hf", baseline)
    write_results(tmp_path / "knn", ours, config=knn_config())
    (task,) = compare(read_folder([tmp_path])[0], "hf").tasks
    assert task.rows[1].difference < 0 and task.rows[1].interval is None
    assert task.notes == ["no intervals: one document only, and no sums over the same windows of it"]


def test_one_document_is_compared_by_its_windows(tmp_path: Path) -> None:
    ours, baseline = documents(283, 0.1)
    for name, windows, config in (("hf", baseline, {"model": "hf"}), ("knn", ours, knn_config())):
        write_results(tmp_path / name, windows.sum(axis=0)[None], windows=[windows], config=config)
    (task,) = compare(read_folder([tmp_path])[0], "hf").tasks
    interval = task.rows[1].interval
    assert task.rows[1].difference == pytest.approx(interval.difference)
    assert interval.low < interval.difference < interval.high < 0
    assert interval.p_value < 0.05
    assert task.notes == ["one document: intervals are over its 20 blocks of consecutive windows"]
    assert [row.result.metrics.keys() for row in task.rows] == [{"token_perplexity"}] * 2


def test_other_windows_and_damaged_ones_give_no_interval(tmp_path: Path) -> None:
    ours, baseline = documents(50, 0.1)
    other = np.add.reduceat(ours, range(0, 50, 2))
    write_results(tmp_path / "hf", baseline.sum(axis=0)[None], windows=[baseline])
    for windows in (other, ours[:1], np.array([["a", "b"]]), np.zeros((3, 3)), np.zeros(5), np.array(1.0)):
        write_results(tmp_path / "knn", ours.sum(axis=0)[None], windows=[windows], config=knn_config())
        (task,) = compare(read_folder([tmp_path])[0], "hf").tasks
        assert task.rows[1].interval is None
        assert task.notes == ["no intervals: one document only, and no sums over the same windows of it"]


def test_the_script(folder: Path) -> None:
    (folder / "results_broken.json").write_text("{")
    process = run_script("compare", folder, "--baseline", "hf", "--resamples", 500)
    assert process.returncode == 0, process.stderr
    assert "kNN-LM k=1024" in process.stdout and "seed 0" in process.stdout
    assert process.stderr.count("\n") == 1 and "results_broken.json is damaged" in process.stderr
    again = run_script("compare", folder, "--baseline", "hf", "--resamples", 500)
    assert again.stdout == process.stdout
    refused = run_script("compare", folder, "--output", folder / "table.md")
    assert refused.returncode == 1 and "table.md needs --format markdown, csv or latex" in refused.stderr
    refused = run_script("compare", folder, "--format", "csv", "--output", folder / "results_broken.json" / "table.csv")
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("error: Cannot write to")


def test_mistakes_end_with_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--baseline hff is none of the methods here; did you mean 'hf'?"):
        compare(read_folder([folder])[0], "hff")
    with pytest.raises(UserError, match="No result has the metric acc; there are token_perplexity"):
        compare(read_folder([folder])[0], "hf", "acc")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="There are no lm-eval results in"):
        read_folder([empty])
    with pytest.raises(UserError, match="There is no"):
        read_folder([tmp_path / "nowhere"])
