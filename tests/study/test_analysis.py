"""The analysis of token records: every figure against plain loops, and what a page and the verb make of it."""

from __future__ import annotations

import html
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.programs import run_script
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from knn_lm_eval import KNNHF, UserError
from knn_lm_eval.make.removing import remove_documents
from knn_lm_eval.make.suffix_building import build_suffix_array
from knn_lm_eval.report.analysis_page import analysis_page
from knn_lm_eval.report.analysis_tables import analysis_tables
from knn_lm_eval.report.binning import Binned, by_edges, by_kind, by_quantiles
from knn_lm_eval.report.intervals import mean_interval, paired_interval
from knn_lm_eval.report.leakage import leakage, leakage_warning
from knn_lm_eval.report.record_files import COLUMNS, Records, names_of, read_records
from knn_lm_eval.report.token_analysis import Draws, analyse_method, concentration, gains_of, units_of
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.study.analysis import analyse, bin_tokens, count_values

DRAWS = Draws(resamples=50)
TEXTS = [EVAL_TEXT[start : start + 90] for start in range(0, 540, 90)]
ABOUT: dict[str, Any] = {"settings": {}, "datastore": [], "tokenizer": {"name": None, "sha256": ""}, "model": {}}


def random_records(seed: int, documents: int, tokens: int, lost: float = 0.0) -> Records:
    """Records of random figures; ``lost`` is the share of tokens that the mixture makes impossible."""
    rng = np.random.default_rng(seed)
    columns = {name: np.zeros(tokens, dtype=kind) for name, kind in COLUMNS.items()}
    columns["document"] = np.sort(rng.integers(0, documents, tokens)).astype(np.int32)
    columns["lm_log_prob"] = -rng.exponential(3, tokens).astype(np.float32)
    columns["log_prob"] = (columns["lm_log_prob"] + rng.choice([-0.3, 0, 0.5], tokens) * rng.random(tokens)).astype(
        np.float32
    )
    columns["log_prob"][rng.random(tokens) < lost] = -math.inf
    columns["searched"] = rng.random(tokens) < 0.8
    return Records(Path("r"), ABOUT, ["t"], columns)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    documents=st.integers(1, 9),
    tokens=st.integers(1, 120),
    lost=st.sampled_from([0, 0.1]),
)
def test_every_figure_is_that_of_plain_loops(seed: int, documents: int, tokens: int, lost: float) -> None:
    records = random_records(seed, documents, tokens, lost)
    kinds = np.random.default_rng(seed).integers(-1, 3, tokens)
    binned = by_kind("kind", "kind", kinds, ["a", "b", "c"])
    units = units_of(records)
    method = analyse_method("one", records, [binned], units, DRAWS)
    log_prob, lm = (records.columns[name].tolist() for name in ("log_prob", "lm_log_prob"))
    gains = [p - q for p, q in zip(log_prob, lm, strict=True)]
    check_cell(method["summary"], gains, list(range(tokens)))
    if min(log_prob) > -math.inf:
        assert method["summary"]["perplexity"] == pytest.approx(math.exp(-sum(log_prob) / tokens))
    else:
        assert method["summary"]["perplexity"] is None
    assert method["summary"]["searched"] == pytest.approx(sum(records.columns["searched"].tolist()) / tokens)
    cells = {cell["label"]: cell for cell in method["by"]["kind"]["cells"]}
    for number, label in enumerate(["a", "b", "c"]):
        members = [i for i in range(tokens) if kinds[i] == number]
        if members:
            check_cell(cells.pop(label), gains, members)
    assert not cells
    check_units(units, records)


def check_cell(cell: dict[str, Any], gains: list[float], members: list[int]) -> None:
    mine = [gains[i] for i in members]
    finite = [gain for gain in mine if math.isfinite(gain)]
    total = sum(gain for gain in gains if math.isfinite(gain))
    assert cell["tokens"] == len(mine) and cell["share"] == pytest.approx(len(mine) / len(gains))
    assert cell["infinite"] == len(mine) - len(finite)
    assert cell["helped"]["mean"] == pytest.approx(sum(gain > 0 for gain in mine) / len(mine))
    assert cell["hurt"]["mean"] == pytest.approx(sum(gain < 0 for gain in mine) / len(mine))
    chosen = {
        "gain": finite,
        "gain_of_helped": [gain for gain in finite if gain > 0],
        "gain_of_hurt": [gain for gain in finite if gain < 0],
    }
    for name, some in chosen.items():
        if not some:
            assert cell[name] is None
            continue
        assert cell[name]["mean"] == pytest.approx(sum(some) / len(some), abs=1e-9)
        if cell[name]["low"] is not None:
            assert cell[name]["low"] <= cell[name]["mean"] + 1e-9 and cell[name]["mean"] <= cell[name]["high"] + 1e-9
    if total:
        assert cell["share_of_gain"] == pytest.approx(sum(finite) / total, abs=1e-9)


def check_units(units: Any, records: Records) -> None:
    documents = records.columns["document"].tolist()
    if len(set(documents)) > 1:
        order = sorted(set(documents))
        assert units.of_token.tolist() == [order.index(document) for document in documents]
        assert (units.count, units.name) == (len(order), "documents")
    else:
        assert units.documents == 1 and units.count == min(20, len(documents))
        sizes = np.bincount(units.of_token)
        assert sizes.max() - sizes.min() <= 1 and (np.diff(units.of_token) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(gains=st.lists(st.floats(-5, 5, allow_nan=False), min_size=1, max_size=60))
def test_concentration_is_that_of_plain_loops(gains: list[float]) -> None:
    found = concentration(np.array(gains))

    def fewest(values: list[float]) -> float | None:
        above = sorted((value for value in values if value > 0), reverse=True)
        running = 0.0
        for place, value in enumerate(above, 1):
            running += value
            if running >= 0.9 * sum(above) * (1 - 1e-9):
                return place / len(values)
        return None

    for name, values in (("share_of_tokens", gains), ("share_of_tokens_lost", [-gain for gain in gains])):
        share = fewest(values)
        assert found[name] == (None if share is None else pytest.approx(share, abs=1.01 / len(gains)))
    descending = sorted(gains, reverse=True)
    for share, height in found["curve"]:
        assert height == pytest.approx(sum(descending[: round(share * len(gains))]) / len(gains), abs=1e-9)
    assert found["curve"][-1] == [1.0, pytest.approx(sum(gains) / len(gains), abs=1e-9)]


def test_intervals_are_those_of_comparisons() -> None:
    units = np.abs(np.random.default_rng(3).standard_normal((12, 2))) + 0.1
    zero = np.column_stack([np.zeros(12), units[:, 1]])
    found, compared = mean_interval(units, 300), paired_interval(units, zero, "mean", 300)
    assert compared is not None
    assert found == (compared.difference, compared.low, compared.high)
    assert mean_interval(units[:1]) is None


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.one_of(st.floats(-3, 50), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=40),
    edges=st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_bins_by_edges(values: list[float], edges: list[int]) -> None:
    binned = by_edges("x", "x", np.array(values), edges)
    assert len(binned.labels) == len(set(binned.labels)) == len(edges)
    for value, place in zip(values, binned.bin_of.tolist(), strict=True):
        expected = [i for i, low in enumerate(edges) if value >= low and (i + 1 == len(edges) or value < edges[i + 1])]
        assert [place] == (expected or [-1])


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.one_of(st.floats(-50, 50, width=32), st.just(math.inf)), min_size=1, max_size=60),
    count=st.integers(1, 6),
)
def test_bins_by_quantiles(values: list[float], count: int) -> None:
    binned = by_quantiles("x", "x", np.array(values), count, "none")
    assert set(binned.bin_of.tolist()) <= set(range(len(binned.labels))) and len(binned.labels) <= count + 1
    finite = [(value, place) for value, place in zip(values, binned.bin_of.tolist(), strict=True) if value < math.inf]
    assert [place for _, place in sorted(finite)] == sorted(place for _, place in finite)
    for value, place in zip(values, binned.bin_of.tolist(), strict=True):
        assert (binned.labels[place] == "none") == (value == math.inf)


def test_labels_of_bins() -> None:
    assert by_edges("x", "x", np.zeros(1), (0, 1, 10), whole=True).labels == ["0", "1 to 9", "10 and more"]
    assert by_edges("x", "x", np.zeros(1), (0, 0.5), whole=False).labels == ["0 to 0.5", "0.5 and more"]
    kinds = by_kind("x", "x", np.array([2, -1, 0]), ["a", "b", "c"])
    assert kinds.labels == ["a", "c"] and kinds.bin_of.tolist() == [1, -1, 0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), documents=st.integers(1, 4), tokens=st.integers(1, 90))
def test_leakage_is_that_of_plain_loops(seed: int, documents: int, tokens: int) -> None:
    records = random_records(seed, documents, tokens)
    rng = np.random.default_rng(seed)
    overlap = (rng.integers(0, 12, tokens) * rng.integers(0, 4, tokens)).tolist()
    records.columns["overlap"][:] = overlap
    of_text = records.columns["document"].tolist()
    found = leakage(records, units_of(records), DRAWS)
    assert found is not None
    inside = set()
    for last in range(tokens):
        if overlap[last] >= 13:
            inside |= {i for i in range(last + 1) if of_text[i] == of_text[last] and i > last - overlap[last]}
    assert found["share_in_runs"] == pytest.approx(len(inside) / tokens)
    for cell in [*found["below"], *found["cells"]]:
        low, high = 0, math.inf
        if "below" in cell["label"]:
            high = int(cell["label"].split()[1])
        elif cell["label"] != "all":
            numbers = [int(part) for part in cell["label"].split() if part.isdigit()]
            low, high = numbers[0], math.inf if "more" in cell["label"] else numbers[-1] + 1
        members = [i for i in range(tokens) if low <= overlap[i] < high]
        assert cell["tokens"] == len(members)
        for name, column in (("perplexity", "log_prob"), ("lm_perplexity", "lm_log_prob")):
            if not members:
                assert cell[name] is None
                continue
            mean = sum(float(records.columns[column][i]) for i in members) / len(members)
            assert cell[name]["mean"] == pytest.approx(math.exp(-mean))
            assert cell[name]["low"] is None or cell[name]["low"] <= cell[name]["mean"] * 1.0001


def test_leakage_is_warned_of() -> None:
    records = random_records(0, 3, 200)
    records.columns["overlap"][:] = 1
    for last, warned in ((12, False), (13, True)):
        records.columns["overlap"][100] = last
        method = analyse_method("one", records, [], units_of(records), DRAWS)
        method["leakage"] = leakage(records, units_of(records), DRAWS)
        assert method["leakage"]["share_in_runs"] == (13 / 200 if warned else 0)
        assert (leakage_warning(method) is not None) == warned
    assert "exclude_overlap=13, or take those documents out with remove_documents" in str(leakage_warning(method))
    assert leakage_warning(method | {"settings": {"exclude_overlap": 13}}) is None
    assert leakage_warning(method | {"settings": {"exclude_overlap": 32}}) is not None
    records.columns["overlap"][:] = -1
    assert leakage(records, units_of(records), DRAWS) is None


# ------------------------------------------------------------------------------------- with a datastore


@pytest.fixture(scope="module")
def folders(store: Datastore, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Records of kNN-LM and of RetoMaton."""
    place = tmp_path_factory.mktemp("records")
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("texts", number, 1))
        for number, text in enumerate(TEXTS)
    ]
    for name, how in (("kNN-LM", {}), ("RetoMaton", {"retomaton": True, "min_knns": 3})):
        arguments: dict[str, Any] = {"datastore": store.path, "k": 30, "lmbda": 0.4, "knn_temp": 5.0, **how}
        lm = KNNHF(str(model_folder), max_length=MAX_LENGTH, batch_size=3, records=place / name, **arguments)
        lm.loglikelihood_rolling(requests)
    return [place / "kNN-LM", place / "RetoMaton"]


@pytest.fixture(scope="module")
def analysis(folders: list[Path]) -> dict[str, Any]:
    return analyse(folders, draws=DRAWS)


def test_what_the_store_says_of_the_tokens(folders: list[Path], store: Datastore) -> None:
    records = read_records(folders[0])
    binned = {one.name: one for one in bin_tokens(records, store)}
    values, starts = store.values.tolist(), store.document_starts.tolist()
    for i in range(len(records)):
        token, entry = int(records.columns["token"][i]), int(records.columns["entry_0"][i])
        count = values.count(token)
        assert label_of(binned["frequency"], i) == next(
            label
            for label, low, high in (("0", 0, 0), ("1 to 9", 1, 9), ("10 to 99", 10, 99), ("100 to 999", 100, 999))
            if low <= count <= high
        )
        assert label_of(binned["proposed"], i) == ("yes" if values[entry] == token else "no")
        document = max(number for number, start in enumerate(starts) if start <= entry)
        assert label_of(binned["source"], i) == f"document {document}"
    assert "overlap" not in binned


def label_of(binned: Binned, token: int) -> str:
    return binned.labels[binned.bin_of[token]]


def test_counts_leave_removed_documents_out(store: Datastore, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("knn_lm_eval.study.analysis.VALUES_AT_ONCE", 700)
    assert count_values(store, 3).tolist() == np.bincount(store.values).tolist()
    shutil.copytree(store.path, tmp_path / "store")
    remove_documents(tmp_path / "store", [1])
    starts = [*store.document_starts.tolist(), len(store)]
    kept = np.concatenate([store.values[: starts[1]], store.values[starts[2] :]])
    found = count_values(Datastore.open(tmp_path / "store"), 3)
    assert found[: kept.max() + 1].tolist() == np.bincount(kept).tolist() and found[kept.max() + 1 :].sum() == 0


def test_an_analysis_is_plain_json_with_examples_as_they_were(
    analysis: dict[str, Any], folders: list[Path], store: Datastore
) -> None:
    json.dumps(analysis, allow_nan=False)
    records, (method, other) = read_records(folders[0]), analysis["methods"]
    assert (method["name"], other["name"]) == ("kNN-LM", "RetoMaton")
    assert analysis["tokens"] == len(records) and analysis["documents"] == len(TEXTS) and not analysis["notes"]
    gains, theirs = gains_of(records), gains_of(read_records(folders[1]))
    assert method["difference"] is None
    assert other["difference"]["mean"] == pytest.approx(float((theirs - gains).mean()))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(records.about["tokenizer"]["name"])
    shown = 0
    for name, groups in method["examples"].items():
        assert [group["label"] for group in groups] == [cell["label"] for cell in method["by"][name]["cells"]]
        for group in groups:
            for example in group["tokens"]:
                shown += 1
                (at,) = np.flatnonzero(
                    (records.columns["document"] == example["document"])
                    & (records.columns["position"] == example["position"])
                )
                tokens = tokenizer(TEXTS[example["document"]], add_special_tokens=False)["input_ids"]
                assert example["text"] == tokenizer.decode([tokens[example["position"]]])
                before = tokens[max(0, example["position"] - 24) : example["position"]]
                assert example["context"] == tokenizer.decode(before)
                entry = example["neighbours"][0]["entry"]
                assert entry == records.columns["entry_0"][at]
                assert example["neighbours"][0]["value"] == tokenizer.decode([int(store.values[entry])])
    assert shown > 20
    (all_of,) = [group for group in method["examples"]["proposed"] if group["label"] == "yes"]
    best = max(
        range(len(records)),
        key=lambda i: gains[i] if store.values[records.columns["entry_0"][i]] == records.columns["token"][i] else -9,
    )
    assert all_of["tokens"][0]["position"] == records.columns["position"][best]


def test_tables_and_page_show_it(analysis: dict[str, Any]) -> None:
    tables = analysis_tables(analysis)
    assert [row[0] for row in tables[0].rows] == ["kNN-LM", "RetoMaton"]
    assert all(len(row) == len(table.header) == len(set(table.header)) for table in tables for row in table.rows)
    page = analysis_page(analysis, "A title")
    for method in analysis["methods"]:
        for of_property in method["by"].values():
            assert all(html.escape(cell["label"]) in page for cell in of_property["cells"])
    assert page.count("<svg") > 10 and "http" not in page.replace("http://www.w3.org", "")


def test_a_page_cannot_be_broken_by_what_tokens_say(analysis: dict[str, Any]) -> None:
    hostile = "</script><img src=x onerror=alert(1)>\"' {{ 7*7 }} &lt;"
    changed = json.loads(json.dumps(analysis))
    for method in changed["methods"]:
        method["name"] = method["folder"] = hostile
        for groups in method["examples"].values():
            for group in groups:
                for example in group["tokens"]:
                    example |= {"text": hostile, "context": hostile, "task": hostile}
                    example["neighbours"] = [{"entry": 1, "weight": 0.5, "value": hostile, "context": hostile}]
        for of_property in method["by"].values():
            of_property["title"] = hostile
            for cell in of_property["cells"]:
                cell["label"] = hostile
    page = analysis_page(changed, hostile)
    assert "<img" not in page and "</script>" not in page and "49" not in page.split("<style>")[0]


def test_without_store_and_tokenizer_the_rest_is_there(folders: list[Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folders[0], moved)
    (said,) = moved.glob("*.json")
    content = json.loads(said.read_text())
    content.pop("sha256")
    content["datastore"][0]["path"] = str(tmp_path / "gone")
    content["tokenizer"]["name"] = str(tmp_path / "gone")
    said.write_text(json.dumps(content))
    analysis = analyse([moved], draws=DRAWS)
    by = analysis["methods"][0]["by"]
    assert "entropy" in by and not {"frequency", "source", "proposed"} & set(by)
    assert len(analysis["notes"]) == 2 and "give --tokenizer" in " ".join(analysis["notes"])
    assert analysis_page(analysis, "x") and analysis["methods"][0]["name"] == "moved"


def test_what_is_given_must_be_what_was_used(folders: list[Path], store: Datastore, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    content = json.loads(manifest.read_text())
    content.pop("sha256", None)
    content["files"]["keys.npy"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="There is no datastore|no manifest|is not a datastore"):
        analyse(folders, datastore=tmp_path / "nowhere", draws=DRAWS)
    with pytest.raises(UserError, match="The tokenizer nowhere cannot be loaded"):
        analyse(folders, tokenizer="nowhere", draws=DRAWS)


def check_ngrams(records: Records, of_property: dict[str, Any]) -> None:
    """n-grams and neighbours are compared with the LM token by token."""
    expected = dict.fromkeys(["neither", "n-grams alone", "neighbours alone", "both"], 0)
    of = {name: column.tolist() for name, column in records.columns.items()}
    for lm, knn, ngram in zip(of["lm_log_prob"], of["knn_log_prob"], of["ngram_log_prob"], strict=True):
        expected[
            {(0, 0): "neither", (0, 1): "n-grams alone", (1, 0): "neighbours alone"}.get((knn > lm, ngram > lm), "both")
        ] += 1
    cells = {cell["label"]: cell["tokens"] for cell in of_property["cells"]}
    assert cells == {name: tokens for name, tokens in expected.items() if tokens} and len(cells) > 1


def test_the_verb_prints_and_writes(folders: list[Path], tmp_path: Path) -> None:
    process = run_script(
        "analyse", *folders, "--output", tmp_path / "a.json", "--html", tmp_path / "a.html", "--resamples", 20
    )
    assert process.returncode == 0, process.stderr
    assert "Entropy of the LM (nats): kNN-LM" in process.stdout and "RetoMaton" in process.stdout
    assert json.loads((tmp_path / "a.json").read_text())["format"] == "knn_lm_eval analysis"
    assert "<title>What retrieval brought" in (tmp_path / "a.html").read_text()


def test_records_are_called_by_what_sets_them_apart() -> None:
    cells = [Path(f"/results/lm/{method}/wiki/law/records") for method in ("knn", "ngram")]
    assert names_of(cells) == ["knn", "ngram"]
    assert names_of([cells[0]]) == ["law"]
    assert names_of([Path("/a/knn"), Path("/b/more/ngram")]) == ["knn", "ngram"]
    assert names_of([Path("/a/x/knn/1"), Path("/a/y/ngram/1")]) == ["x/knn", "y/ngram"]
    unlike = [Path("/a/knn/1"), Path("/a/1")]
    assert names_of(unlike) == ["/a/knn/1", "/a/1"]
    assert names_of([cells[0], cells[0]]) == [str(cells[0])] * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "There are no token records in nowhere"),
        (["nowhere", "--resamples", 0], "--resamples 0 must be at least 1."),
        (["nowhere", "--confidence", 1.5], "--confidence 1.5 must be between 0 and 1."),
        (["nowhere", "--examples", -1], "--examples -1 must be at least 0."),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments: list[object], sentence: str) -> None:
    process = run_script("analyse", *arguments)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {sentence}") and process.stderr.count("\n") == 1


def test_records_of_several_stores_name_them(
    halves: list[Datastore], whole: Datastore, model_folder: Path, tmp_path: Path
) -> None:
    """As records of one store of both texts do, but for where the neighbours stand; overlaps are over both texts."""
    parts = []
    for half in halves:
        shutil.copytree(half.path, tmp_path / half.path.name)
        parts.append(Datastore.open(tmp_path / half.path.name))
        build_suffix_array(parts[-1])
    shutil.copytree(whole.path, tmp_path / "whole")
    build_suffix_array(Datastore.open(tmp_path / "whole"))
    requests = [Instance("loglikelihood_rolling", {}, (t,), 0, metadata=("t", i, 1)) for i, t in enumerate(TEXTS[:3])]
    found = {}
    for name, datastore in (("one", str(tmp_path / "whole")), ("two", "+".join(str(part.path) for part in parts))):
        how = {"k": 20, "lmbda": 0.4, "index": "exact", "ngram_lmbda": 0.2, "batch_size": 2}
        KNNHF(str(model_folder), datastore=datastore, records=tmp_path / name, **how).loglikelihood_rolling(requests)
        found[name] = read_records(tmp_path / name)
    one, two = found["one"], found["two"]
    for name in ("entry_0", "overlap"):
        np.testing.assert_array_equal(one.columns[name], two.columns[name])
    np.testing.assert_allclose(one.columns["log_prob"], two.columns["log_prob"], atol=1e-5)
    assert [Path(each["path"]).name for each in two.about["datastore"]] == ["law", "wiki"]
    assert [each["entries"] for each in two.about["datastore"]] == [len(part) for part in parts]

    of_one, of_two = (analyse([tmp_path / name], draws=DRAWS)["methods"][0] for name in ("one", "two"))
    assert of_one["by"]["overlap"] == of_two["by"]["overlap"] and of_one["by"]["ngrams"] == of_two["by"]["ngrams"]
    check_ngrams(one, of_one["by"]["ngrams"])
    analysis = analyse([tmp_path / "two"], draws=DRAWS)
    assert of_two["leakage"] == of_one["leakage"] == analysis["methods"][0]["leakage"]
    table = next(table for table in analysis_tables(analysis) if table.title.startswith("Perplexity by overlap"))
    assert [row[0] for row in table.rows[:4]] == ["all", "below 8", "below 13", "below 32"]
    page = analysis_page(analysis, "x")
    assert "What stands in the datastore" in page and "Perplexity by overlap</figcaption>" in page
    warned = analysis | {"notes": ["Warning: half of it is there."]}
    assert 'class="warning"' in analysis_page(warned, "x").split("</style>")[-1]
    for name in ("frequency", "proposed"):
        assert of_one["by"][name] == of_two["by"][name]
    cells = {cell["label"]: cell["tokens"] for cell in of_two["by"]["source"]["cells"]}
    entries, first = two.columns["entry_0"], len(parts[0])
    expected = {"law": int((entries < first).sum()), "wiki": int((entries >= first).sum())}
    assert cells == {name: tokens for name, tokens in expected.items() if tokens}
    examples = [example for group in of_two["examples"]["source"] for example in group["tokens"]]
    values = np.concatenate([part.values for part in parts])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for neighbour in (each for example in examples for each in example["neighbours"]):
        assert neighbour["value"] == tokenizer.decode([int(values[neighbour["entry"]])])
    with pytest.raises(UserError, match="were made with 2 datastores, .* leave --datastore out"):
        analyse([tmp_path / "two"], datastore=parts[0].path, draws=DRAWS)
