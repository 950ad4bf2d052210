"""Compare a datastore's indexes by speed, size, p_kNN and perplexity, at several probes and k, on real text."""

from __future__ import annotations

import argparse
import csv
import logging
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from knn_lm_eval.errors import UserError, report_user_errors

if TYPE_CHECKING:
    from knn_lm_eval.study.index_comparison import Measurement


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_args", required=True, help="as for knn-hf: datastore=...,lmbda=...,knn_temp=...")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files, a domain each, say")
    parser.add_argument("--tokens", type=int, help="score the first so many tokens of each text (default: all)")
    parser.add_argument(
        "--indexes",
        nargs="+",
        required=True,
        metavar="NAME[:PROBE,...]",
        help="the datastore's indexes to compare, each with the probes to try (default: its own)",
    )
    parser.add_argument("--k", default="1024", help="numbers of neighbours, separated by commas (default: 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after a warm-up (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what faiss chooses)")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count CPU seconds on one thread, not the clock's: for a machine on which other programs run",
    )
    parser.add_argument("--max_length", type=int, help="tokens per window (default: at most 1024)")
    parser.add_argument("--batch_size", type=int, default=4, help="windows per batch (default: 4)")
    parser.add_argument("--output", type=Path, required=True, help="the folder for CSV, JSON, PNG and SVG")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report_user_errors()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for path in arguments.text:
        if not path.is_file():
            raise UserError(f"There is no text file {path}.")
    for name in ("tokens", "repeats", "threads", "max_length", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1.")
    ks = parse_numbers(arguments.k, "--k")
    wanted: list[tuple[str, list[int | None]]] = []
    for text in arguments.indexes:
        name, _, probes = text.partition(":")
        wanted.append((name, list(parse_numbers(probes, f"--indexes {name}:")) if probes else [None]))

    import faiss
    from lm_eval.utils import simple_parse_args_string

    from knn_lm_eval.make.text import read_text_file
    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.report.plots import draw_indexes
    from knn_lm_eval.search.retriever import LocalRetriever, Retriever
    from knn_lm_eval.study.index_comparison import IndexComparison, collect_queries, efficient
    from knn_lm_eval.system.files import write_json

    model_args = {"index": wanted[0][0]} | simple_parse_args_string(arguments.model_args)
    lm = KNNHF(**model_args, batch_size=arguments.batch_size, max_length=arguments.max_length)
    if arguments.max_length is None:
        lm._max_length = min(lm.max_length, 1024)
    if not isinstance(lm.settings["lmbda"], float):
        raise UserError("Indexes are compared with one lmbda for all tokens: give lmbda=NUMBER in --model_args.")
    store, own = lm.retriever.datastore, lm.retriever
    texts = {}
    for path in arguments.text:
        text = "".join(read_text_file(path))
        ids = lm.tok_encode(text)
        if not ids:
            raise UserError(f"{path} is empty: there is nothing to score.")
        texts[path.stem] = text if not arguments.tokens else lm.tokenizer.decode(ids[: arguments.tokens])
    trials: list[Retriever] = []
    for name, probes in wanted:
        retriever = LocalRetriever(store, max(ks), None, own.sim_func, own.recompute_dists, own.settings.gpu, name)
        for probe in probes:
            with_probe = retriever.with_settings(probe=probe)
            trials += [with_probe.with_settings(k=k) for k in ks]
    threads = 1 if arguments.cpu_time else arguments.threads
    if threads:
        faiss.omp_set_num_threads(threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    comparison = IndexComparison(
        store,
        collect_queries(lm, texts),
        lmbda=lm.settings["lmbda"],
        knn_temp=lm.settings["knn_temp"],
        sim_func=own.sim_func,
        max_k=max(ks),
        cache=arguments.output,
    )
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows = list(comparison.measure(trials, arguments.repeats, clock))
    exact = [comparison.exact(k) for k in ks]
    front = efficient(rows)
    settings = {
        "entries": len(store),
        "tokens": comparison.queries.texts,
        "lmbda": lm.settings["lmbda"],
        "knn_temp": lm.settings["knn_temp"],
        "recompute_dists": own.recompute_dists,
        "threads": faiss.omp_get_max_threads(),
        "cpu_time": arguments.cpu_time,
        "base_perplexity": comparison.base_perplexity,
    }
    table = [row.row() | {"efficient": row in front} for row in rows + exact]
    write_json(arguments.output / "indexes.json", {"settings": settings, "indexes": table})
    with open(arguments.output / "indexes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    print_table(rows, exact, front, settings)
    draw_indexes(arguments.output / "indexes", table[: len(rows)], table[len(rows) :], len(store))


def parse_numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers separated by commas."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text} should be whole numbers separated by commas.") from error
    if min(numbers) < 1:
        raise UserError(f"{option} {text}: each must be at least 1.")
    return numbers


def print_table(rows: list[Measurement], exact: list[Measurement], front: list[Measurement], settings: dict) -> None:
    """Print the measurements, marking those that no other beats in both speed and perplexity."""
    unit = "CPU us" if settings["cpu_time"] else "us"
    print(f"{settings['entries']:,} entries, tokens of {settings['tokens']}, lmbda={settings['lmbda']:g}")
    print("base LM: " + ", ".join(f"{name} {value:.4f}" for name, value in settings["base_perplexity"].items()))
    width = max(len(row.index) for row in rows + exact)
    print(
        f"  {'index':{width}}  bytes  probe     k  {unit + '/query':>12}  recall  p_kNN error  "
        + "  ".join(f"{name:>9}" for name in [*rows[0].perplexity, "tuned"])
    )
    for row in sorted(rows, key=lambda row: median(row.microseconds)) + exact:
        mark = "*" if row in front else " "
        print(
            f"{mark} {row.index:{width}}  {row.bytes_per_entry:5.0f}  {row.probe or '-':>5}  {row.k:>4}"
            f"  {median(row.microseconds):12.0f}  {row.recall:6.3f}  {row.p_knn_error:11.5f}  "
            + "  ".join(f"{value:9.4f}" for value in [*row.perplexity.values(), row.tuned])
            + f"  (T {row.knn_temp:g}, lmbda {row.lmbda:g})"
        )
    print("tuned: over all texts, at the best temperature and lmbda; * no other is as fast with a lower one")
