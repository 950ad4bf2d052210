"""Evaluate a matrix of models, datastores, methods and tasks, written in a YAML file; finished cells are skipped."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from knn_lm_eval.cli.arguments import check_at_least_one
from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError, printable

if TYPE_CHECKING:
    from knn_lm_eval.benchmark.estimate import Estimate
    from knn_lm_eval.benchmark.runner import Outcome

EXAMPLE = "knn-lm-eval benchmark law.yaml --dry_run"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument("matrix", type=Path, help="the YAML file (the README shows one)")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, with time and memory, and stop")
    parser.add_argument(
        "--cells", metavar="I/N", help="only the I-th of N shares of the cells, such as 3/16: for array jobs"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run the cells as tasks of this Ray cluster (auto, or HOST:PORT)"
    )
    parser.add_argument(
        "--workers", type=int, help="with --ray, tasks side by side (default: one for each GPU, else for each node)"
    )
    parser.add_argument("--verbose", action="store_true", help="tracebacks of cells that fail")
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:
    if arguments.verbose:
        logging.getLogger("knn_lm_eval").setLevel(logging.DEBUG)

    if arguments.workers is not None and arguments.ray is None:
        raise UserError("--workers is for --ray; without it, --cells shares the cells among several commands.")
    check_at_least_one(arguments, "workers")

    from knn_lm_eval.benchmark.matrix import read_matrix
    from knn_lm_eval.benchmark.spreading import parse_share, passes, share_of

    share = None if arguments.cells is None else parse_share(arguments.cells)
    whole = read_matrix(arguments.matrix)
    matrix = whole if share is None else share_of(whole, share)
    if share is not None:
        print(f"Share {share}: {len(matrix.cells)} of {len(whole.cells)} cells.", flush=True)
    if arguments.dry_run:
        from knn_lm_eval.benchmark.estimate import estimate

        print_plan(estimate(matrix))
        if arguments.ray is not None:
            print(f"Over Ray: {len(passes(matrix.cells))} tasks, one for the cells of a model and a task.")
        return

    from knn_lm_eval.benchmark.runner import finished_results, run_matrix

    total, known = len(matrix.cells), 0

    def report(outcome: Outcome) -> None:
        nonlocal known
        known += 1
        print(f"[{known}/{total}] {outcome.cell}: {outcome.state}", flush=True)

    if arguments.ray is None:
        outcomes = run_matrix(matrix, report)
    else:
        from knn_lm_eval.benchmark.ray_cells import run_on_ray

        outcomes = run_on_ray(arguments.ray, matrix, report, arguments.workers)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    print(f"{total - len(failed)} of {total} cells are in {matrix.output}.")
    if share is not None:
        there = [cell for cell in whole.cells if finished_results(whole.output / cell.folder, cell.checksum())]
        print(f"Of all shares' cells, {len(there)} of {len(whole.cells)} are there.")
    for outcome in failed:
        kind = "" if isinstance(outcome.error, UserError) else f"{type(outcome.error).__name__}: "
        print(f"failed: {outcome.cell}: {kind}{printable(str(outcome.error))}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def print_plan(estimates: list[Estimate]) -> None:
    from knn_lm_eval.report.tables import print_table

    rows = []
    for one in estimates:
        tokens = None if one.state == "finished" else "?" if one.tokens_read is None else one.tokens_read
        memory = "?" if one.memory is None else size(one.memory)
        spent = None if one.state == "finished" else duration(one.seconds) + ("" if one.measured else " *")
        rows.append([str(one.cell), one.state, tokens, memory, spent])
    print_table("", {"cell": "", "state": "", "tokens": ",", "memory": ">", "time alone": ">"}, rows)
    todo = [one for one in estimates if one.state != "finished"]
    # The LM's pass over a task is shared: counted once it is the least, counted for each cell the most.
    known = [(one.seconds, one) for one in todo if one.seconds is not None]
    most = sum(seconds for seconds, _ in known)
    passes: dict[tuple[str, str], float] = {}
    for seconds, one in known:
        key = one.cell.model, one.cell.task
        passes[key] = max(seconds, passes.get(key, 0.0))
    unknown = f", without {len(todo) - len(known)} that cannot be estimated" if len(known) < len(todo) else ""
    print(
        f"{len(todo)} of {len(estimates)} cells to do: {duration(sum(passes.values()))} where cells share the "
        f"reading, {duration(most)} where none does{unknown}."
    )
    if any(not one.measured for _, one in known):
        print(
            "* from the LM's size and the speed of a matrix product here, without searches; "
            "finished cells of the same model and method make it better."
        )


def size(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB" if number < 2**30 else f"{number / 2**30:,.1f} GiB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
