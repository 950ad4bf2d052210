"""The page of an analysis of token records, from its JSON: tables, charts, and examples of each cell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from knn_lm_eval.report.analysis_tables import (
    concentration_table,
    counted,
    leakage_table,
    overview_table,
    property_table,
)
from knn_lm_eval.report.plots import Bar, Chart, Line, interval_chart, line_chart
from knn_lm_eval.report.rendering import render
from knn_lm_eval.report.tables import WARNING, Table, visible

LEAST_TOKENS = 2  # of a cell that is drawn


@dataclass(frozen=True)
class ShownNeighbour:
    """A neighbour as the page shows it."""

    weight: str
    context: str
    value: str


@dataclass(frozen=True)
class ShownExample:
    """A token as the page shows it: ``kind`` is ``helped`` or ``hurt``."""

    kind: str
    context: str
    token: str
    figures: str
    neighbours: list[ShownNeighbour]


@dataclass(frozen=True)
class ExampleGroup:
    """A cell's examples."""

    title: str
    examples: list[ShownExample]


@dataclass(frozen=True)
class Section:
    """A part of the page; the template leaves out what is empty."""

    title: str
    introduction: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    examples: list[ExampleGroup] = field(default_factory=list)


def analysis_page(analysis: dict[str, Any], title: str) -> str:
    """A whole page, which needs nothing from a network."""
    methods = analysis["methods"]
    names = list(dict.fromkeys(name for method in methods for name in method["by"]))
    sections = [_overview(analysis), *(_property(analysis, name) for name in names)]
    if any(method["leakage"] is not None for method in methods):
        sections.append(_leakage(analysis))
    subtitle = (
        f"{', '.join(method['name'] for method in methods)}: {counted(analysis['tokens'], 'token')} of "
        f"{counted(analysis['documents'], 'document')}."
    )
    return render("analysis.html.j2", title=title, subtitle=subtitle, sections=sections, warning=WARNING)


def _overview(analysis: dict[str, Any]) -> Section:
    lines = [
        Line(method["name"], [(100 * share, gain) for share, gain in method["concentration"]["curve"]])
        for method in analysis["methods"]
        if method["concentration"]["curve"]
    ]
    charts = []
    if lines:
        label = "percent of the tokens, those that gained most first"
        charts.append(line_chart("Where the gain is", lines, label, "sum of their gains / all tokens (nats)"))
    introduction = (
        "What retrieval brought: a token's gain is log p − log p_LM in nats. The curve adds up gains, the largest "
        "first: it rises to all that was gained, and what losses leave of it is its end, the mean gain."
    )
    return Section("All tokens", introduction, [overview_table(analysis), concentration_table(analysis)], charts)


def _property(analysis: dict[str, Any], name: str) -> Section:
    of_methods = [method for method in analysis["methods"] if name in method["by"]]
    title = of_methods[0]["by"][name]["title"]
    section = Section(title[0].upper() + title[1:])
    several = len(analysis["methods"]) > 1
    for method in of_methods:
        cells = method["by"][name]["cells"]
        bars = [
            Bar(cell["label"], cell["gain"]["mean"], cell["gain"]["low"], cell["gain"]["high"])
            for cell in cells
            if cell["gain"] is not None and cell["gain"]["low"] is not None and cell["tokens"] >= LEAST_TOKENS
        ]
        if bars:
            said = f": {method['name']}" if several else ""
            label = f"mean gain (nats), {analysis['confidence']:.0%} interval"
            section.charts.append(interval_chart(f"Gain by {title}{said}", bars, label))
        section.tables.append(property_table(analysis, method, name))
        for of_cell in method.get("examples", {}).get(name, []):
            if of_cell["tokens"]:
                heading = f"{method['name']}, {of_cell['label']}" if several else of_cell["label"]
                section.examples.append(ExampleGroup(heading, [_example(token) for token in of_cell["tokens"]]))
    return section


def _leakage(analysis: dict[str, Any]) -> Section:
    section = Section(
        "What stands in the datastore",
        "Perplexity by the length of the overlap: how many tokens, a token and those right before it, stand in the "
        "datastore as they do in the text.",
    )
    several = len(analysis["methods"]) > 1
    for method in analysis["methods"]:
        if method["leakage"] is None:
            continue
        said = f": {method['name']}" if several else ""
        lines = [
            Line(
                line,
                [(cell["from"], cell[name]["mean"]) for cell in method["leakage"]["cells"] if cell[name] is not None],
            )
            for line, name in (("the LM", "lm_perplexity"), ("with retrieval", "perplexity"))
        ]
        if any(line.points for line in lines):
            label = "overlap (tokens, from)"
            section.charts.append(line_chart(f"Perplexity by overlap{said}", lines, label, "perplexity", log_y=True))
        section.tables.append(leakage_table(analysis, method))
    return section


def _example(token: dict[str, Any]) -> ShownExample:
    p_knn = "none" if token["p_knn"] is None else _probability(token["p_knn"])
    figures = f"p_LM {_probability(token['p_lm'])}, p_kNN {p_knn}, mixture {_probability(token['p'])}"
    where = f"{token['task']} " if token["task"] else ""
    return ShownExample(
        kind="helped" if token["p"] > token["p_lm"] else "hurt",
        context=visible(token["context"]),
        token=visible(token["text"]),
        figures=f"{figures} ({where}document {token['document']:,}, position {token['position']:,})",
        neighbours=[
            ShownNeighbour(f"{one['weight']:.3f}", visible(one["context"]), visible(one["value"]))
            for one in token["neighbours"]
        ],
    )


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 or p == 0 else f"{p:.0e}"
