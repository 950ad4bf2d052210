"""One page with everything about some results: tables, charts, and texts with their neighbours. It needs no network."""

from __future__ import annotations

import csv
import html
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from knn_lm_eval.report import plots as charts
from knn_lm_eval.report.comparison import Comparison
from knn_lm_eval.report.comparison_tables import as_html, detail_table, overview_table
from knn_lm_eval.report.plots import Bar, Line, heat_map, interval_chart, line_chart
from knn_lm_eval.report.token_page import SCRIPT, token_view
from knn_lm_eval.report.token_page import STYLE as TOKEN_STYLE
from knn_lm_eval.report.tokens import InspectedToken, Neighbour

logger = logging.getLogger(__name__)

STYLE = """
:root { color-scheme: light dark; --text: #1b2027; --muted: #59626e; --line: #d5dae1; --page: #f6f7f9;
  --warning: #8a4b00; --warning-back: #fff3dc; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --muted: #a3adba; --line: #303843; --page: #0b0e12;
  --warning: #ffc977; --warning-back: #2e230f; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
nav { margin: 0 0 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
nav a { color: inherit; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 8px; padding: 1.1rem 1.3rem;
  margin: 0 0 1.2rem; }
.muted, .notes { color: var(--muted); }
.notes p { margin: .35rem 0 0; font-size: .87rem; max-width: 62rem; }
.notes p.warning { color: var(--warning); background: var(--warning-back); padding: .3rem .6rem; border-radius: 4px; }
.table { overflow-x: auto; }
.table table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.table th, .table td { padding: .32rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-weight: 400; }
.table thead th { font-weight: 600; border-bottom: 2px solid var(--line); }
.table th:first-child { text-align: left; padding-left: 0; }
.table tbody th { font-weight: 500; white-space: normal; min-width: 11rem; }
.table tr.reference th, .table tr.reference td { color: var(--muted); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1.6rem 2rem;
  margin-top: 1rem; }
.charts > figure { max-width: 40rem; }
.neighbours { margin-top: .8rem; }
"""

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
<script>$script</script></head><body><main>
<h1>$title</h1>
<p class="muted">$subtitle</p>
<nav>$contents</nav>
$sections
</main></body></html>
""")


def report_page(comparison: Comparison, others: Sequence[dict[str, Any]], grids: Iterable[Path], title: str) -> str:
    """The page.

    Parameters
    ----------
    comparison : for the tables.
    others : JSON objects found beside the results; those of ``foss_curve``, ``store_sizes`` and
        ``inspect_neighbours --json`` are drawn.
    grids : CSV files; those of ``tune`` become heat maps.
    """
    sections: dict[str, str] = {}
    if len(comparison.tasks) > 1:
        sections["All tasks"] = as_html(overview_table(comparison))
    for task in comparison.tasks:
        bars = [
            Bar(row.label, row.interval.difference, row.interval.low, row.interval.high)
            for row in task.rows
            if row.interval is not None
        ]
        content = as_html(detail_table(comparison, task))
        if bars:
            name = f"{task.metric}: difference to {comparison.baseline}"
            label = f"difference, {comparison.confidence:.0%} interval"
            content += _charts([interval_chart(name, bars, label)])
        sections[task.task] = content
    curves = _drawn(_foss_chart, [one for one in others if _is_list_of(one.get("points"), "saved_searches")])
    if curves:
        sections["Saved searches"] = (
            '<p class="muted">RetoMaton between few searches and one for each token: a point is a setting of '
            "min_knns.</p>" + _charts(curves)
        )
    sizes = _drawn(_size_chart, [one for one in others if _is_list_of(one.get("store_sizes"), "entries")])
    if sizes:
        sections["Datastore size"] = (
            '<p class="muted">Parts of the datastore, chosen at random when searching. A small part has fewer than k '
            "neighbours of each token: those among the nearest of the whole store.</p>" + _charts(sizes)
        )
    maps = [chart for file in grids for chart in _heat_maps(file)]
    if maps:
        sections["Temperature and lmbda"] = (
            '<p class="muted">Perplexity on the text that was tuned on; darker is better, the best is outlined.</p>'
            + _charts(maps)
        )
    texts = _drawn(_token_view, [one for one in others if _is_list_of(one.get("tokens"), "p_lm")])
    if texts:
        sections["Tokens and neighbours"] = "".join(texts)
    baseline = f"Baseline: {comparison.baseline}. " if comparison.baseline else ""
    counted = "1 task" if len(comparison.tasks) == 1 else f"{len(comparison.tasks)} tasks"
    return PAGE.substitute(
        title=html.escape(title),
        style=STYLE + charts.STYLE + TOKEN_STYLE,
        script=SCRIPT,
        subtitle=html.escape(f"{baseline}{counted}, bootstrap seed {comparison.seed}."),
        contents="".join(f'<a href="#s{i}">{html.escape(name)}</a>' for i, name in enumerate(sections)),
        sections="\n".join(
            f'<section id="s{i}"><h2>{html.escape(name)}</h2>\n{content}</section>'
            for i, (name, content) in enumerate(sections.items())
        ),
    )


def _charts(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _drawn(draw: Callable[[dict[str, Any]], str], contents: Sequence[dict[str, Any]]) -> list[str]:
    """Each drawn; what only resembles such a file is left out with a warning."""
    drawn = []
    for content in contents:
        try:
            drawn.append(draw(content))
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("%s is not what it looks like (%r): left out.", content["file"], error)
    return drawn


def _is_list_of(value: Any, key: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and key in one for one in value)


def _foss_chart(content: dict[str, Any]) -> str:
    lines: dict[str, list[dict[str, Any]]] = {}
    levels = []
    for point in content["points"]:
        if point["method"] == "retomaton":
            name = f"RetoMaton, {'clusters ' + point['clusters'] if point['clusters'] else 'no clusters'}"
            lines.setdefault(name, []).append(point)
        else:
            name = {"base": "base LM", "knn-lm": "kNN-LM"}.get(point["method"], point["method"])
            levels.append(Line(name, (), level=point["token_perplexity"]))
    curves = []
    for name, points in lines.items():
        points.sort(key=lambda point: point["saved_searches"])
        pairs = [(point["saved_searches"], point["token_perplexity"]) for point in points]
        curves.append(Line(name, pairs, [f"min_knns {point['min_knns']}" for point in points]))
    return line_chart(str(content.get("task", "")), [*curves, *levels], "saved searches", "perplexity per token")


def _size_chart(content: dict[str, Any]) -> str:
    points = [point for point in content["store_sizes"] if point["entries"] > 0]
    settings = content.get("settings", {})
    name = ", ".join(f"{key}={settings[key]}" for key in ("k", "lmbda", "knn_temp") if key in settings)
    labels = [f"{point['mean_neighbours']:g} neighbours" for point in points]
    lines = [Line(name or "kNN-LM", [(p["entries"], p["token_perplexity"]) for p in points], labels)]
    lines += [
        Line("base LM", (), level=point["token_perplexity"])
        for point in content["store_sizes"]
        if point["entries"] == 0
    ]
    return line_chart(str(content.get("task", "")), lines, "entries", "perplexity per token", log_x=True)


def _heat_maps(file: Path) -> list[str]:
    """A map for each setting of the other axes (k, probe, ...); the best ones where these are many."""
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        perplexity = "perplexity" if rows and "perplexity" in rows[0] else "token_perplexity"
        if not rows or not {"knn_temp", "lmbda", perplexity} <= set(rows[0]):
            return []
        others = [name for name in ("k", "probe", "min_knns", "max_knns") if name in rows[0]]
        maps: dict[tuple[str, ...], dict[tuple[float, float], float]] = {}
        for row in rows:
            place = float(row["knn_temp"]), float(row["lmbda"])
            maps.setdefault(tuple(row[name] for name in others), {})[place] = float(row[perplexity])
    except (OSError, ValueError, TypeError, csv.Error):
        logger.warning("%s is damaged or half-written: left out.", file)
        return []
    drawn = []
    for setting, values in sorted(maps.items(), key=lambda one: min(one[1].values()))[:4]:
        temperatures, lmbdas = (sorted({place[axis] for place in values}) for axis in (0, 1))
        if len(temperatures) < 2 or len(lmbdas) < 2:
            continue
        table = [[values.get((t, lmbda), math.nan) for t in temperatures] for lmbda in lmbdas]
        parts = [f"{name}={value}" for name, value in zip(others, setting, strict=True) if value]
        title = ", ".join([file.stem, *parts, f"best {min(values.values()):,.2f}"])
        drawn.append(heat_map(title, temperatures, lmbdas, table, "knn_temp", "lmbda", "perplexity"))
    return drawn


def _token_view(content: dict[str, Any]) -> str:
    tokens = [
        InspectedToken(**token | {"neighbours": [Neighbour(**neighbour) for neighbour in token["neighbours"]]})
        for token in content["tokens"]
    ]
    return f"<h3>{html.escape(str(content.get('settings', '')))}</h3>\n{token_view(tokens)}"
