"""All pictures: charts for the report's page, and the PNG and SVG files that verbs write.

A chart for a page takes its colours from the page's CSS variables, so it follows the reader's theme, and every mark
has a tooltip with its figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knn_lm_eval.report.look import (
    HEIGHT,
    LIGHT,
    SERIES,
    VARIABLES,
    WIDTH,
    add_colour_bar,
    add_legend,
    colour,
    dash,
    fill_cells,
    label_axes,
    log_norm,
    look,
    marker,
    new_figure,
    save,
    set_log_scale,
    short,
)
from knn_lm_eval.report.svg import Tooltips, inline_svg
from knn_lm_eval.report.tables import visible

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

ROW, MARGIN = 30.0, 62.0  # points, of an interval chart: each row, and what is below all
LONGEST_NAME = 29  # characters of a row's name


@dataclass(frozen=True)
class Line:
    """A curve, with a label for each point's tooltip or none; one with a ``level`` instead is a horizontal line.

    Raises ValueError where a figure is not finite.
    """

    name: str
    points: Sequence[tuple[float, float]] = ()
    labels: Sequence[str] = ()
    level: float | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(figure) for figure in (*chain(*self.points), self.level or 0.0)):
            raise ValueError(f"{self.name}: not all figures are finite")


@dataclass(frozen=True)
class Bar:
    """A difference with its interval, and its name."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """A chart for a page: its title as text, and an ``svg`` element, in which text is escaped."""

    title: str
    svg: str


# --------------------------------------------------------------------------------------------- charts for a page


@look()
def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, log_x: bool = False, log_y: bool = False
) -> Chart:
    """Curves with markers, and horizontal lines for what does not depend on x."""
    figure, tooltips = _line_figure(lines, x_label, y_label, log_x, log_y)
    return _chart(title, figure, tooltips)


@look()
def interval_chart(title: str, bars: Sequence[Bar], x_label: str) -> Chart:
    """Differences and their intervals, a row each, with a line at zero; those that leave zero out are coloured."""
    figure = new_figure(height=ROW * len(bars) + MARGIN)
    axes = figure.subplots()
    tooltips: Tooltips = {}
    for row, bar in enumerate(bars):
        style: Any = {"color": SERIES[-1 if bar.low <= 0 <= bar.high else 0], "clip_on": False}
        (interval,) = axes.plot([bar.low, bar.high], [row, row], linewidth=3, **style)
        (value,) = axes.plot([bar.value], [row], marker="o", markersize=10, **style)
        tip = f"{bar.name}: {bar.value:+,.3f} [{bar.low:+,.3f}, {bar.high:+,.3f}]"
        for artist in (interval, value):
            _add_tooltips(tooltips, artist, [tip])
    axes.axvline(0, color=LIGHT["axis"], linewidth=1, zorder=1)
    label_axes(axes, x_label, "", grid="x")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(range(len(bars)), [_shortened(bar.name) for bar in bars], color=LIGHT["text"])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    return _chart(title, figure, tooltips)


@look()
def heat_map(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    values: Sequence[Sequence[float]],
    x_label: str,
    y_label: str,
    value_label: str,
) -> Chart:
    """Values above 0, dark where they are low, the lowest outlined; far above it, all look the same.

    Parameters
    ----------
    xs, ys : what the columns and rows of cells stand for.
    values : ``[ys][xs]``; no cell where one is not finite.
    """
    table = np.array(values, dtype=np.float64)
    known = np.sort(table[np.isfinite(table)])
    best, worst = float(known[0]), float(known[min(len(known) - 1, int(0.8 * len(known)))])
    best_row, best_column = np.argwhere(table == best)[0].tolist()
    figure = new_figure()
    axes = figure.subplots()
    norm = log_norm(best, worst)
    cells, places = fill_cells(axes, xs, ys, table, norm, (best_row, best_column))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    at_the_top = ("≥" if worst < known[-1] else "") + f"{worst:.4g}"
    add_colour_bar(figure, [axes], norm, (f"{best:.4g}", at_the_top))
    tooltips: Tooltips = {}
    tips = [
        f"{x_label} {short(xs[column])}, {y_label} {short(ys[row])}: {value_label} {table[row, column]:,.3f}"
        for row, column in places
    ]
    _add_tooltips(tooltips, cells, tips)
    return _chart(title, figure, tooltips)


# ------------------------------------------------------------------------------------------- pictures beside files


@look()
def draw_foss_curve(path: Path, task: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Perplexity against the fraction of saved searches, as ``path`` with the suffixes .png and .svg.

    Parameters
    ----------
    task : the title.
    points : as for ``foss_lines``; the numbers at the curves are their ``min_knns``.
    """
    lines = foss_lines(points)
    figure, _ = _line_figure(lines, "fraction of saved searches (numbers: min_knns)", "perplexity per token")
    (axes,) = figure.axes
    axes.set_title(visible(task))
    for number, line in enumerate(lines):
        for place, label in zip(line.points, line.labels, strict=True):
            beside: Any = {"xytext": (5, 6), "textcoords": "offset points", "fontsize": 9}
            axes.annotate(f"{float(label.split()[-1]):g}", place, color=colour(number), **beside)
    save(figure, path)


@look()
def draw_grid(
    path: Path, title: str, perplexities: np.ndarray, axes: Mapping[str, Sequence[float]], best: tuple[int, int, int]
) -> None:
    """Heat maps of perplexity through the best setting, over (lmbda, knn_temp) and (k, knn_temp), as .png and .svg.

    Parameters
    ----------
    perplexities : ``[temperatures, ks, lmbdas]``.
    axes : the values of ``knn_temp``, ``k`` and ``lmbda`` in the array's order.
    best : the place of the best setting in the array; both maps go through it and outline it.
    """
    temperature, k, lmbda = best
    lowest = float(perplexities[best])
    # Most of a wide grid is hopeless; colours are spent on what is less than twice as bad as the best.
    norm = log_norm(lowest, min(float(perplexities.max()), 2 * lowest))
    figure = new_figure(width=1.7 * WIDTH, height=1.15 * HEIGHT)
    left, right = figure.subplots(1, 2)
    maps = (
        (left, "lmbda", perplexities[:, k, :], lmbda, f"k = {axes['k'][k]}"),
        (right, "k", perplexities[:, :, lmbda], k, f"lmbda = {axes['lmbda'][lmbda]:g}"),
    )
    for panel, name, table, place, fixed in maps:
        fill_cells(panel, axes[name], axes["knn_temp"], table, norm, (temperature, place))
        panel.set_xlabel(name)
        panel.set_ylabel("knn_temp")
        panel.set_title(f"{visible(title)}, {fixed}")
    label = "token perplexity (one colour from twice the best on)"
    add_colour_bar(figure, [left, right], norm, label=label)
    save(figure, path)


@look()
def draw_indexes(
    path: Path, measured: Sequence[Mapping[str, Any]], exact: Sequence[Mapping[str, Any]], entries: int
) -> None:
    """Perplexity against the time of a search, with a line through the best, as .png and .svg.

    Parameters
    ----------
    measured : ``index``, ``factory``, ``bytes_per_entry``, ``k``, ``microseconds`` per query, ``tuned perplexity``,
        and ``efficient``, which is true of those that no other is as fast as and better.
    exact : the same of exhaustive search, whose time is not shown.
    entries : of the datastore.
    """
    names = list(dict.fromkeys(row["index"] for row in measured))
    figure = new_figure(height=1.2 * HEIGHT)
    axes = figure.subplots()
    for number, name in enumerate(names):
        of_index = [row for row in measured if row["index"] == name]
        label = f"{name}: {of_index[0]['factory']}, {of_index[0]['bytes_per_entry']:.0f} bytes"
        style: Any = {"color": colour(number), "marker": marker(number), "markersize": 7, "clip_on": False}
        axes.plot(*_times_and_perplexities(of_index), label=visible(label), linestyle="", **style)
    thin: Any = {"color": LIGHT["axis"], "linewidth": 1}
    best = sorted((row for row in measured if row["efficient"]), key=lambda row: row["microseconds"])
    axes.step(*_times_and_perplexities(best), where="post", zorder=1, label="the best", **thin)
    for row in exact:
        axes.axhline(row["tuned perplexity"], linestyle=":", **thin)
        at_the_right: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": 9}
        axes.annotate(f"exact, k = {row['k']}", (1, row["tuned perplexity"]), **at_the_right)
    times, _ = _times_and_perplexities(measured)
    set_log_scale(axes, min(times) / 1.1, max(times) * 1.1)
    label_axes(axes, "microseconds per query", "perplexity per token, tuned")
    axes.set_title(f"{entries:,} entries")
    add_legend(figure, axes)
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------- parts


def foss_lines(points: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Curves of RetoMaton, one for each clustering, and levels of the methods without ``min_knns``.

    Parameters
    ----------
    points : ``method`` (``base``, ``knn-lm`` or ``retomaton``), ``clusters`` (empty without), ``min_knns``,
        ``token_perplexity`` and ``saved_searches``.
    """
    curves: dict[str, list[tuple[float, float, str]]] = {}
    levels = []
    for point in points:
        perplexity = float(point["token_perplexity"])
        if point["method"] == "retomaton":
            name = f"RetoMaton, {'clusters ' + point['clusters'] if point['clusters'] else 'no clusters'}"
            place = float(point["saved_searches"]), perplexity, f"min_knns {point['min_knns']}"
            curves.setdefault(name, []).append(place)
        else:
            name = {"base": "base LM", "knn-lm": "kNN-LM"}.get(point["method"], point["method"])
            levels.append(Line(name, level=perplexity))
    lines = []
    for name, places in curves.items():
        places.sort(key=lambda place: place[0])
        lines.append(Line(name, [(x, y) for x, y, _ in places], [label for _, _, label in places]))
    return [*lines, *levels]


def _line_figure(
    lines: Sequence[Line], x_label: str, y_label: str, log_x: bool = False, log_y: bool = False
) -> tuple[Figure, Tooltips]:
    figure = new_figure()
    axes = figure.subplots()
    tooltips: Tooltips = {}
    for number, line in enumerate(lines):
        name = visible(line.name)
        style: Any = {"color": colour(number), "linestyle": dash(number, line.level is not None), "clip_on": False}
        if line.level is not None:
            level = axes.axhline(line.level, label=f"{name} ({line.level:,.2f})", **style)
            _add_tooltips(tooltips, level, [f"{name}: {line.level:,.3f}"])
            continue
        xs, ys = ([point[axis] for point in line.points] for axis in (0, 1))
        edge: Any = {"markeredgecolor": LIGHT["surface"], "markeredgewidth": 1.2}
        (curve,) = axes.plot(xs, ys, marker=marker(number), label=name, **style, **edge)
        labels = line.labels or [""] * len(xs)
        tips = [
            f"{name}{', ' + label if label else ''}: {x_label} {short(x)}, {y_label} {y:,.3f}"
            for x, y, label in zip(xs, ys, labels, strict=True)
        ]
        _add_tooltips(tooltips, curve, tips)
    if log_x:
        all_xs = [x for line in lines for x, _ in line.points]
        set_log_scale(axes, min(all_xs), max(all_xs))
    if log_y:
        all_ys = [y for line in lines for _, y in line.points]
        set_log_scale(axes, min(all_ys), max(all_ys), "y")
    label_axes(axes, x_label, y_label)
    add_legend(figure, axes)
    return figure, tooltips


def _times_and_perplexities(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["microseconds"] for row in rows], [row["tuned perplexity"] for row in rows]


def _shortened(name: str) -> str:
    name = visible(name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _add_tooltips(tooltips: Tooltips, artist: Artist, texts: Sequence[str]) -> None:
    name = f"tooltips-{len(tooltips)}"
    artist.set_gid(name)
    tooltips[name] = [visible(text) for text in texts]


def _chart(title: str, figure: Figure, tooltips: Tooltips) -> Chart:
    return Chart(title, inline_svg(figure, visible(title), tooltips, VARIABLES))
