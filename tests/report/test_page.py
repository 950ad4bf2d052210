"""The report's page and that of a text: self-contained, with all that lies in the folder, safe from what it says."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from helpers.programs import run_script
from helpers.results import documents, knn_config, write_results

from knn_lm_eval.report.comparison import compare
from knn_lm_eval.report.page import report_page
from knn_lm_eval.report.rendering import render
from knn_lm_eval.report.results import read_folder
from knn_lm_eval.report.token_page import token_page
from knn_lm_eval.report.tokens import InspectedToken, Neighbour
from knn_lm_eval.store.datastore import Datastore

HOSTILE = (
    "</script></style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"' {{ 7*7 }} {% x %} {# y #} &lt;"
)


class Checker(html.parser.HTMLParser):
    """Notes elements that are left open, and all that would be loaded from elsewhere."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open and not checker.addresses
    return checker


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory, store: Datastore) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "text.json"
    model_args = f"datastore={store.path},k=20,lmbda=0.5"
    process = run_script(
        "inspect_neighbours", "--model_args", model_args, "--text", "An <b> & </script> such", "--json", file
    )
    assert process.returncode == 0, process.stderr
    return file


@pytest.fixture
def folder(tmp_path: Path, token_file: Path) -> Path:
    """Everything that a report can show."""
    folder = tmp_path / "results"
    ours, baseline = documents(200, 0.2)
    write_results(folder / "hf" / "m", baseline)
    write_results(folder / "knn" / "m", ours, config=knn_config())
    points = [
        {"method": "base", "clusters": "", "min_knns": "", "token_perplexity": 30.0, "saved_searches": ""},
        {"method": "knn-lm", "clusters": "", "min_knns": "", "token_perplexity": 20.0, "saved_searches": 0.0},
        {"method": "retomaton", "clusters": "", "min_knns": 1.0, "token_perplexity": 24.0, "saved_searches": 0.6},
        {"method": "retomaton", "clusters": "", "min_knns": 64.0, "token_perplexity": 21.0, "saved_searches": 0.2},
    ]
    (folder / "foss.json").write_text(json.dumps({"task": "law", "settings": {}, "points": points}))
    sizes = [
        {"fraction": f, "entries": round(5000 * f), "token_perplexity": 30 - 5 * f, "mean_neighbours": 5}
        for f in (0, 0.1, 1)
    ]
    (folder / "sizes.json").write_text(json.dumps({"task": "law", "settings": {"k": 8}, "store_sizes": sizes}))
    grid = [(k, t, lmbda, 20 + abs(lmbda - 0.4) * 10 + 8 / k) for k in (8, 64) for t in (1, 3) for lmbda in (0.2, 0.4)]
    (folder / "tuned.csv").write_text(
        "k,knn_temp,lmbda,token_perplexity\n" + "".join(",".join(map(str, row)) + "\n" for row in grid)
    )
    (folder / "other.csv").write_text("a,b\n1,2\n")
    shutil.copy(token_file, folder / "text.json")
    return folder


def test_the_page_has_all_that_lies_in_the_folder_and_needs_no_network(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "out" / "report.html"
    process = run_script("compare", folder, "--baseline", "hf", "--resamples", 500, "--report", page)
    assert process.returncode == 0, process.stderr
    text = page.read_text()
    checked(text)
    assert not re.search(r"url\(|@import|fetch\(|https?:", text)
    for name in ("law", "Saved searches", "Datastore size", "Temperature and lmbda", "Tokens and neighbours"):
        assert f"<h2>{name}</h2>" in text
    assert "RetoMaton, no clusters, min_knns 1.0: saved searches 0.6, perplexity per token 24.000" in text
    assert "k=8: entries 500, perplexity per token 29.500" not in text  # with its neighbours
    assert "k=8, 5 neighbours: entries 500, perplexity per token 29.500" in text
    assert "tuned, k=64, best 20.12" in text and "knn_temp 3, lmbda 0.4: perplexity 20.125" in text
    assert "prefers-color-scheme: dark" in text
    comparison = process.stdout.split()
    assert all(cell in text for cell in comparison if re.fullmatch(r"−\d+\.\d+", cell))
    # The same command writes the same page.
    run_script("compare", folder, "--baseline", "hf", "--resamples", 500, "--report", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_damaged_grids_and_other_programs_files_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "cut.csv").write_text("k,knn_temp,lmbda,token_perplexity\n8,1,0.2,20\n8,1,0.")
    (folder / "theirs.json").write_text('{"tokens": [{"p_lm": 0.5}], "points": [{"saved_searches": 0.5}]}')
    process = run_script("compare", folder, "--resamples", 100, "--report", tmp_path / "report.html")
    assert process.returncode == 0 and "cut.csv is damaged or half-written: left out." in process.stderr
    assert process.stderr.count("theirs.json is not what it looks like") == 2
    assert "tuned, k=64" in (tmp_path / "report.html").read_text()


def hostile_folder(folder: Path) -> Path:
    """Results, curves, sizes, a grid and tokens whose every text is hostile."""
    ours, baseline = documents(20, 0.2)
    config = knn_config(datastore={"path": f"stores/{HOSTILE}", "entries": 10, "model": HOSTILE})
    for name, pairs, changes in (("a", baseline, {"config": {"model": HOSTILE}}), ("b", ours, {"config": config})):
        content = write_results(folder / name, pairs, **changes)
        content["results"] = {HOSTILE: content["results"].pop("law")}
        content["versions"] = {HOSTILE: f"{HOSTILE} {name}"}
        (folder / name / "results_1.json").write_text(json.dumps(content))
    point = {
        "method": "retomaton",
        "clusters": HOSTILE,
        "min_knns": HOSTILE,
        "token_perplexity": 2,
        "saved_searches": 0,
    }
    points = [point, point | {"method": HOSTILE}]
    (folder / "foss.json").write_text(json.dumps({"task": HOSTILE, "points": points}))
    sizes = [{"entries": entries, "token_perplexity": 5, "mean_neighbours": 2} for entries in (0, 10, 100)]
    sizes_file = {"task": HOSTILE, "settings": {"k": HOSTILE}, "store_sizes": sizes}
    (folder / "sizes.json").write_text(json.dumps(sizes_file))
    rows = [f'"{HOSTILE.replace(chr(34), chr(34) * 2)}",{t},{lmbda},20' for t in (1, 2) for lmbda in (0.1, 0.2)]
    (folder / "<b>tuned {{ 7*7 }}.csv").write_text("\n".join(["k,knn_temp,lmbda,perplexity", *rows]))
    neighbour = {"entry": HOSTILE, "distance": 1.0, "weight": 1.0, "value": HOSTILE, "context": HOSTILE}
    token = {"text": HOSTILE, "p_lm": 0.1, "p_knn": 0.2, "p": 0.1, "searched": True, "neighbours": [neighbour]}
    (folder / "text.json").write_text(json.dumps({"settings": HOSTILE, "tokens": [token]}))
    return folder


def test_hostile_texts_from_any_file_are_inert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = hostile_folder(tmp_path / "results")
    results, others = read_folder([folder])
    comparison = compare(results, HOSTILE, resamples=100)
    page = report_page(comparison, others, sorted(folder.rglob("*.csv")), HOSTILE)
    assert not caplog.text  # nothing was left out
    checker = checked(page)
    # The page's own script and the token view's; nothing of the data has become an element or an attribute.
    assert checker.tags.count("script") == 2 and "img" not in checker.tags and checker.tags.count("style") == 1
    assert not any(name.startswith("on") for name in checker.attributes)
    for shown in (
        f"{HOSTILE} (baseline)",
        f"task versions {HOSTILE} b and {HOSTILE} a",
        f"clusters {HOSTILE}",
        f"k={HOSTILE}",
        "<b>tuned {{ 7*7 }}, k=",
    ):
        assert shown in checker.text
    assert checker.text.count(HOSTILE) >= 15 and "49" not in checker.text


def test_hostile_tokens_in_a_page_of_their_own_are_inert() -> None:
    neighbour = Neighbour(entry=1, distance=2.0, weight=0.5, value=HOSTILE, context=HOSTILE)
    token = InspectedToken(HOSTILE + "\n", p_lm=0.2, p_knn=0.3, p=0.25, searched=False, neighbours=[neighbour])
    page = token_page([token], HOSTILE, HOSTILE)
    checker = checked(page)
    assert checker.tags.count("script") == 2 and checker.tags.count("style") == 1 and "img" not in checker.tags
    # Title, heading and subtitle, the text, and in its details, open and closed, the token, a context and a value.
    assert checker.text.count(HOSTILE) == 3 + 1 + 2 * 3
    assert not any(name.startswith("on") for name in checker.attributes)


def test_spaces_and_line_ends_of_a_text_are_kept() -> None:
    texts = ["a", " b", "\n\n", "  c"]
    tokens = [InspectedToken(text, 0.5, 0.5, 0.5, True, []) for text in texts]
    page = token_page(tokens, "t", "s")
    (shown,) = re.findall(r'<div class="tokens">(.*?)</div>', page, re.DOTALL)
    assert re.sub(r"<button[^>]*>|</button>", "|", shown) == "|a|| b||⏎⏎|<br><br>|  c|"


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="subtitle"):
        render("token_page.html.j2", title="t")


@pytest.mark.parametrize(
    "content",
    [
        {"points": [{"method": "retomaton", "clusters": 3, "min_knns": 1, "token_perplexity": 2, "saved_searches": 0}]},
        {"points": [{"method": "base", "token_perplexity": "many", "saved_searches": 0}]},
        {"store_sizes": [{"entries": "3", "token_perplexity": 2.0, "mean_neighbours": 1}]},
        {"store_sizes": [{"entries": 3, "token_perplexity": float("inf"), "mean_neighbours": 1}]},
        {"store_sizes": [{"entries": 0, "token_perplexity": 3.0}]},
        {"tokens": [{"text": 3, "p_lm": 0.5, "p_knn": 0.5, "p": 0.5, "searched": True, "neighbours": []}]},
        {"tokens": [{"text": "x", "p_lm": "y", "p_knn": 0.5, "p": 0.5, "searched": True, "neighbours": []}]},
    ],
)
def test_what_only_resembles_a_file_is_left_out(
    content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_results(tmp_path, documents(20, 0.2)[0])
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    results, others = read_folder([tmp_path])
    page = report_page(compare(results), others, [], "t")
    assert "theirs.json is not what it looks like" in caplog.text
    assert page.count("<section") == 1


def test_a_grid_without_a_perplexity_above_zero_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_results(tmp_path, documents(20, 0.2)[0])
    (tmp_path / "grid.csv").write_text("k,knn_temp,lmbda,perplexity\n8,1,0.1,0\n8,1,0.2,3\n8,2,0.1,3\n8,2,0.2,3\n")
    page = report_page(compare(read_folder([tmp_path])[0]), [], [tmp_path / "grid.csv"], "t")
    assert "grid.csv is damaged" in caplog.text and page.count("<section") == 1


# ------------------------------------------------------------------------------------------ what it takes to start

HEAVY = {"torch", "faiss", "transformers", "lm_eval", "datasets", "numba", "ray", "scipy"}


def modules_of_compare(*arguments: object) -> set[str]:
    """The modules that an interpreter has loaded after ``knn-lm-eval compare``."""
    source = (
        "import sys; from knn_lm_eval.cli.main import main\n"
        f"assert main({['compare', *map(str, arguments)]!r}) == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_comparing_loads_no_model_no_search_and_no_plotting(tmp_path: Path) -> None:
    ours, baseline = documents(20, 0.2)
    write_results(tmp_path / "hf", baseline)
    write_results(tmp_path / "knn", ours, config=knn_config())
    loaded = modules_of_compare(tmp_path, "--baseline", "hf", "--resamples", 100)
    assert "knn_lm_eval.report.comparison" in loaded
    assert not loaded & (HEAVY | {"matplotlib", "jinja2"})
    loaded = modules_of_compare(tmp_path, "--baseline", "hf", "--resamples", 100, "--report", tmp_path / "page.html")
    assert {"knn_lm_eval.report.page", "matplotlib", "jinja2"} <= loaded
    assert not loaded & (HEAVY | {"matplotlib.pyplot"})
