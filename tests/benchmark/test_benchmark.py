"""Benchmarks: the matrix file, cells that share the LM's pass, skipping, failing, interruption."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import yaml
from helpers.benchmarks import CHOICES, METHODS, figures, matrix_of
from helpers.places import SCRIPTS
from helpers.ready import Ready, script
from helpers.stores import change_json
from helpers.tiny_model import MAX_LENGTH, TRAIN_TEXT
from lm_eval.tasks import TaskManager

from knn_lm_eval import KNNHF, Datastore
from knn_lm_eval.benchmark.estimate import estimate
from knn_lm_eval.benchmark.matrix import Matrix, read_matrix
from knn_lm_eval.benchmark.runner import finished_results, run_matrix, task_manager
from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.report.comparison import compare
from knn_lm_eval.report.record_files import check_same_tokens, read_records
from knn_lm_eval.report.results import read_folder
from knn_lm_eval.search.indexing import build_index


def run(matrix: Matrix) -> dict[str, str]:
    states: dict[str, str] = {}
    run_matrix(matrix, lambda outcome: states.update({str(outcome.cell.folder): outcome.state}))
    return states


def test_cells_that_share_a_pass_give_what_separate_runs_give(content, tmp_path, model_folder, store) -> None:
    matrix = matrix_of(content, tmp_path)
    states = run(matrix)
    assert len(states) == 6 and set(states.values()) == {"done"}
    common = {"pretrained": str(model_folder), "max_length": MAX_LENGTH, "batch_size": 3, "device": "cpu"}
    metadata = {"pretrained": str(model_folder)} | content["metadata"]
    manager = TaskManager(
        include_path=[content["include_path"], str(SCRIPTS.parent / "tasks")],
        include_defaults=False,
        metadata=metadata,
    )
    for cell in matrix.cells:
        settings = {name: value for name, value in METHODS[cell.method].items() if name != "model"}
        alone = CausalHFLM(**common) if cell.method == "base" else KNNHF(**common, datastore=store.path, **settings)
        expected = lm_eval.simple_evaluate(
            model=alone, tasks=[cell.task_settings["task"]], limit=cell.task_settings.get("limit"), task_manager=manager
        )
        metrics, samples = figures(matrix.output / cell.folder)
        (task,) = expected["results"]
        for name, value in expected["results"][task].items():
            if isinstance(value, float) and "stderr" not in name:
                assert metrics[task][name] == pytest.approx(value, rel=1e-5), (str(cell), name)
        for sample, theirs in zip(
            samples, sorted(expected["samples"][task], key=lambda sample: sample["doc_id"]), strict=True
        ):
            assert sample["doc_hash"] == theirs["doc_hash"] and sample["prompt_hash"] == theirs["prompt_hash"]
            for mine, other in zip(sample["filtered_resps"], theirs["filtered_resps"], strict=True):
                mine, other = (x[0] if isinstance(x, (list, tuple)) else x for x in (mine, other))
                assert float(mine) == pytest.approx(float(other), rel=1e-5, abs=1e-4)
        if cell.kind == "knn-hf":
            (file,) = (matrix.output / cell.folder).glob("*/results_*.json")
            info = json.loads(file.read_text())["config"]["knn"]
            assert info["searches"] == alone.retriever.statistics.searches
            assert info["tokens_scored"] == alone.scorer.tokens_scored
            assert info["seconds"]["forward"] > 0


def test_stores_of_other_keys_do_not_share_a_pass(content, tmp_path, store, lm, model_folder) -> None:
    documents = cut_into_documents(TRAIN_TEXT[:3000].splitlines(keepends=True), "line")
    args = {"pretrained": str(model_folder)}
    early = dump_datastore(lm, documents, tmp_path / "early", model_args=args, key_module="layers.0.mlp")
    build_index(early, "Flat")
    content["methods"] = {"knn": METHODS["knn"]}
    content["tasks"] = {"choose": {"task": "local_choose"}}
    found = []
    for name, stores in (("together", {"late": store, "early": early}), ("alone", {"early": early})):
        changes = {"datastores": {key: str(one.path) for key, one in stores.items()}, "output": str(tmp_path / name)}
        matrix = matrix_of(content | changes, tmp_path)
        assert set(run(matrix).values()) == {"done"}
        found.append(figures(matrix.output / matrix.cells[-1].folder)[1])
    assert [sample["filtered_resps"] for sample in found[0]] == [sample["filtered_resps"] for sample in found[1]]


@pytest.mark.parametrize("recompute", [False, True])
def test_distances_of_two_kinds_are_told(content, tmp_path, store, caplog, recompute: bool) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    build_index(Datastore.open(tmp_path / "store"), "IVF16,PQ8x4fs", name="fs", quality_queries=0)
    changes = {"index": "fs", "recompute_dists": recompute}
    methods = {"base": METHODS["base"]} | {name: METHODS[name] | changes for name in ("knn", "retomaton")}
    content |= {"datastores": {"topics": str(tmp_path / "store")}, "methods": methods, "tasks": {"law": {"limit": 3}}}
    matrix = matrix_of(content, tmp_path)
    with caplog.at_level("WARNING"):
        assert set(run(matrix).values()) == {"done"}
    assert ("give both methods recompute_dists: true" in caplog.text) == (not recompute)
    results, _ = read_folder([matrix.output])
    kinds = {result.method: result.distances for result in results}
    assert kinds == {"base": None, "knn": "exact" if recompute else "approximate", "retomaton": "exact"}
    (task,) = compare(results, "base").tasks
    assert any("exact and approximate distances" in warning for warning in task.warnings) == (not recompute)


def test_texts_are_read_once_for_all_methods_and_the_model_loaded_once(content, tmp_path, monkeypatch) -> None:
    rows, loads = [], []
    encode, load = LanguageModel.encode, CausalHFLM._create_model
    monkeypatch.setattr(LanguageModel, "encode", lambda self, ids: rows.append(ids.numel()) or encode(self, ids))
    monkeypatch.setattr(CausalHFLM, "_create_model", lambda *a, **k: loads.append(1) or load(*a, **k))
    content["tasks"] = {"law": {"limit": 5}}
    only_knn = content | {"methods": {"knn": METHODS["knn"]}, "output": str(tmp_path / "one")}
    run(matrix_of(only_knn, tmp_path))
    alone = [size for size in rows if size > MAX_LENGTH]
    assert alone and len(loads) == 1
    rows.clear()
    run(matrix_of(content, tmp_path))
    assert [size for size in rows if size > MAX_LENGTH] == alone
    assert len(loads) == 2


def test_finished_cells_are_skipped_until_their_configuration_changes(content, tmp_path) -> None:
    content["tasks"] = {"law": {"limit": 3}}
    matrix = matrix_of(content, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    assert set(run(matrix).values()) == {"finished"}
    content["methods"] = METHODS | {"knn": METHODS["knn"] | {"lmbda": 0.5}}
    changed = matrix_of(content, tmp_path)
    assert [state for _, state in sorted(run(changed).items())] == ["finished", "done", "finished"]
    # A file cut off in the middle does not count as finished.
    (samples,) = (changed.output / "tiny" / "base" / "law").glob("*/samples_*.jsonl")
    samples.write_bytes(samples.read_bytes()[:-40])
    assert run(changed)["tiny/base/law"] == "done"


def test_a_failed_cell_does_not_stop_the_others(content, tmp_path, monkeypatch) -> None:
    content["tasks"] = {"law": {"limit": 3}, "absent": {}}
    content["methods"] = METHODS | {"greedy": {"k": 10**9}}
    matrix = matrix_of(content, tmp_path)
    outcomes = run_matrix(matrix, lambda outcome: None)
    messages = {str(outcome.cell.folder): str(outcome.error) for outcome in outcomes if outcome.state == "failed"}
    assert "does not fit the datastore" in messages.pop("tiny/greedy/topics/law")
    assert "does not fit the datastore" in messages.pop("tiny/greedy/topics/absent")
    assert set(messages) == {"tiny/base/absent", "tiny/knn/topics/absent", "tiny/retomaton/topics/absent"}
    assert all("no task called 'absent'" in message for message in messages.values())
    assert finished_results(matrix.output / "tiny/knn/topics/law", matrix.cells[1].checksum()) is not None


def test_an_error_in_the_middle_of_a_shared_pass_is_that_cells_own(content, tmp_path, monkeypatch) -> None:
    content["tasks"] = {"law": {"limit": 3}}

    def broken(*_: Any) -> None:
        raise RuntimeError("the automaton broke")

    monkeypatch.setattr("knn_lm_eval.model.retomaton.RetomatonScorer.score_readings", broken)
    outcomes = run_matrix(matrix_of(content, tmp_path), lambda outcome: None)
    assert {str(o.cell.folder): o.state for o in outcomes} == {
        "tiny/base/law": "done",
        "tiny/knn/topics/law": "done",
        "tiny/retomaton/topics/law": "failed",
    }
    assert "the automaton broke" in str(next(o.error for o in outcomes if o.error))


def test_a_group_may_have_tasks_whose_names_begin_alike(content, tmp_path) -> None:
    task = yaml.safe_load((tmp_path / "tasks" / "choose.yaml").read_text())
    (tmp_path / "tasks" / "more.yaml").write_text(yaml.safe_dump(task | {"task": "local_choose_more"}))
    group = {"group": "both", "task": ["local_choose", "local_choose_more"]}
    (tmp_path / "tasks" / "group.yaml").write_text(yaml.safe_dump(group))
    content |= {"tasks": {"both": {}}, "methods": {"base": {}}}
    matrix = matrix_of(content, tmp_path)
    assert run(matrix) == {"tiny/base/both": "done"}
    assert run(matrix_of(content, tmp_path)) == {"tiny/base/both": "finished"}
    assert "openbookqa" in task_manager(matrix.cells[0], matrix.include_path).all_tasks  # it could be a member, too


def test_stores_whose_keys_come_from_other_modules_share_no_pass(content, tmp_path, model_folder, store) -> None:
    lm = CausalHFLM(str(model_folder))
    other = dump_datastore(
        lm,
        cut_into_documents([TRAIN_TEXT[:2000]], "line"),
        tmp_path / "other",
        key_module="model.layers.0.mlp",
        model_args={"pretrained": str(model_folder)},
    )
    build_index(other, "Flat")
    content |= {
        "datastores": {"topics": str(store.path), "other": str(other.path)},
        "methods": {"knn": METHODS["knn"]},
        "tasks": {"law": {"limit": 2}},
    }
    matrix = matrix_of(content, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    together = [figures(matrix.output / cell.folder)[0]["law"]["token_perplexity,none"] for cell in matrix.cells]
    for cell, figure in zip(matrix.cells, together, strict=True):
        alone = {"datastores": {cell.datastore: cell.args["datastore"]}, "output": str(tmp_path / "alone")}
        run(matrix_of(content | alone, tmp_path))
        metrics, _ = figures(tmp_path / "alone" / cell.folder)
        assert metrics["law"]["token_perplexity,none"] == pytest.approx(figure, rel=1e-5), cell.datastore


def test_generated_text_in_a_matrix(content, tmp_path) -> None:
    task = yaml.safe_load((CHOICES.parent / "go_on.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(CHOICES.parent / "go_on.jsonl")
    (Path(content["include_path"]) / "go_on.yaml").write_text(yaml.safe_dump(task))
    content |= {"tasks": {"local_go_on": {"limit": 2}}, "methods": {n: METHODS[n] for n in ("base", "knn")}}
    matrix = matrix_of(content, tmp_path)
    assert set(run(matrix).values()) == {"done"}
    texts = [[s["filtered_resps"] for s in figures(matrix.output / cell.folder)[1]] for cell in matrix.cells]
    assert texts[0] != texts[1]


def test_a_killed_benchmark_goes_on_to_the_same_files(content, tmp_path) -> None:
    kill_after = 2  # of the three cells that share a pass
    expected = matrix_of(content | {"output": str(tmp_path / "expected")}, tmp_path)
    run(expected)
    matrix = matrix_of(content, tmp_path)
    file = tmp_path / "benchmark.yaml"
    process = Ready(script("benchmark", file))
    while process.poll() is None and f"\n[{kill_after}/" not in "\n" + process.printed()[0]:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [cell for cell in matrix.cells if (matrix.output / cell.folder).exists()]
    assert kill_after <= len(done) < len(matrix.cells)
    before = {path: path.stat().st_mtime_ns for cell in done for path in (matrix.output / cell.folder).rglob("*.*")}
    states = run(matrix)
    assert sorted(states.values()) == sorted(["finished"] * len(done) + ["done"] * (len(matrix.cells) - len(done)))
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    for cell in matrix.cells:
        assert figures(matrix.output / cell.folder) == figures(expected.output / cell.folder)
    assert not list(matrix.output.rglob(".*"))


def test_what_a_cell_depends_on_is_part_of_its_checksum(content, tmp_path, store) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    (tmp_path / "tuned.json").write_text("{}")
    content["datastores"] = {"topics": str(copy)}
    content["methods"] = {"knn": METHODS["knn"] | {"clusters": str(tmp_path / "tuned.json")}}
    content["tasks"] = {"law": {}}

    def checksum(**changes: Any) -> str:
        (cell,) = matrix_of(content | changes, tmp_path).cells
        return cell.checksum()

    first = checksum()
    assert checksum(batch_size=1) == checksum(output="elsewhere") == first
    others = [checksum(seed=5), checksum(tasks={"law": {"limit": 9}}), checksum(metadata={"data_dir": "other"})]
    (tmp_path / "tuned.json").write_text("{ }")
    others.append(checksum())
    (copy / "params.json").write_text("{}")
    others.append(checksum())
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"probe": 3}))
    others.append(checksum())
    content["methods"] = {"retomaton": METHODS["retomaton"] | {"clusters": "km"}}
    for iterations in (1, 2):
        cluster_kmeans(Datastore.open(copy), name="km", num_clusters=20, iterations=iterations, overwrite=True)
        others.append(checksum())
    built = (copy / "index.faiss").read_bytes()
    (copy / "index.faiss").write_bytes(built[:-1] + bytes([built[-1] ^ 1]))
    change_json(copy / "manifest.json", derived={})  # what the files hold counts where nothing is recorded
    others.append(checksum())
    model = tmp_path / "model"
    shutil.copytree(content["models"]["tiny"]["pretrained"], model)
    content["models"] = {"tiny": {"pretrained": str(model)}}
    others.append(checksum())
    (model / "config.json").write_text((model / "config.json").read_text() + " ")  # trained on, in the same place
    others.append(checksum())
    assert len({first, *others}) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": {}}, "unknown key 'modles'; did you mean 'models'?"),
        ({"methods": {"knn": {"lambda": 0.2}}}, "methods: knn: unknown key 'lambda'; did you mean 'lmbda'?"),
        ({"methods": {"base": {"k": 3}}}, "methods: base: unknown key 'k'; did you mean"),
        ({"tasks": {"law": {"limits": 3}}}, "tasks: law: unknown key 'limits'; did you mean 'limit'?"),
        ({"tasks": {"law": {"limit": 0}}}, "tasks: law: limit: 0 is not a number above 0."),
        ({"models": {"tiny": {"pretraind": "x"}}}, "models: tiny has no `pretrained`; say which model it is."),
        (
            {"models": {"tiny": {"pretrained": "x", "max_lenght": 9}}},
            "models: tiny: unknown key 'max_lenght'; did you mean 'max_length'?",
        ),
        ({"datastores": {"a": {"paht": "x"}}}, "datastores: a: unknown key 'paht'; did you mean 'path'?"),
        (
            {"datastores": {"a": {"path": "x", "models": ["tinny"]}}},
            "datastores: a: models: unknown key 'tinny'; did you mean 'tiny'?",
        ),
        ({"methods": {"a/b": {}}}, "methods: 'a/b' cannot name a folder"),
        ({"tasks": None}, "tasks is missing or empty."),
        ({"datastores": None}, "needs a datastore; list some under `datastores`."),
        ({"models": 3}, "models: 3 should be keys and values."),
    ],
)
def test_mistakes_in_the_file_are_named(content, tmp_path, change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        matrix_of(content | change, tmp_path)
    assert message in str(error.value) and "benchmark.yaml" in str(error.value)


def test_an_output_that_cannot_be_made_is_named(content, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write to .*file/results"):
        run(matrix_of(content | {"output": str(tmp_path / "file" / "results")}, tmp_path))


def test_names_are_filled_into_settings_and_datastores_kept_to_their_models(content, tmp_path) -> None:
    content["models"]["other"] = {"pretrained": "x"}
    content["datastores"] = {"a": {"path": "A", "models": "tiny"}, "b": "{model}/B"}
    content["methods"] = {"base": {}, "knn": {"clusters": "{model}-{datastore}"}}
    cells = matrix_of(content, tmp_path).cells
    assert [(c.model, c.datastore, c.kind, c.args.get("clusters")) for c in cells if c.task == "law"] == [
        ("tiny", None, "hf", None),
        ("tiny", "a", "knn-hf", "tiny-a"),
        ("tiny", "b", "knn-hf", "tiny-b"),
        ("other", None, "hf", None),
        ("other", "b", "knn-hf", "other-b"),
    ]
    assert [c.args.get("datastore") for c in cells if c.task == "law"] == [None, "A", "tiny/B", None, "other/B"]


def test_the_dry_run_counts_tokens_and_memory_and_learns_from_finished_cells(content, tmp_path, store) -> None:
    content["tasks"] = {"law": {"limit": 5}}
    matrix = matrix_of(content | {"methods": {"knn": METHODS["knn"]}}, tmp_path)
    run(matrix)
    (results,) = (matrix.output / "tiny/knn/topics/law").glob("*/results_*.json")
    done = json.loads(results.read_text())["config"]["knn"]
    content["methods"] = {"knn": METHODS["knn"] | {"k": 41}, "retomaton": METHODS["retomaton"]}
    content["tasks"]["choose"] = {"task": "local_choose"}
    law_knn, law_retomaton, *choose = estimate(matrix_of(content, tmp_path))
    assert law_knn.tokens_read == law_retomaton.tokens_read == done["tokens_scored"]
    parameters = sum(p.numel() for p in CausalHFLM(**content["models"]["tiny"], device="cpu").model.parameters())
    expected = 4 * parameters + (store.path / "index.faiss").stat().st_size + 4 * len(store)
    assert law_knn.memory == law_retomaton.memory == expected
    assert law_retomaton.seconds > 0 and not law_retomaton.measured
    assert all(one.tokens_read > 0 for one in choose)
    content["models"]["tiny"]["dtype"] = "float31"  # to be reported when the cell is run
    assert all(one.memory is None for one in estimate(matrix_of(content, tmp_path)))
    del content["models"]["tiny"]["dtype"]
    # The same cells as before are finished, and tell the speed of others.
    content["methods"] = {"knn": METHODS["knn"]}
    law, choose_knn = estimate(matrix_of(content, tmp_path))
    assert law.state == "finished" and choose_knn.measured
    speed = done["tokens_scored"] / sum(done["seconds"].values())
    assert choose_knn.seconds == pytest.approx(choose_knn.tokens_read / speed)


def test_records_lie_beside_the_results(content: dict, tmp_path: Path) -> None:
    content |= {"records": True, "methods": {"base": {"model": "hf"}, "knn": {"k": 20, "lmbda": 0.6, "knn_temp": 2.0}}}
    content["methods"]["walk"] = {"k": 20, "lmbda": 0.6, "knn_temp": 2.0, "retomaton": True, "min_knns": 3}
    content["tasks"] = {"law": {"limit": 3}}
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    matrix = read_matrix(tmp_path / "matrix.yaml")
    assert [outcome.state for outcome in run_matrix(matrix, lambda outcome: None)] == ["done"] * 3
    assert not list(matrix.output.rglob(".*records*"))
    assert [cell.method for cell in matrix.cells if (matrix.output / cell.folder / "records").exists()] == [
        "knn",
        "walk",
    ]
    found = []
    for cell in matrix.cells[1:]:
        records = read_records(matrix.output / cell.folder / "records")
        results = finished_results(matrix.output / cell.folder, cell.checksum())
        assert results is not None and records.tasks == ["law"]
        log_prob = float(records.columns["log_prob"].astype(np.float64).mean())
        assert math.exp(-log_prob) == pytest.approx(results["results"]["law"]["token_perplexity,none"], rel=1e-5)
        found.append(records)
    check_same_tokens(found)
    assert [outcome.state for outcome in run_matrix(matrix, lambda outcome: None)] == ["finished"] * 3
    content["methods"]["knn"]["records"] = "here"
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="methods: knn: records is for the whole file"):
        read_matrix(tmp_path / "matrix.yaml")
