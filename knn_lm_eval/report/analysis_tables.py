"""The tables of an analysis of token records, from its JSON."""

from __future__ import annotations

from typing import Any

from knn_lm_eval.report.tables import Table

Figure = dict[str, Any] | None  # a mean and its interval
# No two columns have one name.
FIGURES = ["gain", "interval", "helped", "helped by", "hurt", "hurt by"]


def analysis_tables(analysis: dict[str, Any]) -> list[Table]:
    """The overview, and a table for each method and property."""
    tables = [overview_table(analysis), concentration_table(analysis)]
    for method in analysis["methods"]:
        tables += [property_table(analysis, method, name) for name in method["by"]]
        if method["leakage"] is not None:
            tables.append(leakage_table(analysis, method))
    return tables


def overview_table(analysis: dict[str, Any]) -> Table:
    """A row for each method."""
    header = ["method", "perplexity", "of the LM", *FIGURES]
    rows = []
    for method in analysis["methods"]:
        summary = method["summary"]
        row = [method["name"], _number(summary["perplexity"]), _number(summary["lm_perplexity"])]
        row += [_nats(summary["gain"]), interval(summary["gain"]), *_helped_and_hurt(summary)]
        rows.append(row)
    notes = [
        f"{analysis['tokens']:,} tokens of {counted(analysis['documents'], 'document')} of "
        f"{', '.join(analysis['tasks']) or 'no task'}. Gains are log p - log p_LM in nats a token; intervals of "
        f"{analysis['confidence']:.0%} are over {analysis['units']}.",
        *analysis["notes"],
    ]
    return Table("All tokens", header, rows, notes)


def concentration_table(analysis: dict[str, Any]) -> Table:
    """On how few tokens gains and losses fall, a row for each method; of several, what each gains beyond the first."""
    header = ["method", "90 % of gains on", "90 % of losses on", "searched"]
    if several := len(analysis["methods"]) > 1:
        header += [f"gain beyond {analysis['methods'][0]['name']}", "interval"]
    rows = [
        [
            method["name"],
            _share(method["concentration"]["share_of_tokens"]),
            _share(method["concentration"]["share_of_tokens_lost"]),
            _share(method["summary"]["searched"]),
            *([_nats(method["difference"]), interval(method["difference"])] if several else []),
        ]
        for method in analysis["methods"]
    ]
    return Table("On how few tokens", header, rows)


def property_table(analysis: dict[str, Any], method: dict[str, Any], name: str) -> Table:
    """A method's tokens by one property."""
    of_property = method["by"][name]
    rows = []
    for cell in of_property["cells"]:
        row = [cell["label"], f"{cell['tokens']:,}", _nats(cell["gain"]), interval(cell["gain"])]
        rows.append([*row, *_helped_and_hurt(cell), _share(cell["share_of_gain"])])
    title = of_property["title"]
    title = title[0].upper() + title[1:]
    if len(analysis["methods"]) > 1:
        title = f"{title}: {method['name']}"
    return Table(title, ["", "tokens", *FIGURES, "of all gain"], rows)


def leakage_table(analysis: dict[str, Any], method: dict[str, Any]) -> Table:
    """A method's perplexity by how much of the text stands in the datastore."""
    of_method = method["leakage"]
    rows = [
        [
            cell["label"],
            f"{cell['tokens']:,}",
            _share(cell["share"]),
            *_with_limits(cell["lm_perplexity"]),
            *_with_limits(cell["perplexity"]),
        ]
        for cell in [*of_method["below"], *of_method["cells"]]
    ]
    title = "Perplexity by overlap with the datastore"
    if len(analysis["methods"]) > 1:
        title = f"{title}: {method['name']}"
    header = ["overlap", "tokens", "share", "of the LM", "its interval", "perplexity", "interval"]
    note = f"{_share(of_method['share_in_runs'])} of the tokens stand there within runs of {of_method['run']} or more."
    return Table(title, header, rows, [note])


def interval(figure: Figure) -> str:
    """Its limits; empty where there are none."""
    if figure is None or figure["low"] is None:
        return ""
    return f"[{_signed(figure['low'])}, {_signed(figure['high'])}]"


def counted(number: int, what: str) -> str:
    """Such as "1 document" or "2,000 documents"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _helped_and_hurt(cell: dict[str, Any]) -> list[str]:
    return [
        _share(cell["helped"] and cell["helped"]["mean"]),
        _nats(cell["gain_of_helped"]),
        _share(cell["hurt"] and cell["hurt"]["mean"]),
        _nats(cell["gain_of_hurt"]),
    ]


def _nats(figure: Figure) -> str:
    return "" if figure is None else _signed(figure["mean"])


def _with_limits(figure: Figure) -> list[str]:
    """A perplexity and its interval."""
    if figure is None:
        return ["", ""]
    limits = "" if figure["low"] is None else f"[{_number(figure['low'])}, {_number(figure['high'])}]"
    return [_number(figure["mean"]), limits]


def _signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}".replace("-", "−")


def _number(number: float | None) -> str:
    return "inf" if number is None else f"{number:,.3f}"
