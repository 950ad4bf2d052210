"""One page with everything about some results: tables, charts, and texts with their neighbours. It needs no network."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from knn_lm_eval.errors import shortened
from knn_lm_eval.report.comparison import Comparison, TaskComparison
from knn_lm_eval.report.comparison_tables import detail_table, overview_table
from knn_lm_eval.report.plots import Bar, Chart, Line, foss_lines, heat_map, interval_chart, line_chart
from knn_lm_eval.report.rendering import render
from knn_lm_eval.report.tables import WARNING, Table
from knn_lm_eval.report.token_page import TokenView, view_tokens
from knn_lm_eval.report.tokens import read_token

logger = logging.getLogger(__name__)

Shown = TypeVar("Shown")
Values = dict[tuple[float, float], float]  # (knn_temp, lmbda) -> perplexity

GRID_AXES = ("k", "probe", "min_knns", "max_knns")  # of a tuned grid, beside temperature and lmbda
MOST_HEAT_MAPS = 4  # of one grid
FOSS_INTRODUCTION = "RetoMaton between few searches and one for each token: a point is a setting of min_knns."
SIZES_INTRODUCTION = (
    "Parts of the datastore, chosen at random when searching. A small part has fewer than k neighbours of each token: "
    "those among the nearest of the whole store."
)
GRID_INTRODUCTION = "Perplexity on the text that was tuned on; darker is better, the best is outlined."


@dataclass(frozen=True)
class Section:
    """A part of the page, in this order; the template leaves out what is empty."""

    title: str
    introduction: str = ""
    table: Table | None = None
    charts: list[Chart] = field(default_factory=list)
    token_views: list[TokenView] = field(default_factory=list)


def report_page(comparison: Comparison, others: Sequence[dict[str, Any]], grids: Iterable[Path], title: str) -> str:
    """The page.

    Parameters
    ----------
    comparison : for the tables.
    others : JSON objects found beside the results, each with its path as ``file``; those of ``foss_curve``,
        ``store_sizes`` and ``inspect_neighbours --json`` are drawn.
    grids : CSV files; those of ``tune`` become heat maps.
    """
    sections = [_task_section(comparison, task) for task in comparison.tasks]
    if len(comparison.tasks) > 1:
        sections.insert(0, Section("All tasks", table=overview_table(comparison)))
    curves = _shown(_foss_chart, others, "points", "saved_searches")
    sizes = _shown(_size_chart, others, "store_sizes", "entries")
    maps = [chart for file in grids for chart in _heat_maps(file)]
    texts = _shown(_token_view, others, "tokens", "p_lm")
    found = [
        Section("Saved searches", FOSS_INTRODUCTION, charts=curves),
        Section("Datastore size", SIZES_INTRODUCTION, charts=sizes),
        Section("Temperature and lmbda", GRID_INTRODUCTION, charts=maps),
        Section("Tokens and neighbours", token_views=texts),
    ]
    sections += [section for section in found if section.charts or section.token_views]
    baseline = f"Baseline: {comparison.baseline}. " if comparison.baseline else ""
    counted = "1 task" if len(comparison.tasks) == 1 else f"{len(comparison.tasks)} tasks"
    subtitle = f"{baseline}{counted}, seed {comparison.seed}."
    return render("report.html.j2", title=title, subtitle=subtitle, sections=sections, warning=WARNING)


def _task_section(comparison: Comparison, task: TaskComparison) -> Section:
    bars = [
        Bar(row.label, row.interval.difference, row.interval.low, row.interval.high)
        for row in task.rows
        if row.interval is not None
    ]
    title = f"{task.metric}: difference to {comparison.baseline}"
    charts = [interval_chart(title, bars, f"difference, {comparison.confidence:.0%} interval")] if bars else []
    return Section(task.task, table=detail_table(comparison, task), charts=charts)


def _shown(
    show: Callable[[dict[str, Any]], Shown], others: Sequence[dict[str, Any]], list_name: str, key: str
) -> list[Shown]:
    """What ``show`` makes of each file with such a list; what only resembles one is left out with a warning."""
    shown = []
    for content in others:
        if _is_list_of(content.get(list_name), key):
            try:
                shown.append(show(content))
            except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                logger.warning("%s is not what it looks like (%s): left out.", content["file"], shortened(error))
    return shown


def _is_list_of(value: Any, key: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) and key in entry for entry in value)


def _foss_chart(content: dict[str, Any]) -> Chart:
    lines = foss_lines(content["points"])
    return line_chart(str(content.get("task", "")), lines, "saved searches", "perplexity per token")


def _size_chart(content: dict[str, Any]) -> Chart:
    parts = [point for point in content["store_sizes"] if point["entries"] > 0]
    settings = content.get("settings", {})
    name = ", ".join(f"{key}={settings[key]}" for key in ("k", "lmbda", "knn_temp") if key in settings)
    points = [(float(part["entries"]), float(part["token_perplexity"])) for part in parts]
    labels = [f"{part['mean_neighbours']:g} neighbours" for part in parts]
    levels = [float(point["token_perplexity"]) for point in content["store_sizes"] if point["entries"] == 0]
    lines = [Line(name or "kNN-LM", points, labels), *(Line("base LM", level=level) for level in levels)]
    return line_chart(str(content.get("task", "")), lines, "entries", "perplexity per token", log_x=True)


def _heat_maps(file: Path) -> list[Chart]:
    """A map for each setting of the other axes (k, probe, ...); the best ones where these are many."""
    try:
        maps = _read_grid(file)
    except (OSError, ValueError, TypeError, csv.Error):
        logger.warning("%s is damaged or half-written: left out.", file)
        return []
    charts = []
    for setting, values in sorted(maps.items(), key=lambda item: min(item[1].values()))[:MOST_HEAT_MAPS]:
        temperatures, lmbdas = (sorted({place[axis] for place in values}) for axis in (0, 1))
        if len(temperatures) < 2 or len(lmbdas) < 2:
            continue
        table = [[values.get((t, lmbda), math.nan) for t in temperatures] for lmbda in lmbdas]  # [lmbdas][temperatures]
        title = ", ".join([file.stem, *setting, f"best {min(values.values()):,.2f}"])
        charts.append(heat_map(title, temperatures, lmbdas, table, "knn_temp", "lmbda", "perplexity"))
    return charts


def _read_grid(file: Path) -> dict[tuple[str, ...], Values]:
    """Perplexities of a tuned grid by the settings of the other axes; none where it is no such file.

    Raises
    ------
    ValueError
        Where a number is none, or a perplexity not above 0.
    """
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    names = set(rows[0]) if rows else set()
    metric = "perplexity" if "perplexity" in names else "token_perplexity"
    if not {"knn_temp", "lmbda", metric} <= names:
        return {}
    maps: dict[tuple[str, ...], Values] = {}
    for row in rows:
        place, perplexity = (float(row["knn_temp"]), float(row["lmbda"])), float(row[metric])
        if not perplexity > 0:
            raise ValueError(f"a perplexity of {perplexity}")
        setting = tuple(f"{name}={row[name]}" for name in GRID_AXES if name in names and row[name])
        maps.setdefault(setting, {})[place] = perplexity
    return maps


def _token_view(content: dict[str, Any]) -> TokenView:
    return view_tokens([read_token(token) for token in content["tokens"]], str(content.get("settings", "")))
