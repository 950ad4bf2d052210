"""The report page: self-contained, with what lies in the folder; charts; perplexity against the store's size."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import lm_eval
import numpy as np
import pytest
from helpers.oracle import knn_lm_distributions
from helpers.places import SCRIPTS, TASKS
from helpers.results import documents, knn_config, write_results
from helpers.tiny_model import EVAL_TEXT
from lm_eval.tasks import TaskManager

from knn_lm_eval import KNNHF
from knn_lm_eval.errors import UserError
from knn_lm_eval.make.pruning import positions_of_entries
from knn_lm_eval.report.plots import Bar, Line, heat_map, interval_chart, line_chart
from knn_lm_eval.store.datastore import Datastore
from knn_lm_eval.study.store_sizes import StoreSizeScorer


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / f"{script}.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def svg_of(figure: str) -> ElementTree.Element:
    (svg,) = re.findall(r"<svg viewBox=\"0 0 560.*?</svg>", figure, re.DOTALL)
    return ElementTree.fromstring(svg)


# ---------------------------------------------------------------------------------------------------- charts


def test_a_curves_points_lie_where_its_ticks_say() -> None:
    line = Line("a <b>", [(100, 30.0), (1000, 25.0), (10000, 20.0)])
    svg = svg_of(line_chart("title", [line, Line("base", (), level=28.0)], "x", "y", log_x=True))
    (polyline,) = svg.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in polyline.get("points").split()]
    texts = {text.text: text for text in svg.iter("text")}
    for (x, y), x_label, y_label in zip(points, ("100", "1,000", "10k"), ("30", "25", "20"), strict=True):
        assert float(texts[x_label].get("x")) == pytest.approx(x, abs=0.2)
        if y_label in texts:
            assert float(texts[y_label].get("y")) == pytest.approx(y + 4, abs=0.2)
    tips = [title.text for title in svg.iter("title")]
    assert tips[0] == "a <b>: x 100, y 30.000" and "base: 28.000" in tips


def test_labels_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    charts = [
        line_chart("t", [Line("a", [(x, rng.random() * 10**p) for x in (1, 20, 3e5)])], "x", "y", log_x=log)
        for p in range(-3, 5)
        for log in (True, False)
    ]
    xs, ys = [0.25 * 1.4**i for i in range(21)], [i / 25 for i in range(25)]
    charts.append(heat_map("t", xs, ys, rng.random((25, 21)) * 500 + 1000, "x", "y", "v"))
    charts.append(interval_chart("t", [Bar("a" * 60, -1234.5, -2345.6, 12.0), Bar("b", 0, 0, 0)], "x"))
    for chart in charts:
        boxes = []
        for text in svg_of(chart).iter("text"):
            if text.get("x") is None:
                continue  # along the axis
            width, x = 7.2 * len(text.text), float(text.get("x"))
            left = {"start": x, "middle": x - width / 2, "end": x - width}[text.get("text-anchor")]
            boxes.append((left, left + width, float(text.get("y")), text.text))
            assert left >= 0 and left + width <= 560, text.text
        for i, (left, right, y, text) in enumerate(boxes):
            for other_left, other_right, other_y, other in boxes[:i]:
                assert right <= other_left or other_right <= left or abs(y - other_y) >= 11, (text, other)


def test_the_best_cell_of_a_heat_map_is_outlined_and_darkest() -> None:
    values = [[30.0, 20.0, 25.0], [28.0, math.nan, math.inf]]
    svg = svg_of(heat_map("t", [1, 10, 100], [0.1, 0.2], values, "T", "lmbda", "ppl"))
    cells = {rect.find("title").text: rect for rect in svg.iter("rect") if rect.find("title") is not None}
    assert len(cells) == 4
    best = cells["T 10, lmbda 0.1: ppl 20.000"]
    (outline,) = [rect for rect in svg.iter("rect") if rect.get("fill") == "none"]
    assert (outline.get("x"), outline.get("y")) == (best.get("x"), best.get("y"))
    brightness = {tip: sum(map(int, re.findall(r"\d+", rect.get("fill")))) for tip, rect in cells.items()}
    assert min(brightness, key=brightness.__getitem__) == "T 10, lmbda 0.1: ppl 20.000"


# ------------------------------------------------------------------------------------------------- the page


class Checker(html.parser.HTMLParser):
    """Notes elements that are left open, and all that would be loaded from elsewhere."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory, store: Datastore) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "text.json"
    model_args = f"datastore={store.path},k=20,lmbda=0.5"
    process = run("inspect_neighbours", "--model_args", model_args, "--text", "An <b> & </script> such", "--json", file)
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
    process = run("compare", folder, "--baseline", "hf", "--resamples", 500, "--report", page)
    assert process.returncode == 0, process.stderr
    text = page.read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open and not checker.addresses
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
    run("compare", folder, "--baseline", "hf", "--resamples", 500, "--report", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_click_on_a_token_shows_its_neighbours(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run("compare", folder, "--baseline", "hf", "--resamples", 500, "--report", page)
    tokens = json.loads((folder / "text.json").read_text())["tokens"]
    click = "<script>document.querySelectorAll('.tokens button')[3].click()</script></body>"
    page.write_text(page.read_text().replace("</body>", click))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *options, "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    panel = dom[dom.index('<div class="neighbours">') :]
    entries = [str(neighbour["entry"]) for neighbour in tokens[3]["neighbours"]]
    assert re.findall(r"<td>(\d+)</td>", panel[: panel.index("</table>")]) == entries


def test_damaged_grids_and_other_programs_files_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "cut.csv").write_text("k,knn_temp,lmbda,token_perplexity\n8,1,0.2,20\n8,1,0.")
    (folder / "theirs.json").write_text('{"tokens": [{"p_lm": 0.5}], "points": [{"saved_searches": 0.5}]}')
    process = run("compare", folder, "--resamples", 100, "--report", tmp_path / "report.html")
    assert process.returncode == 0 and "cut.csv is damaged or half-written: left out." in process.stderr
    assert process.stderr.count("theirs.json is not what it looks like") == 2
    assert "tuned, k=64" in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------------------------------- the store's size


def law(tmp_path: Path) -> TaskManager:
    (tmp_path / "test.en").write_text(EVAL_TEXT[:90] + "\n" + EVAL_TEXT[90:170] + "\n")
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data_dir": str(tmp_path)})


def test_a_part_of_the_store_is_a_store_of_its_entries(store, model_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    lm = KNNHF(str(model_folder), datastore=store.path, k=20, lmbda=0.4, knn_temp=3.0, batch_size=2)
    # All are found, so that parts lack none.
    scorer = StoreSizeScorer(lm, 20, [0.1, 1.0], seed=3, searched=len(store))
    lm.scorer = scorer
    lm_eval.simple_evaluate(model=lm, tasks=["law"], task_manager=law(tmp_path), bootstrap_iters=0, log_samples=False)
    positions = positions_of_entries(np.arange(len(store)), 3)
    for point, share in zip(scorer.points, (0.0, 0.1, 1.0), strict=True):
        inside = positions < share if share else np.ones(len(store), dtype=bool)
        total, count = 0.0, 0
        for text in (tmp_path / "test.en").read_text().splitlines():
            tokens = lm.tok_encode(text)
            distributions = knn_lm_distributions(
                lm.model,
                lm.model.model.layers[-1].mlp,
                [lm.prefix_token_id, *tokens[:-1]],
                store.keys[inside],
                store.values[inside],
                k=20,
                lmbda=0.4 if share else 0.0,
                temperature=3.0,
            )
            total += sum(math.log(distributions[i][token]) for i, token in enumerate(tokens))
            count += len(tokens)
        assert point.tokens == count
        assert point.perplexity == pytest.approx(math.exp(-total / count), rel=1e-4), share
        assert point.neighbours == (20 * count if share else 0)


def test_parts_are_random_nested_and_of_their_size() -> None:
    positions = positions_of_entries(np.arange(200_000), 0)
    assert ((positions >= 0) & (positions < 1)).all()
    for fraction in (0.01, 0.3):
        assert (positions < fraction).mean() == pytest.approx(fraction, rel=0.05)
    neighbours = (positions[1:] < 0.3) & (positions[:-1] < 0.3)
    assert neighbours.mean() == pytest.approx(0.09, rel=0.05)  # entries side by side are chosen independently
    assert not np.array_equal(positions, positions_of_entries(np.arange(200_000), 1))


def test_the_script_for_sizes_writes_what_the_report_draws(store, tmp_path) -> None:
    law(tmp_path)
    process = run(
        "store_sizes",
        *("--model_args", f"datastore={store.path},k=20,knn_temp=5", "--tasks", "law"),
        *("--metadata", f"data_dir={tmp_path}", "--fractions", "0.05,1", "--output", tmp_path / "sizes"),
    )
    assert process.returncode == 0, process.stderr
    content = json.loads((tmp_path / "sizes" / "law.json").read_text())
    assert [row["fraction"] for row in content["store_sizes"]] == [0.0, 0.05, 1.0]
    assert content["store_sizes"][1]["mean_neighbours"] == pytest.approx(4, abs=1.5)  # of 80 that were found
    assert content["settings"]["searched"] == 80 and content["settings"]["seed"] == 0


def test_sizes_out_of_range_are_named(store, model_folder) -> None:
    lm = KNNHF(str(model_folder), datastore=store.path, k=20)
    with pytest.raises(UserError, match="The fraction 1.5 of the datastore must be above 0 and at most 1."):
        StoreSizeScorer(lm, 20, [0.5, 1.5])
    walking = KNNHF(str(model_folder), datastore=store.path, k=20, retomaton=True)
    with pytest.raises(UserError, match="leave retomaton out"):
        StoreSizeScorer(walking, 20, [0.5])
