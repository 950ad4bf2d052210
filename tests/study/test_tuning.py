"""One pass over a grid of settings against separate evaluations, and what tune refuses and warns of."""

from __future__ import annotations

import csv
import json
import math
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.places import SCRIPTS
from helpers.programs import others_task_files, run_script
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT
from lm_eval.api.instance import Instance
from lm_eval.tasks._index import TaskIndex

import knn_lm_eval
from knn_lm_eval import KNNHF, Datastore, UserError
from knn_lm_eval.make.suffix_building import build_suffix_array
from knn_lm_eval.methods.mixture import knn_log_prob, neighbour_log_weights
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.study.grid import Best, Grid, Surface, find_best, on_edges, parse_axis
from knn_lm_eval.study.grid_scorer import GridScorer, knn_log_probs

TEXTS = [EVAL_TEXT, TRAIN_TEXT[2000:2400], "Nothing of this kind."]
GRID = Grid(k=(1, 5, 40), knn_temp=(0.3, 4.0, 60.0), lmbda=(0.0, 0.2, 0.9))


def rolling(lm: KNNHF) -> list:
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS])


def tune(store: Datastore, grid: Grid, **changes: object) -> GridScorer:
    lm = KNNHF(datastore=store.path, batch_size=2, k=grid.k[-1], lmbda=0.5, knn_temp=1.0, **changes)
    scorer = GridScorer(lm, grid, 0)
    with lm.scored_by(scorer):
        base = sum(rolling(lm))
    assert scorer.base_log_prob == pytest.approx(base)
    return scorer


def separately(store: Datastore, settings: dict, **changes: object) -> tuple[float, float | None]:
    """The log-likelihood of the texts, and the searches, by an evaluation with these settings alone."""
    results = rolling(KNNHF(datastore=store.path, batch_size=2, **settings, **changes))
    searches = [result.num_searches for result in results]
    return sum(results), None if None in searches else sum(searches)


@pytest.fixture(scope="module")
def several_indexes(store: Datastore, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("indexes") / "store"
    shutil.copytree(store.path, folder)
    copy = Datastore.open(folder)
    build_index(copy, "IVF16,PQ8", name="pq", quality_queries=0)
    return copy


def some(scorer: GridScorer, every: int) -> list[tuple[dict, float]]:
    settings = [pair for surface in scorer.surfaces for pair in surface.settings()]
    return settings[::every]


@pytest.mark.parametrize("changes", [{}, {"index": "pq"}, {"index": "pq", "recompute_dists": True}])
def test_grid_values_equal_separate_evaluations(several_indexes: Datastore, changes: dict) -> None:
    scorer = tune(several_indexes, GRID, **changes)
    (surface,) = scorer.surfaces
    assert surface.log_prob.size == 27
    for settings, log_prob in some(scorer, 4):
        assert log_prob == pytest.approx(separately(several_indexes, settings, **changes)[0], rel=1e-6)
    lm_alone = surface.log_prob[:, :, 0]
    assert lm_alone == pytest.approx(np.full(lm_alone.shape, scorer.base_log_prob), rel=1e-12)
    ((settings, log_prob),) = scorer.defaults.settings()
    assert settings == {"k": 40, "knn_temp": 1.0, "lmbda": 0.25, "probe": surface.fixed["probe"]}
    assert log_prob == pytest.approx(separately(several_indexes, settings, **changes)[0], rel=1e-6)


# What ``choose_factory`` gives with and without a budget (at this width), and what people use. Whether a search for
# few neighbours finds the first of those that a search for many finds differs between them.
FACTORIES = [
    "Flat",
    "IVF16,Flat",
    "IVF16,SQ8",
    "IVF16,PQ8",
    "OPQ8,IVF16,PQ8",
    "IVF16,PQ8x4fs",
    "IVF16,PQ8x4fs,RFlat",
    "IVF16,PQ8,RFlat",
    "PQ8x4fs,RFlat",
    "RR32,IVF16,RaBitQ",
    "RR32,IVF16,RaBitQ4",
    "RR32,IVF16,RaBitQfs",
    "RR32,IVF16,RaBitQfs2",
    "RR32,IVF16,RaBitQfs4",
    "PCAR24,IVF16,RaBitQfs",
    "IVF16_HNSW32,SQ8",
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_each_k_is_a_search_of_its_own_whatever_the_index(store: Datastore, tmp_path: Path, factory: str) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    copy = Datastore.open(tmp_path / "store")
    build_index(copy, factory, name="of", quality_queries=0)
    grid = Grid(k=(1, 4, 16, 300), knn_temp=(4.0,), lmbda=(0.9,))
    scorer = tune(copy, grid, index="of")
    settings = some(scorer, 1)
    assert [one["k"] for one, _ in settings] == [1, 4, 16, 300]
    for one, log_prob in settings:
        assert log_prob == pytest.approx(separately(copy, one, index="of")[0], rel=1e-6), one
    ((one, log_prob),) = scorer.defaults.settings()
    assert one["k"] == 300 and log_prob == pytest.approx(separately(copy, one, index="of")[0], rel=1e-6)


@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs,RFlat", "RR32,IVF16,RaBitQfs4"])
def test_each_k_of_a_walk_is_searched_with(store: Datastore, tmp_path: Path, factory: str) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    copy = Datastore.open(tmp_path / "store")
    build_index(copy, factory, name="of", quality_queries=0)
    grid = Grid((2, 20), (4.0,), (0.9,), min_knns=(1, math.inf))
    scorer = tune(copy, grid, index="of", retomaton=True)
    for surface in scorer.surfaces:
        ((one, log_prob),) = surface.settings()
        expected, searches = separately(copy, one, index="of", retomaton=True)
        assert log_prob == pytest.approx(expected, rel=1e-6) and surface.searches == searches


def test_each_probe_is_searched_with(several_indexes: Datastore) -> None:
    grid = Grid(k=(5, 40), knn_temp=(4.0,), lmbda=(0.5,), probe=(1, 3))
    scorer = tune(several_indexes, grid, index="pq")
    assert [surface.fixed for surface in scorer.surfaces] == [{"probe": 1}, {"probe": 3}]
    for settings, log_prob in some(scorer, 1):
        assert log_prob == pytest.approx(separately(several_indexes, settings, index="pq")[0], rel=1e-6)
    with pytest.raises(UserError, match="--probe is for indexes with inverted lists"):
        tune(several_indexes, grid)


@pytest.mark.parametrize("changes", [{}, {"retomaton": True}])
def test_ngrams_equal_separate_evaluations(several_indexes: Datastore, changes: dict) -> None:
    copy = Datastore.open(several_indexes.path)
    build_suffix_array(copy, overwrite=True)
    grid = Grid(k=(5,), knn_temp=(4.0,), lmbda=(0.0, 0.4), ngram_lmbda=(0.0, 0.2, 0.7))
    scorer = tune(copy, grid, ngram_lmbda=0.5, **changes)
    settings = some(scorer, 1)
    assert len(settings) == 6 and {setting["ngram_lmbda"] for setting, _ in settings} == {0.0, 0.2, 0.7}
    for setting, log_prob in settings:
        assert separately(copy, setting, **changes)[0] == pytest.approx(log_prob, rel=1e-6)


def test_retomatons_walks_equal_separate_evaluations(store: Datastore) -> None:
    grid = Grid((8, 20), (0.5, 5.0), (0.2, 0.9), min_knns=(1, 4, math.inf), max_knns=(10, 40))
    scorer = tune(store, grid, retomaton=True)
    assert len(scorer.surfaces) == 12
    for number, surface in enumerate(scorer.surfaces):
        settings, log_prob = list(surface.settings())[number % 4]
        expected, searches = separately(store, settings, retomaton=True)
        assert log_prob == pytest.approx(expected, rel=1e-6)
        assert surface.searches == searches
    assert not scorer.defaults.log_prob.any()  # max_knns=1024 was not walked with
    # A fraction to save chooses among the walks that save so much.
    saved = [1 - surface.searches / scorer.tokens_scored for surface in scorer.surfaces]
    fraction = sorted(saved)[8]
    saving = find_best(scorer.surfaces, scorer.tokens_scored, fraction)
    allowed = [surface for surface, part in zip(scorer.surfaces, saved, strict=True) if part >= fraction]
    assert 0 < len(allowed) < 12
    assert saving.log_prob == max(surface.log_prob.max() for surface in allowed)
    with pytest.raises(UserError, match="No setting of the grid saves 0.99"):
        find_best(scorer.surfaces, scorer.tokens_scored, 0.99)


def test_all_k_and_temperatures_at_once_equal_one_by_one() -> None:
    random = np.random.default_rng(0)
    distances = torch.from_numpy(random.uniform(0, 3000, size=(300, 60)).astype(np.float32))
    distances[:100] = distances[:100].sort(dim=-1).values  # as a search gives them; the others as recompute_dists
    distances[7, 3:], distances[8] = math.inf, math.inf
    distances[9, :20] = math.inf
    values = torch.from_numpy(random.integers(0, 5, size=(300, 60)).astype(np.int32))
    targets = torch.from_numpy(random.integers(0, 5, size=300))
    counts = torch.from_numpy(random.integers(1, 9, size=(300, 60)))
    for numbers in (None, counts):
        _check_all_at_once(distances, values, numbers, targets)


def _check_all_at_once(
    distances: torch.Tensor, values: torch.Tensor, counts: torch.Tensor | None, targets: torch.Tensor
) -> None:
    temperatures, ks = (0.05, 1.0, 400.0), (1, 7, 20, 60)
    actual = knn_log_probs(distances, values, counts, targets, temperatures, ks)
    for t, temperature in enumerate(temperatures):
        for j, k in enumerate(ks):
            theirs = None if counts is None else counts[:, :k]
            weights = neighbour_log_weights(distances[:, :k].double(), temperature, theirs)
            expected = knn_log_prob(weights, values[:, :k], targets)
            # float32 cannot hold a share below e^-103, which is 0 in any mixture.
            small = expected < -80
            assert (actual[small, t, j] < -79).all()
            torch.testing.assert_close(actual[~small, t, j], expected[~small], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_setting_on_the_grids_edge_is_named_where_the_grid_could_go_on() -> None:
    surface = Surface({"probe": 4}, (1, 8, 64), (1.0, 2.0, 4.0), (0.1, 0.5, 0.9))
    edges = {(0, 1, 1): ["knn_temp"], (1, 1, 1): [], (2, 0, 2): ["knn_temp", "lmbda"], (1, 2, 0): ["k", "lmbda"]}
    for place, names in edges.items():
        assert sorted(on_edges(Best(surface, place, 0.0), [surface], entries=1000)) == sorted(names)
    assert on_edges(Best(surface, (1, 2, 1), 0.0), [surface], entries=64) == []  # no more entries than that
    single = Surface({"probe": 4}, (8,), (1.0,), (0.5,))
    assert on_edges(Best(single, (0, 0, 0), 0.0), [single], entries=1000) == []


def test_grids_are_read_and_bad_ones_named() -> None:
    assert parse_axis("lmbda", "0.1:0.5:5", low=0, high=0.999) == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert parse_axis("knn_temp", "1:16:5", low=1e-6) == (1, 2, 4, 8, 16)
    assert parse_axis("k", "64, 8,64", low=1, whole=True) == (8, 64)
    assert parse_axis("min_knns", "1,inf", low=0) == (1, math.inf)
    assert parse_axis("knn_temp", 2, low=1e-6) == parse_axis("knn_temp", [2.0], low=1e-6) == (2,)
    with pytest.raises(UserError, match="--knn_temp None is no grid"):
        parse_axis("knn_temp", None, low=1e-6)  # type: ignore[arg-type]  # as in a file

    def refuses(name: str, text: str, sentence: str, **limits: float) -> None:
        with pytest.raises(UserError, match=sentence):
            parse_axis(name, text, **({"low": 0.0} | limits))

    refuses("k", "", "--k '' is an empty grid")
    refuses("knn_temp", "1:8:0", "empty grid")
    refuses("knn_temp", "0:8:4", "is no grid|out of range", low=1e-6)
    refuses("knn_temp", "1:8", "give numbers separated by commas, or FIRST:LAST:COUNT")
    refuses("knn_temp", "many", "is no grid")
    refuses("lmbda", "0.5,1.5", "--lmbda 1.5 is out of range: it must be from 0 to 0.999", high=0.999)
    refuses("k", "2.5", "--k 2.5 is not a whole number", whole=True)
    refuses("max_knns", "inf", "--max_knns inf is not a whole number", whole=True)
    refuses("min_knns", "nan", "out of range")


# --------------------------------------------------------------------------------------------- the command itself


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for file in ("dev.en", "test.en"):
        (tmp_path / "data" / file).write_text("\n".join(TEXTS) + "\n")
    return tmp_path / "data"


@pytest.fixture
def tune_main(monkeypatch, data: Path) -> Callable[..., None]:
    """The script's ``main``, called with arguments as from a shell."""
    main = runpy.run_path(str(SCRIPTS / "tune.py"))["main"]
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main sets one

    def run(store: Datastore, to: Path, *more: str, model_args: str = "", tasks: str = "law_valid") -> None:
        command = ["tune", "--model_args", f"datastore={store.path}{model_args}", "--metadata", f"data_dir={data}"]
        monkeypatch.setattr(sys, "argv", [*command, "--tasks", tasks, "--output", str(to), *more])
        main()

    return run


def test_the_command_writes_what_an_evaluation_then_uses(
    store: Datastore, data: Path, tmp_path: Path, tune_main
) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    mine = Datastore.open(tmp_path / "store")
    grid = ["--k", "4,32", "--knn_temp", "1,4,16,64", "--lmbda", "0.1:0.9:5"]
    command = ["tune", "--model_args", f"datastore={mine.path}"]
    command += ["--metadata", f"data_dir={data}", "--tasks", "law_valid", *grid, "--save_default"]
    command += ["--output", str(tmp_path / "out" / "tuned.json")]
    run = run_script(*command)
    assert run.returncode == 0, run.stderr[-2000:]
    for suffix in ("csv", "json", "png", "svg"):
        assert (tmp_path / "out" / f"tuned.{suffix}").stat().st_size > 100
    rows = list(csv.DictReader((tmp_path / "out" / "tuned.csv").open()))
    assert len(rows) == 2 * 4 * 5
    best = min(rows, key=lambda row: float(row["token_perplexity"]))
    content = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert {name: float(best[name]) for name in ("k", "knn_temp", "lmbda")} == content["settings"]
    assert float(best["token_perplexity"]) == content["tuned_for"]["token_perplexity"]
    assert content["tuned_for"]["tasks"] == ["law_valid"] and content["tuned_for"]["seed"] == 0
    for word in ("LM alone", "defaults", "best", "40 settings"):
        assert word in run.stdout
    on_edge = content["settings"]["lmbda"] in (0.1, 0.9)
    assert ("--lmbda (" in run.stderr) == on_edge

    # The store has it now; the file is the same when written again.
    results = rolling(KNNHF(datastore=mine.path))
    perplexity = math.exp(-sum(results) / sum(result.num_tokens for result in results))
    assert perplexity == pytest.approx(float(best["token_perplexity"]), rel=1e-6)
    tune_main(mine, tmp_path / "again.json", *grid)
    for suffix in ("csv", "json", "svg"):
        first, second = (tmp_path / "out" / f"tuned.{suffix}"), (tmp_path / f"again.{suffix}")
        assert first.read_bytes() == second.read_bytes()


def test_the_function_gives_what_the_command_writes(store: Datastore, data: Path, tmp_path: Path, tune_main) -> None:
    axes = {"k": "4,32", "knn_temp": "1,4,16", "lmbda": "0.1:0.9:5"}
    tune_main(store, tmp_path / "tuned.json", *(part for name, axis in axes.items() for part in (f"--{name}", axis)))
    numbers = {"k": (4, 32), "knn_temp": [1, 4, 16], "lmbda": (0.1, 0.3, 0.5, 0.7, 0.9)}
    found = knn_lm_eval.tune({"datastore": store.path}, ["law_valid"], metadata={"data_dir": str(data)}, **numbers)
    found.params.write(tmp_path / "again.json")
    found.write_grid(tmp_path / "again.csv")
    for suffix in ("json", "csv"):
        assert (tmp_path / f"again.{suffix}").read_bytes() == (tmp_path / f"tuned.{suffix}").read_bytes()
    assert [row[""] for row in found.summary()] == ["LM alone", "defaults", "best"]
    assert len(list(found.rows())) == 2 * 3 * 5
    with pytest.raises(UserError, match="lmbda is what tune looks for"):
        knn_lm_eval.tune({"datastore": store.path, "lmbda": 0.3}, ["law_valid"])


@pytest.mark.parametrize("kind", ["buckets", "gate"])
def test_an_adaptive_lmbda_is_fitted_and_then_scores_as_promised(
    store: Datastore, tmp_path: Path, tune_main, kind: str
) -> None:
    grid = ["--k", "4,32", "--knn_temp", "4,16", "--lmbda", "0.1,0.5", "--adaptive", kind]
    grid += ["--saved_searches", "0.25"] if kind == "gate" else []
    tune_main(store, tmp_path / "tuned.json", *grid)
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert content["settings"]["lmbda"]["kind"] == kind
    tuned_for = content["tuned_for"]
    assert tuned_for["sampled_tokens"] == tuned_for["tokens"]
    if kind == "buckets":
        assert tuned_for["token_perplexity"] < tuned_for["constant_token_perplexity"]
    lm = KNNHF(datastore=store.path, params=str(tmp_path / "tuned.json"))
    results = rolling(lm)
    perplexity = math.exp(-sum(results) / sum(result.num_tokens for result in results))
    assert perplexity == pytest.approx(tuned_for["token_perplexity"], rel=1e-5)
    assert lm.augmentation.sources["lmbda"] == "params"
    if kind == "gate":
        assert lm.get_model_info()["knn"]["saved_searches"] == pytest.approx(0.25, abs=0.01)


def test_what_tune_refuses(store: Datastore, tmp_path: Path, tune_main, monkeypatch) -> None:
    output = tmp_path / "tuned.json"
    # It is looked for among lm-eval's own tasks, which takes ten seconds.
    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(others_task_files))

    def refuses(sentence: str, *more: str, to: Path = output, **changes: str) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            tune_main(store, to, *more, **changes)
        assert "\n" not in str(caught.value)

    refuses("law is scored on its test split.* such as law_valid, or force it with --allow_test", tasks="law")
    refuses("--k 6000 is out of range: it must be from 1 to", "--k", "6000")
    refuses("ngram_lmbda is what tune looks for", model_args=",ngram_lmbda=0.3")
    refuses("fitted without n-grams", "--adaptive", "buckets", "--ngram_lmbda", "0.3")
    refuses("lmbda is what tune looks for", model_args=",lmbda=0.3")
    refuses("--min_knns is for RetoMaton", "--min_knns", "1,2")
    refuses("--probe is tuned for kNN-LM", "--probe", "1,2", model_args=",retomaton=True")
    refuses("--saved_searches needs --adaptive gate", "--saved_searches", "0.5")
    refuses("--saved_searches 1 must be at least 0 and below 1", "--saved_searches", "1")
    gate = ["--saved_searches", "0.5", "--adaptive", "gate"]
    refuses("not for both together", *gate, model_args=",retomaton=True")
    refuses("should end in .json", to=tmp_path / "tuned")
    refuses("--limit 0 must be above 0", "--limit", "0")
    refuses("There is no task called 'lawful'", tasks="lawful")
    refuses("carry_state=True cannot be tuned with", model_args=",retomaton=True,carry_state=True")
    never = ["--min_knns", "0", "--adaptive", "gate", "--limit", "1", "--k", "4", "--knn_temp", "1"]
    refuses("No token has a neighbour", *never, model_args=",retomaton=True")
    assert not output.exists()
    tune_main(store, output, "--allow_test", "--limit", "1", tasks="law")
    assert output.exists()
