"""What was measured beside what is published: a table for each task of a reproduction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knn_lm_eval.report.published_figures import PublishedFigure
from knn_lm_eval.report.tables import Format

# A table's figures, in this order, and how each is written; a task has some of them.
METRICS: dict[str, tuple[str, Format]] = {
    "token_perplexity": ("token perplexity", ".2f"),
    "word_perplexity": ("word perplexity", ".2f"),
    "bits_per_byte": ("bits per byte", ".3f"),
    "acc": ("acc", ".4f"),
    "acc_norm": ("acc norm", ".4f"),
    "acc_mutual_info": ("acc mutual info", ".4f"),
    "exact_match": ("exact match", ".4f"),
    "f1": ("f1", ".4f"),
    "saved_searches": ("saved searches", ".1%"),
}
LABELS = {"base": "LM alone", "knn": "kNN-LM", "retomaton": "RetoMaton"}  # others are called as in the recipe


@dataclass(frozen=True)
class Measurement:
    """One evaluation: the recipe's name of its method, its task, lm-eval's results, and the figure that it is held
    against."""

    method: str
    task: str
    results: dict[str, Any]
    published: PublishedFigure | None


@dataclass(frozen=True)
class MeasuredTable:
    """For ``print_table``."""

    title: str
    columns: dict[str, Format]
    rows: list[dict[str, Any]]
    notes: list[str]


def measured_tables(measurements: Sequence[Measurement], fraction: float) -> list[MeasuredTable]:
    """A table for each task; a fraction of a recipe is said not to compare."""
    tasks = dict.fromkeys(one.task for one in measurements)
    return [_table(task, [one for one in measurements if one.task == task], fraction) for task in tasks]


def metric(results: dict[str, Any], task: str, name: str) -> float | None:
    """A metric of lm-eval's results, by its first filter; None where there is none."""
    of_task = results["results"].get(task, {})
    found = [value for key, value in of_task.items() if key.partition(",")[0] == name]
    return float(found[0]) if found and isinstance(found[0], (int, float)) else None


def _table(task: str, measurements: Sequence[Measurement], fraction: float) -> MeasuredTable:
    rows: list[dict[str, Any]] = []
    for one in measurements:
        figures: dict[str, Any] = {METRICS[name][0]: metric(one.results, task, name) for name in METRICS}
        published = None if one.published is None else one.published.value
        rows.append({"": LABELS.get(one.method, one.method), **figures, "published": published})
    shown = {heading: form for heading, form in METRICS.values() if any(row[heading] is not None for row in rows)}
    columns: dict[str, Format] = {"": "", **shown}
    notes = []
    figures_held = [one.published for one in measurements if one.published is not None]
    if figures_held:
        columns["published"] = METRICS.get(figures_held[0].metric, ("", ".4f"))[1]
        sources = "; ".join(dict.fromkeys(one.source for one in figures_held))
        models = "; ".join(dict.fromkeys(one.model for one in figures_held))
        notes.append(f"Published: {METRICS[figures_held[0].metric][0]} of {models} ({sources}).")
        for caveat in dict.fromkeys(one.caveat for one in figures_held if one.caveat):
            values = ", ".join(dict.fromkeys(f"{one.value:g}" for one in figures_held if one.caveat == caveat))
            notes.append(f"{values}: {caveat}.")
    if fraction < 1:
        notes.append(
            f"Warning: this is a fraction ({fraction:g}) of the recipe, which compares with nothing published."
        )
    return MeasuredTable(_title(task, measurements), columns, rows, notes)


def _title(task: str, measurements: Sequence[Measurement]) -> str:
    """The task, how many tokens were scored, and the entries of the datastore."""
    counts = [one.results["config"].get("knn") or {} for one in measurements]
    tokens = next((work["tokens_scored"] for work in counts if work.get("tokens_scored")), None)
    entries = next((work["datastore"]["entries"] for work in counts if "datastore" in work), None)
    parts = [] if tokens is None else [f"{tokens:,} tokens scored"]
    parts += [] if entries is None else [f"{entries:,} in the datastore"]
    return f"{task}: {', '.join(parts)}" if parts else task
