"""Show the neighbours behind each token of a text: in the terminal, or as an HTML page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from knn_lm_eval.cli.arguments import add_model_arguments, check_at_least_one, check_outputs, read_model_args
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from knn_lm_eval.report.tokens import InspectedToken

NEIGHBOURS = "neighbours: weight, distance, context and value"  # the last column
CONTEXT_SHOWN = 60  # characters of a context, on the terminal

EXAMPLE = (
    "knn-lm-eval inspect_neighbours --model_args datastore=stores/law --text 'Member States shall adopt "
    "the measures' --html page.html"
)


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(parser, "as for lm_eval --model knn-hf: datastore=D,k=1024,...", batches=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text")
    source.add_argument("--file", type=Path, help="a UTF-8 text file")
    parser.add_argument("--neighbours", type=int, default=5, help="neighbours shown per token (default: 5)")
    parser.add_argument("--context", type=int, default=16, help="tokens shown before a neighbour (default: 16)")
    parser.add_argument("--html", type=Path, help="write a page to this file instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file instead; compare --report shows them")
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    check_at_least_one(arguments, "neighbours", "context")
    check_outputs(arguments.html, arguments.json)

    from knn_lm_eval.make.text import read_text_file

    text = "".join(read_text_file(arguments.file)) if arguments.file else arguments.text
    if not text:
        raise UserError("The text is empty: there is nothing to inspect.")
    model_args = read_model_args(arguments)

    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.report.token_page import token_page
    from knn_lm_eval.study.inspection import inspect_text
    from knn_lm_eval.system.files import check_writable, disk_errors_in, write_text

    for path in filter(None, (arguments.html, arguments.json)):
        check_writable(path)
    lm = KNNHF(**model_args)
    tokens = inspect_text(lm, text, num_neighbours=arguments.neighbours, context_tokens=arguments.context)
    if arguments.html is None and arguments.json is None:
        print_tokens(tokens)
        return
    names = ["k", "lmbda", "knn_temp", "probe", *(("min_knns", "clusters") if "retomaton" in lm.settings else ())]
    shown = {name: lm.settings[name] for name in names if lm.settings[name] is not None}
    if isinstance(shown["lmbda"], dict):  # an adaptive one has hundreds of numbers
        shown["lmbda"] = shown["lmbda"]["kind"]
    settings = f"{lm.retriever.datastore.name}: " + ", ".join(f"{name}={value}" for name, value in shown.items())
    written = {
        arguments.html: lambda: token_page(tokens, "Neighbours of a text", settings),
        arguments.json: lambda: json.dumps({"settings": settings, "tokens": [asdict(token) for token in tokens]}),
    }
    for path, make in written.items():
        if path is not None:
            with disk_errors_in(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, make())
            print(f"Wrote {path}.")


def print_tokens(tokens: Sequence[InspectedToken]) -> None:
    """Print a table: a line per token, and in its last column one per neighbour."""
    from rich.text import Text

    from knn_lm_eval.report.tables import print_table

    columns = {"token": "", "p LM": ".4f", "p kNN": ".4f", "mixture": ".4f", "gain": "+.2f", NEIGHBOURS: ""}
    rows = []
    for token in tokens:
        gain = Text(f"{token.gain:+.2f}", style="green" if token.gain > 0 else "red")
        rows.append([repr(token.text), token.p_lm, token.p_knn, token.p, gain, neighbour_lines(token)])
    print_table("", columns, rows)


def neighbour_lines(token: InspectedToken) -> Text:
    """A line per neighbour: its weight, distance, the end of its context, and its value."""
    from rich.text import Text

    from knn_lm_eval.report.tables import visible

    lines = Text("" if token.searched else "(no search)", style="dim")
    for neighbour in token.neighbours:
        lines.append("\n" if len(lines) else "")
        lines.append(f"{neighbour.weight:.3f} {neighbour.distance:9.1f}  ", style="cyan")
        lines.append(visible(neighbour.context)[-CONTEXT_SHOWN:], style="dim")
        lines.append(visible(neighbour.value), style="bold")
    return lines
