"""Charts of the page and pictures beside files: figures where they belong, the same bytes, nothing from outside."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from knn_lm_eval.report.look import LIGHT
from knn_lm_eval.report.plots import (
    Bar,
    Chart,
    Line,
    draw_foss_curve,
    draw_grid,
    draw_indexes,
    heat_map,
    interval_chart,
    line_chart,
)

Element = ElementTree.Element
HOSTILE = "<script>alert(1)</script> \"' {{ 7*7 }} $\\frac{a$ & \x1b[31m\n\x00 ]]> <!-- 日本"
SHOWN = HOSTILE.replace("\x1b", "\\x1b").replace("\n", "⏎").replace("\x00", "\\x00")


def marks(chart: Chart) -> dict[str, Element]:
    """What has a tooltip, by it."""
    found = {}
    for element in ElementTree.fromstring(chart.svg).iter():
        for tooltip in element.findall("title"):
            found[tooltip.text or ""] = element
    return found


def texts(chart: Chart) -> list[Element]:
    return list(ElementTree.fromstring(chart.svg).iter("text"))


def style(element: Element) -> dict[str, str]:
    return dict(part.split(":", 1) for part in element.get("style", "").split(";") if part)


def corners(element: Element) -> tuple[float, ...]:
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", element.get("d", ""))]
    return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])


def test_a_curves_points_lie_where_its_ticks_say() -> None:
    line = Line("a <b>", [(100, 30.0), (1000, 25.0), (10000, 20.0)], ["x", "y", "z"])
    chart = line_chart("title", [line, Line("base", level=28.0)], "x", "y", log_x=True)
    labels = {text.text: text for text in texts(chart)}
    found = marks(chart)
    tips = ["a <b>, x: x 100, y 30.000", "a <b>, y: x 1,000, y 25.000", "a <b>, z: x 10k, y 20.000"]
    assert list(found) == [*tips, "base: 28.000"]
    for tip, x_label, y_label in zip(tips, ("100", "1,000", "10k"), ("30", "25", "20"), strict=True):
        assert float(labels[x_label].get("x", "")) == pytest.approx(float(found[tip].get("x", "")), abs=0.2)
        if y_label in labels:  # a text stands on its line: its middle is higher
            assert float(labels[y_label].get("y", "")) == pytest.approx(float(found[tip].get("y", "")) + 5, abs=1)
    heights = [corners(path)[1] for path in found["base: 28.000"].iter("path")]
    below, above = (float(found[tips[i]].get("y", "")) for i in (1, 0))
    assert heights == pytest.approx([below + (above - below) * 0.6], abs=0.2)


def test_labels_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    charts = [
        line_chart("t", [Line("a", [(x, rng.random() * 10**p) for x in (1, 20, 3e5)])], "x", "y", log_x=log)
        for p in range(-3, 5)
        for log in (True, False)
    ]
    names = [f"a clustering's name {number}" for number in range(14)]
    lines = [Line(name, [(x, rng.random()) for x in (0.1, 0.2)]) for name in names]
    charts.append(line_chart("t", [*lines, Line("level", level=0.3)], "x", "y"))
    charts += [line_chart("t", [Line("a", [(x, 3.0)])], "x", "y", log_x=log) for x in (1, 7e6) for log in (True, False)]
    xs, ys = [0.25 * 1.4**i for i in range(21)], [i / 25 for i in range(25)]
    charts.append(heat_map("t", xs, ys, (rng.random((25, 21)) * 500 + 1000).tolist(), "x", "y", "v"))
    charts.append(interval_chart("t", [Bar("a" * 60, -1234.5, -2345.6, 12.0), Bar("b", 0, 0, 0)], "x"))
    for chart in charts:
        boxes: list[tuple[float, float, float, str]] = []
        width, height = map(float, ElementTree.fromstring(chart.svg).get("viewBox", "").split()[2:])
        for text in texts(chart):
            if "rotate(-90" in text.get("transform", ""):
                continue  # along the axis
            long, x, y = 7.2 * len(text.text or ""), float(text.get("x", "")), float(text.get("y", ""))
            left = {"start": x, "middle": x - long / 2, "end": x - long}[style(text)["text-anchor"]]
            assert left >= -1 and left + long <= width + 1 and y <= height, text.text
            boxes.append((left, left + long, y, text.text or ""))
        for i, (left, right, y, name) in enumerate(boxes):
            for other_left, other_right, other_y, other in boxes[:i]:
                assert right <= other_left or other_right <= left or abs(y - other_y) >= 11, (name, other)


def test_the_best_cell_of_a_heat_map_is_outlined_and_darkest() -> None:
    values = [[30.0, 20.0, 25.0], [28.0, math.nan, math.inf]]
    chart = heat_map("t", [1, 10, 100], [0.1, 0.2], values, "T", "lmbda", "ppl")
    cells = marks(chart)
    assert len(cells) == 4
    best = cells["T 10, lmbda 0.1: ppl 20.000"]
    paths = list(ElementTree.fromstring(chart.svg).iter("path"))
    (outline,) = [path for path in paths if style(path).get("stroke") == "#fefefe"]
    assert corners(outline)[0] == pytest.approx(corners(best)[0], abs=0.1)
    assert corners(outline)[3] == pytest.approx(corners(best)[3], abs=0.1)
    brightness = {tip: sum(bytes.fromhex(style(cell)["fill"][1:])) for tip, cell in cells.items()}
    assert min(brightness, key=brightness.__getitem__) == "T 10, lmbda 0.1: ppl 20.000"


def test_equal_values_and_a_single_one_make_a_heat_map() -> None:
    assert len(marks(heat_map("t", [1, 2], [1, 2], [[5.0, 5.0], [5.0, 5.0]], "x", "y", "v"))) == 4
    assert list(marks(heat_map("t", [1], [2], [[5.0]], "x", "y", "v"))) == ["x 1, y 2: v 5.000"]


def test_an_interval_that_leaves_zero_out_is_coloured() -> None:
    chart = interval_chart("t", [Bar("sure", -3.0, -4.0, -2.0), Bar("unsure", 0.5, -1.0, 2.0)], "difference")
    groups = [g for g in ElementTree.fromstring(chart.svg).iter("g") if g.find("title") is not None]
    colours = {(group[0].text, style(path).get("stroke")) for group in groups for path in group.iter("path")}
    assert ("sure: -3.000 [-4.000, -2.000]", "var(--series-0)") in colours
    assert ("unsure: +0.500 [-1.000, +2.000]", "var(--series-5)") in colours
    assert "0" in {text.text for text in texts(chart)}


def all_charts(name: str = "name") -> list[Chart]:
    return [
        line_chart(name, [Line(name, [(1, 2.0), (3, 4.0)], [name] * 2), Line(name, level=3.0)], name, name),
        line_chart(name, [Line(name, [(1, 2.0), (3000, 4.0)])], name, name, log_x=True),
        interval_chart(name, [Bar(name, 1.0, 0.5, 2.0)], name),
        heat_map(name, [1, 2], [1, 2], [[3.0, 4.0], [5.0, 6.0]], "x", "y", "v"),
    ]


def test_a_chart_is_inert_and_takes_fonts_and_colours_from_the_page() -> None:
    for chart in all_charts():
        svg = ElementTree.fromstring(chart.svg)
        tags = {element.tag for element in svg.iter()}
        assert tags <= {"svg", "g", "path", "text", "title", "defs", "use"}
        ids = {element.get("id") for element in svg.iter() if element.get("id")}
        references = {element.get("href") for element in svg.iter() if element.get("href")}
        assert references == {f"#{name}" for name in ids}
        assert not re.search(r"url\(|https?:|font-family|clip-path|xmlns", chart.svg)
        assert not any(colour in chart.svg for colour in LIGHT.values())
        assert "var(--axis)" in chart.svg


def test_hostile_names_are_text() -> None:
    for chart in all_charts(HOSTILE):
        svg = ElementTree.fromstring(chart.svg)  # well-formed
        assert "<script" not in chart.svg and "<!--" not in chart.svg
        assert svg.get("aria-label") == SHOWN
    shown = {text.text for text in texts(all_charts(HOSTILE)[0])}
    assert {SHOWN, f"{SHOWN} (3.00)"} <= shown
    assert f"{SHOWN}: 3.000" in marks(all_charts(HOSTILE)[0])


def test_points_that_no_chart_can_show_are_refused() -> None:
    with pytest.raises(ValueError):
        line_chart("t", [Line("a", [(1, 2.0), (2, math.inf)])], "x", "y")
    with pytest.raises(ValueError):
        line_chart("t", [Line("base", level=2.0)], "x", "y", log_x=True)


# ------------------------------------------------------------------------------------------------ pictures in files


def measurement(index: str, microseconds: float, perplexity: float, efficient: bool = False) -> dict[str, Any]:
    figures = {"bytes_per_entry": 72.4, "k": 64, "microseconds": microseconds, "tuned perplexity": perplexity}
    return {"index": index, "factory": "IVF16,PQ8", "efficient": efficient, **figures}


def foss(path: Path) -> None:
    base = {"method": "base", "clusters": "", "min_knns": "", "token_perplexity": 30.0, "saved_searches": ""}
    knn = base | {"method": "knn-lm", "token_perplexity": 20.0, "saved_searches": 0.0}
    walks = [
        {"method": "retomaton", "clusters": clusters, "min_knns": m, "token_perplexity": p, "saved_searches": saved}
        for clusters in ("", "kmeans $")
        for m, p, saved in ((1.0, 24.0, 0.6), (math.inf, 21.0, 0.2))
    ]
    draw_foss_curve(path, "law", [base, knn, *walks])


def grid(path: Path) -> None:
    perplexities = 20 + np.arange(24.0).reshape(2, 3, 4)
    perplexities[1, 2, 3] = 10
    axes = {"knn_temp": (1.0, 10.0), "k": (8, 64, 1024), "lmbda": (0.1, 0.2, 0.3, 0.4)}
    draw_grid(path, "wikitext103_valid", perplexities, axes, (1, 2, 3))


def indexes(path: Path) -> None:
    measured = [measurement("a", 100.0, 21.0, True), measurement("b", 200.0, 22.0), measurement("a", 900.0, 20.5, True)]
    draw_indexes(path, measured, [measurement("exact", 9000.0, 20.0)], 1_000_000)


PICTURES = [
    (foss, ["law", "base LM (30.00)", "RetoMaton, no clusters", "RetoMaton, clusters kmeans $", "1", "inf"]),
    (grid, ["wikitext103_valid, k = 1024", "wikitext103_valid, lmbda = 0.4", "0.1", "1,024", "10"]),
    (indexes, ["1,000,000 entries", "a: IVF16,PQ8, 72 bytes", "the best", "exact, k = 64"]),
]


@pytest.mark.parametrize(("draw", "words"), PICTURES)
def test_the_same_data_give_the_same_files(draw: Callable[[Path], None], words: list[str], tmp_path: Path) -> None:
    draw(tmp_path / "first.json")
    settings = {"lines.linewidth": 20, "text.usetex": True, "svg.hashsalt": "x", "font.size": 30}
    with matplotlib.rc_context(settings):  # a user's own
        draw(tmp_path / "again.json")
        assert {name: matplotlib.rcParams[name] for name in settings} == settings
    assert {file.name for file in tmp_path.iterdir()} == {"first.png", "first.svg", "again.png", "again.svg"}
    for suffix in (".png", ".svg"):
        first = (tmp_path / "first").with_suffix(suffix).read_bytes()
        assert first == (tmp_path / "again").with_suffix(suffix).read_bytes()
    svg = (tmp_path / "first.svg").read_text()
    assert set(words) <= set(re.findall(r"<!-- (.*?) -->", svg))  # a text, drawn as paths, and what it says
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")


def test_ticks_that_lie_close_are_told_apart(tmp_path: Path) -> None:
    measured = [measurement("a", 100.0, 19.71, True), measurement("b", 200.0, 19.45, True)]
    draw_indexes(tmp_path / "close", measured, [measurement("exact", 9000.0, 19.47)], 1_000_000)
    texts = re.findall(r"<!-- (19\.\d+) -->", (tmp_path / "close.svg").read_text())
    assert len(texts) == len(set(texts)) >= 4


def test_both_maps_outline_the_best_cell(tmp_path: Path) -> None:
    grid(tmp_path / "grid")
    paths = ElementTree.parse(tmp_path / "grid.svg").getroot().iter("{http://www.w3.org/2000/svg}path")
    outlines = [corners(path) for path in paths if "stroke: #fefefe" in path.get("style", "")]
    (left, top, right, bottom), other = outlines
    assert (top, bottom) == pytest.approx((other[1], other[3])) and right < other[0]  # side by side


def test_drawing_leaves_no_trace_of_pyplot(tmp_path: Path) -> None:
    source = (
        "import sys; from pathlib import Path; from knn_lm_eval.report.plots import Line, line_chart\n"
        "assert 'matplotlib' not in sys.modules\n"
        "line_chart('t', [Line('a', [(1, 2.0), (2, 3.0)])], 'x', 'y')\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)
