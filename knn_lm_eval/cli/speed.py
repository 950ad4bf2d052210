"""Time and memory of knn-hf beside lm-eval's hf, a bare faiss search and knn-transformers, in one run.

With retomaton=True, RetoMaton is timed beside kNN-LM, here and in the published code.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from knn_lm_eval.cli.arguments import (
    add_model_arguments,
    add_timing_arguments,
    check_at_least_one,
    check_outputs,
    read_model_args,
    read_text,
)
from knn_lm_eval.cli.main import verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

MIB = 2**20

EXAMPLE = "knn-lm-eval speed --model_args datastore=stores/law --text test.txt --tokens 4096"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(parser, "as for knn-hf: datastore=...,k=...,...", max_length="at most 1024")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file, scored as one stream")
    parser.add_argument("--tokens", type=int, help="score the first so many tokens (default: all)")
    add_timing_arguments(parser, "torch and faiss choose")
    parser.add_argument("--knn_transformers", type=Path, help="run the wrapper of this checkout, too")
    parser.add_argument("--no_memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    # For the processes that this one starts: measure one system's memory.
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    return parser.parse_args()


@verb(parse_arguments)
def main(arguments: argparse.Namespace) -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for path in filter(None, (arguments.text, arguments.knn_transformers)):
        if not path.exists():
            raise UserError(f"There is no {path}.")
    check_at_least_one(arguments, "tokens", "repeats", "threads")
    check_outputs(arguments.json)
    model_args = read_model_args(arguments)

    from knn_lm_eval.study.speed import SEARCH, SpeedComparison
    from knn_lm_eval.system.files import check_writable, disk_errors_in, write_json

    if arguments.json:
        check_writable(arguments.json)

    comparison = SpeedComparison(
        model_args,
        read_text(arguments.text),
        tokens=arguments.tokens,
        threads=arguments.threads,
        cpu_time=arguments.cpu_time,
        checkout=arguments.knn_transformers,
    )
    if arguments.memory_of:
        print(json.dumps(comparison.memory(arguments.memory_of)))
        return
    report = comparison.times(arguments.repeats)
    if not arguments.no_memory:
        report["memory"] = {name: memory_of(name) for name in report["seconds"] if name != SEARCH}
    print_report(report)
    if arguments.json:
        with disk_errors_in(arguments.json.parent):
            write_json(arguments.json, report)


def memory_of(name: str) -> dict[str, int] | None:
    """One system's memory, measured in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        print("Peak memory is left out: it is measured on Linux only.", file=sys.stderr)
        return None
    command = [sys.executable, "-m", "knn_lm_eval.cli", "speed", *sys.argv[1:], "--memory_of", name]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def print_report(report: dict[str, Any]) -> None:
    """Print the figures as tables."""
    from knn_lm_eval.report.tables import print_table
    from knn_lm_eval.study.speed import ratios, retrieval_seconds

    tokens, seconds = report["tokens"], report["seconds"]
    print(
        f"{tokens:,} tokens in windows of {report['windows']}, batches of {report['batch_size']}; "
        f"{report['entries']:,} entries, {report['index']}, "
        + ", ".join(f"{name}={report['settings'][name]}" for name in ("k", "lmbda", "knn_temp", "probe"))
        + "\n"
    )
    unit = "CPU s" if report["cpu_time"] else "seconds"
    systems = {"": "", unit: ".2f", "tokens/s": ".0f", "perplexity": ".4f", "saved": ".4f"}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print_table(
        "",
        systems,
        [
            [name, median, tokens / median, report["perplexity"][name], report["saved_searches"][name]]
            for name, median in medians.items()
        ],
    )
    print()
    compared = [[name, statistics.median(some), min(some), max(some)] for name, some in ratios(report).items()]
    print_table("", {"ratios of the rounds": "", "median": ".3f", "least": ".3f", "greatest": ".3f"}, compared)
    print()
    print_stages(report["stages"], retrieval_seconds(report), tokens)
    if memory := {name: figures for name, figures in report.get("memory", {}).items() if figures}:
        print()
        resident = {
            "resident MiB": "",
            "loaded": ".0f",
            "peak": ".0f",
            "difference": ".0f",
            "of it mapped files": ".0f",
        }
        print_table("", resident, [[name, *in_mib(figures)] for name, figures in memory.items()])


def print_stages(stages: dict[str, list[dict[str, float]]], retrieval: dict[str, list[float]], tokens: int) -> None:
    """Print what the stages of our systems take of a token's time."""
    from knn_lm_eval.report.tables import print_table

    names = list(dict.fromkeys(stage for rounds in stages.values() for stage in rounds[0]))
    rows = []
    for system, rounds in stages.items():
        medians = [statistics.median(one.get(stage, 0.0) for one in rounds) for stage in names]
        medians.append(statistics.median(retrieval[system]))
        rows.append([system, *(1000 * seconds / tokens for seconds in medians)])
    print_table("", {"ms a token by stage": "", **dict.fromkeys([*names, "retrieval"], ".4f")}, rows)


def in_mib(figures: dict[str, int]) -> list[float]:
    """Loaded, peak, the difference, and of it mapped files."""
    loaded, peak = figures["loaded"], figures["peak"]
    return [number / MIB for number in (loaded, peak, peak - loaded, figures["newly mapped"])]
