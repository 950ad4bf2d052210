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

from knn_lm_eval.cli.arguments import add_model_arguments, add_timing_arguments, check_at_least_one, read_model_args
from knn_lm_eval.cli.main import verb
from knn_lm_eval.errors import UserError

MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
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
    model_args = read_model_args(arguments)

    from knn_lm_eval.make.text import read_text_file
    from knn_lm_eval.study.speed import SEARCH, SpeedComparison

    text = "".join(read_text_file(arguments.text))
    if not text:
        raise UserError(f"{arguments.text} is empty: there is nothing to score.")
    comparison = SpeedComparison(
        model_args,
        text,
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
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


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
    from knn_lm_eval.study.speed import ratios, retrieval_seconds

    tokens, seconds = report["tokens"], report["seconds"]
    print(
        f"{tokens:,} tokens in windows of {report['windows']}, batches of {report['batch_size']}; "
        f"{report['entries']:,} entries, {report['index']}, "
        + ", ".join(f"{name}={report['settings'][name]}" for name in ("k", "lmbda", "knn_temp", "probe"))
    )
    print(f"\n{'':28}{'CPU s' if report['cpu_time'] else 'seconds':>9}{'tokens/s':>10}{'perplexity':>12}{'saved':>8}")
    for name, values in seconds.items():
        median = statistics.median(values)
        perplexity, saved = report["perplexity"][name], report["saved_searches"][name]
        shown = "-" if perplexity is None else f"{perplexity:.4f}"
        print(f"{name:28}{median:9.2f}{tokens / median:10.0f}{shown:>12}{'' if saved is None else f'{saved:8.4f}'}")

    print("\nratios, median of the rounds (least to greatest)")
    for name, values in ratios(report).items():
        print(f"{name:60}{statistics.median(values):8.3f}   ({min(values):.3f} to {max(values):.3f})")

    retrieval = retrieval_seconds(report)
    stages = list(dict.fromkeys(stage for parts in report["stages"].values() for stage in parts[0]))
    print(f"\n{'ms a token by stage':20}" + "".join(f"{stage:>11}" for stage in [*stages, "retrieval"]))
    for name, parts in report["stages"].items():
        figures = [statistics.median(part.get(stage, 0.0) for part in parts) for stage in stages]
        figures.append(statistics.median(retrieval[name]))
        print(f"{name:20}" + "".join(f"{1000 * figure / tokens:11.4f}" for figure in figures))

    if memory := {name: figures for name, figures in report.get("memory", {}).items() if figures}:
        print(f"\n{'resident MiB':28}{'loaded':>9}{'peak':>10}{'difference':>12}{'of it mapped files':>20}")
        for name, figures in memory.items():
            loaded, peak = figures["loaded"], figures["peak"]
            numbers = [f"{x / MIB:.0f}" for x in (loaded, peak, peak - loaded, figures["newly mapped"])]
            print(f"{name:28}{numbers[0]:>9}{numbers[1]:>10}{numbers[2]:>12}{numbers[3]:>20}")
