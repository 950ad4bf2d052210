"""Line charts, intervals and heat maps as SVG, to stand inside an HTML page that sets the colours.

Colours come from the page's CSS variables (``STYLE`` has them for light and dark), so a chart follows the reader's
theme. Every mark has a tooltip with its figures.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

STYLE = """
:root { --series-0: #0b62a8; --series-1: #c2410c; --series-2: #0f766e; --series-3: #8b2fa0; --series-4: #6b5b00;
  --series-5: #475569; --grid: #d9dde3; --axis: #5b6470; --surface: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --series-0: #6cb6ff; --series-1: #ff9b5e; --series-2: #4fd1b8;
  --series-3: #dd9bf0; --series-4: #e0c34a; --series-5: #a8b3c2; --grid: #333b46; --axis: #a3adba;
  --surface: #12161c; } }
figure.chart { margin: 0; min-width: 0; }
figure.chart svg { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
figure.chart figcaption { font-weight: 600; margin-bottom: .35rem; }
figure.chart text { fill: var(--axis); }
figure.chart text.strong { fill: currentColor; }
figure.chart .grid { stroke: var(--grid); }
figure.chart .axis { stroke: var(--axis); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .35rem 0 0; padding: 0; list-style: none;
  font-size: .85rem; }
.legend svg { width: 30px !important; height: 12px !important; display: inline-block !important;
  vertical-align: middle; margin-right: .35rem; }
"""
COLOURS = 6
DASHES = ("", "7 4", "2 4")

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 12, 48
# Dark blue to yellow, light enough steps to be told apart also without colour vision.
SEQUENTIAL = ((0.0, (253, 231, 77)), (0.35, (94, 201, 98)), (0.65, (33, 145, 140)), (1.0, (59, 40, 110)))


@dataclass(frozen=True)
class Line:
    """A curve; ``labels`` are for the tooltips of its points. A single x of None is a horizontal line."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = field(default_factory=tuple)
    level: float | None = None


@dataclass(frozen=True)
class Bar:
    """A difference with its interval, and its name."""

    name: str
    value: float
    low: float
    high: float


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str, log_x: bool = False) -> str:
    """Curves with markers, and horizontal lines for what does not depend on x."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [line.level for line in lines if line.level is not None]
    x_ticks = _log_ticks(min(xs), max(xs)) if log_x else _ticks(min(xs), max(xs))
    y_ticks = _ticks(min(ys), max(ys))
    x_low, x_high = min(xs[0], *xs, x_ticks[0]), max(*xs, x_ticks[-1]) if len(xs) > 1 else xs[0] + 1
    place_x = _scale(x_low, x_high, LEFT, WIDTH - RIGHT, log_x)
    place_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_ticks, y_ticks, place_x, place_y, x_label, y_label)]
    legend = []
    for number, line in enumerate(lines):
        style = f"stroke:var(--series-{number % COLOURS})"
        dash = DASHES[(number // COLOURS) % len(DASHES)] if line.level is None else DASHES[1 + number % 2]
        stroke = f'style="{style}" stroke-width="2.2" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")
        legend.append(_legend_item(line, number, stroke))
        if line.level is not None:
            y = place_y(line.level)
            tip = f"{line.name}: {line.level:,.3f}"
            parts.append(
                f'<g><title>{html.escape(tip)}</title><line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                f"{stroke}/></g>"
            )
            continue
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" {stroke}/>')
        labels = line.labels or [""] * len(line.points)
        for (x, y), label in zip(line.points, labels, strict=True):
            tip = f"{line.name}{', ' + label if label else ''}: {x_label} {_short(x)}, {y_label} {y:,.3f}"
            parts.append(f"<g><title>{html.escape(tip)}</title>{_marker(number, place_x(x), place_y(y))}</g>")
    return _figure(title, "".join(parts), HEIGHT, f'<ul class="legend">{"".join(legend)}</ul>')


def interval_chart(title: str, bars: Sequence[Bar], x_label: str) -> str:
    """Differences and their intervals, a row each, with a line at zero."""
    row, left = 30, 230
    height = TOP + row * len(bars) + BOTTOM
    ticks = _ticks(min(0.0, *(bar.low for bar in bars)), max(0.0, *(bar.high for bar in bars)))
    place = _scale(ticks[0], ticks[-1], left, WIDTH - RIGHT)
    bottom = height - BOTTOM
    parts = []
    for tick in ticks:
        kind = "axis" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text(place(tick), bottom + 18, _short(tick), "middle"))
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 38, x_label, "middle"))
    for number, bar in enumerate(bars):
        y = TOP + row * (number + 0.5)
        sure = not bar.low <= 0 <= bar.high
        style = f'style="stroke:var(--series-{0 if sure else 5});fill:var(--series-{0 if sure else 5})"'
        tip = f"{bar.name}: {bar.value:+,.3f} [{bar.low:+,.3f}, {bar.high:+,.3f}]"
        name = bar.name if len(bar.name) <= 29 else bar.name[:28] + "…"
        parts.append(_text(left - 10, y + 4, name, "end", "strong"))
        parts.append(
            f"<g {style}><title>{html.escape(tip)}</title>"
            f'<line stroke-width="3" x1="{place(bar.low):.1f}" x2="{place(bar.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{place(bar.value):.1f}" cy="{y}" r="5"/></g>'
        )
    return _figure(title, "".join(parts), height)


def heat_map(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    values: Sequence[Sequence[float]],
    x_label: str,
    y_label: str,
    value_label: str,
) -> str:
    """Values (a row for each y), dark where they are low; the lowest is outlined. Far above it, all look the same."""
    known = sorted(value for row in values for value in row if math.isfinite(value))
    best, worst = known[0], known[min(len(known) - 1, int(0.8 * len(known)))]
    right = 86
    place_x = _scale(0, len(xs), LEFT, WIDTH - right)
    place_y = _scale(0, len(ys), HEIGHT - BOTTOM, TOP)
    cell_width, cell_height = place_x(1) - place_x(0), place_y(0) - place_y(1)
    parts, outline = [], ""
    for j, y in enumerate(ys):
        for i, x in enumerate(xs):
            value = values[j][i]
            if not math.isfinite(value):
                continue
            share = 0.0 if worst <= best else math.log(min(value, worst) / best) / math.log(worst / best)
            left, top = place_x(i), place_y(j + 1)
            box = f'x="{left:.1f}" y="{top:.1f}" width="{cell_width + 0.3:.1f}" height="{cell_height + 0.3:.1f}"'
            tip = f"{x_label} {_short(x)}, {y_label} {_short(y)}: {value_label} {value:,.3f}"
            parts.append(f'<rect {box} fill="{_colour(1 - share)}"><title>{html.escape(tip)}</title></rect>')
            if value == best and not outline:
                outline = f'<rect {box} fill="none" stroke="#ffffff" stroke-width="2.5" pointer-events="none"/>'
    parts = ['<g shape-rendering="crispEdges">', *parts, outline, "</g>"]
    for at, label in _labels(xs):
        parts.append(_text(place_x(at + 0.5), HEIGHT - BOTTOM + 18, label, "middle"))
    for at, label in _labels(ys):
        parts.append(_text(LEFT - 8, place_y(at + 0.5) + 4, label, "end"))
    parts.append(_text((LEFT + WIDTH - right) / 2, HEIGHT - 8, x_label, "middle"))
    parts.append(_vertical_text(y_label))
    steps, bar_left = 24, WIDTH - right + 18
    scale = _scale(0, steps, HEIGHT - BOTTOM, TOP)
    for step in range(steps):
        parts.append(
            f'<rect x="{bar_left}" y="{scale(step + 1):.1f}" width="14" height="{scale(0) - scale(1) + 0.5:.1f}" '
            f'fill="{_colour(1 - (step + 0.5) / steps)}"/>'
        )
    parts.append(_text(bar_left + 19, HEIGHT - BOTTOM, f"{best:.4g}"))
    parts.append(_text(bar_left + 19, TOP + 10, ("≥" if worst < known[-1] else "") + f"{worst:.4g}"))
    return _figure(title, "".join(parts), HEIGHT)


def _figure(title: str, content: str, height: float, below: str = "") -> str:
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{name}</figcaption>\n'
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{name}">{content}</svg>\n{below}</figure>\n'
    )


def _frame(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> str:
    parts = []
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, _short(tick), "end"))
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(_text(x, bottom + 19, _short(tick), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
    parts.append(_vertical_text(y_label))
    return "".join(parts)


def _legend_item(line: Line, number: int, stroke: str) -> str:
    sample = f'<line x1="1" x2="29" y1="6" y2="6" {stroke}/>'
    if line.level is None:
        sample += _marker(number, 15, 6)
    text = line.name if line.level is None else f"{line.name} ({line.level:,.2f})"
    return f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{sample}</svg>{html.escape(text)}</li>'


def _marker(number: int, x: float, y: float) -> str:
    style = f'style="fill:var(--series-{number % COLOURS});stroke:var(--surface)" stroke-width="1.2"'
    shape = number % 3
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'
    if shape == 1:
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {style}/>'
    return f'<path d="M{x:.1f} {y - 6:.1f} L{x + 6:.1f} {y:.1f} L{x:.1f} {y + 6:.1f} L{x - 6:.1f} {y:.1f} Z" {style}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{marked}>{html.escape(text)}</text>'


def _vertical_text(text: str) -> str:
    y = (TOP + HEIGHT - BOTTOM) / 2
    return f'<text transform="translate(16 {y:g}) rotate(-90)" text-anchor="middle">{html.escape(text)}</text>'


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    if log:
        low, high = math.log(low), math.log(high)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return start + ((math.log(value) if log else value) - low) / span * (end - start)

    return place


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, five or so, from at most ``low`` to at least ``high``."""
    if high <= low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there would be few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**power for power in powers if low * 0.999 <= 10.0**power <= high * 1.001]
    if len(ticks) < 3:
        finer = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        ticks = [tick for tick in finer if low * 0.999 <= tick <= high * 1.001]
    return ticks or [low, high]


def _labels(values: Sequence[float]) -> list[tuple[int, str]]:
    """At most eight of the values, evenly spread, with their places."""
    step = max(1, math.ceil(len(values) / 8))
    return [(at, _short(values[at])) for at in range(0, len(values), step)]


def _short(value: float) -> str:
    """Few digits: 12.5, 1,200, 40k, 3M."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1e3 if suffix == "k" else limit)
            return f"{scaled:.3g}{suffix}".replace("-", "−")
    return (f"{value:,.0f}" if size >= 1000 else f"{value:.3g}").replace("-", "−")


def _colour(share: float) -> str:
    """The colour at 0 (yellow) to 1 (dark)."""
    for (low, start), (high, end) in zip(SEQUENTIAL, SEQUENTIAL[1:], strict=False):
        if share <= high:
            part = max(0.0, (share - low) / (high - low))
            return "rgb({} {} {})".format(*(round(a + part * (b - a)) for a, b in zip(start, end, strict=True)))
    return "rgb({} {} {})".format(*SEQUENTIAL[-1][1])
