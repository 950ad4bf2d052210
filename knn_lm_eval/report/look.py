"""How all pictures look, and the parts that they share: colours, axes, cells, legends, and saving.

The same data give the same bytes, whatever the user's matplotlib is set to. Matplotlib is imported where something is
drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from knn_lm_eval.report.tables import visible
from knn_lm_eval.system.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import Collection
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

# A page's CSS variable -> its colour in light and in dark.
PALETTE = {
    "series-0": ("#0b62a8", "#6cb6ff"),
    "series-1": ("#c2410c", "#ff9b5e"),
    "series-2": ("#0f766e", "#4fd1b8"),
    "series-3": ("#8b2fa0", "#dd9bf0"),
    "series-4": ("#6b5b00", "#e0c34a"),
    "series-5": ("#475569", "#a8b3c2"),
    "text": ("#1b2027", "#e4e8ee"),
    "axis": ("#5b6470", "#a3adba"),
    "grid": ("#d9dde3", "#333b46"),
    "surface": ("#ffffff", "#12161c"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
SERIES = [colour for name, colour in LIGHT.items() if name.startswith("series")]
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
# Dark for what is good (low) to yellow; the steps can be told apart also without colour vision.
SEQUENTIAL = ((0.0, "#3b286e"), (0.35, "#21918c"), (0.65, "#5ec962"), (1.0, "#fde74d"))
LEVELS = 24  # colours in the bar beside a heat map
OUTLINE = "#fefefe"  # of the best cell, which is dark on any page
MARKERS = ("o", "s", "D")
DASHES: tuple[Any, ...] = ("solid", (0, (3, 2)), (0, (1, 2)))  # in widths of the line

WIDTH, HEIGHT = 560.0, 330.0  # points; a page's pixels
CHARACTER, LEGEND_SAMPLE, LEGEND_ROW = 7.0, 48.0, 20.0  # points: widths in a legend, and the height of a line
POINTS_PER_INCH = 72
DPI = 150  # of PNG files

LOOK: dict[str, Any] = {
    "axes.autolimit_mode": "round_numbers",
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["axis"],
    "axes.labelcolor": LIGHT["axis"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "font.size": 13,
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 2.2,
    "lines.markersize": 9,
    "svg.hashsalt": "knn_lm_eval",  # no random ids
    "text.color": LIGHT["text"],
    "text.parse_math": False,  # a dollar sign in a name is one
    "xtick.color": LIGHT["axis"],
    "ytick.color": LIGHT["axis"],
    "ytick.left": False,
}


@contextmanager
def look() -> Iterator[None]:
    """Matplotlib's own defaults and ``LOOK`` for the time of a drawing; the user's settings are back after it."""
    from matplotlib import style

    with style.context(["default", LOOK]):
        yield


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure of so many points, which makes room for labels and legends itself."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write ``path`` with the suffixes .png and .svg, each all at once."""
    for suffix in (".png", ".svg"):
        file = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(file, format=suffix[1:], dpi=DPI, metadata=metadata)
        final = path.with_suffix(suffix)
        temporary = final.with_name(final.name + ".tmp")
        temporary.write_bytes(file.getvalue())
        replace_file(temporary, final)


def colour(number: int) -> str:
    """Of the series of this number."""
    return SERIES[number % len(SERIES)]


def marker(number: int) -> str:
    """Of the series of this number; series of one colour have several."""
    return MARKERS[(number + number // len(SERIES)) % len(MARKERS)]


def dash(number: int, is_level: bool) -> Any:
    """Of the series of this number; curves begin with solid lines, horizontal lines are never solid."""
    return DASHES[1 + number % 2] if is_level else DASHES[number // len(SERIES) % len(DASHES)]


def label_axes(axes: Axes, x_label: str, y_label: str, grid: Literal["x", "y"] = "y") -> None:
    """Labels, short numbers, and grid lines at those of one axis."""
    axes.set_xlabel(visible(x_label))
    axes.set_ylabel(visible(y_label))
    axes.xaxis.set_major_formatter(_ticks())
    axes.yaxis.set_major_formatter(_ticks())
    axes.grid(axis=grid)


def set_log_scale(axes: Axes, low: float, high: float, axis: Literal["x", "y"] = "x") -> None:
    """A logarithmic axis with round numbers: powers of ten, and 2 and 5 times them where those would be few."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high if high > low else 2 * low)})
    scaled = getattr(axes, f"{axis}axis")
    scaled.set_major_locator(LogLocator(subs=(1.0,) if high >= 1000 * low else (1.0, 2.0, 5.0)))
    scaled.set_minor_locator(NullLocator())


def add_legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, in as many columns as the names leave room for; the figure grows by it."""
    handles, names = axes.get_legend_handles_labels()
    columns = int(figure.get_figwidth() * POINTS_PER_INCH / (LEGEND_SAMPLE + CHARACTER * max(map(len, names))))
    columns = max(1, min(columns, len(names)))
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + rows * LEGEND_ROW / POINTS_PER_INCH)
    figure.legend(handles, names, loc="outside lower left", ncols=columns)


def log_norm(best: float, worst: float) -> LogNorm:
    """Values to 0 (``best``) ... 1 (``worst`` and beyond)."""
    from matplotlib.colors import LogNorm

    return LogNorm(best, worst if worst > best else best * (1 + 1e-6), clip=True)


def add_colour_bar(
    figure: Figure, panels: Sequence[Axes], norm: LogNorm, ends: tuple[str, str] | None = None, label: str = ""
) -> None:
    """Which value has which colour; ``ends`` are the texts at bottom and top (None: round numbers)."""
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(_colours(norm, LEVELS), ax=panels, label=label, aspect=22, ticks=MaxNLocator(6), format=_tick)
    bar.ax.spines[:].set_visible(False)
    bar.ax.tick_params(length=0)
    bar.minorticks_off()
    for levels in bar.ax.collections:
        levels.set_edgecolor("face")  # so that nothing shines through between them
    if ends is not None:
        bar.set_ticks(bar.ax.get_ylim(), labels=ends)


def _colours(norm: LogNorm, levels: int = 256) -> ScalarMappable:
    """What gives values their colours, of so many."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    return ScalarMappable(norm, LinearSegmentedColormap.from_list("dark is good", SEQUENTIAL, N=levels))


def fill_cells(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    values: np.ndarray,
    norm: LogNorm,
    best: tuple[int, int],
) -> tuple[Collection, list[tuple[int, int]]]:
    """A cell for each finite value, of one size whatever the steps of x and y; the best one is outlined.

    Parameters
    ----------
    values : ``[ys, xs]``.
    best : its row and column.

    Returns
    -------
    The cells, and the row and column of each in their order.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Rectangle

    places = [(int(row), int(column)) for row, column in np.argwhere(np.isfinite(values))]
    corners = []
    for y, x in places:
        # Cells reach under the next ones, so that nothing shines through between them.
        right, top = min(x + 1.1, len(xs)), min(y + 1.1, len(ys))
        corners.append([(x, y), (right, y), (right, top), (x, top)])
    cell_colours = _colours(norm).to_rgba(values[np.isfinite(values)])
    cells = PolyCollection(corners, facecolors=cell_colours, edgecolors="none", linewidths=0)
    axes.add_collection(cells, autolim=False)
    axes.add_patch(Rectangle(best[::-1], 1, 1, fill=False, edgecolor=OUTLINE, linewidth=2.5, clip_on=False))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _label_cells(axes.xaxis, xs)
    _label_cells(axes.yaxis, ys)
    axes.set_xlim(0, len(xs))
    axes.set_ylim(0, len(ys))
    return cells, places


def _label_cells(axis: Axis, values: Sequence[float]) -> None:
    """At most eight of the values, evenly spread, in the middle of their cells."""
    places = range(0, len(values), max(1, math.ceil(len(values) / 8)))
    axis.set_ticks([place + 0.5 for place in places], [short(values[place]) for place in places])


def short(value: float, digits: int = 3) -> str:
    """Few digits: 12.5, 1,200, 40k, 3M."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.{digits}g}{suffix}".replace("-", "−")
    return (f"{value:,.0f}" if size >= 1000 else f"{value:.{digits}g}").replace("-", "−")


def _tick(value: float, _place: float) -> str:
    return short(value)


def _ticks() -> Formatter:
    """Short numbers, with more digits where an axis takes them to tell its ticks apart."""
    from matplotlib.ticker import Formatter

    class Ticks(Formatter):
        def __call__(self, value: float, _place: float | None = None) -> str:
            return short(value)

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            shown = ([short(value, digits) for value in values] for digits in range(3, 8))
            return next((texts for texts in shown if len(set(texts)) == len(texts)), [short(v) for v in values])

    return Ticks()
