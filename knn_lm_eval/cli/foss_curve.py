"""Draw perplexity against the fraction of saved searches (FoSS) for RetoMaton, from one forward pass per text."""

from __future__ import annotations

import argparse
import csv
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_lm_eval.errors import UserError, report_user_errors

if TYPE_CHECKING:
    from knn_lm_eval.study.foss_curve import CurvePoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_args", required=True, help="as for lm_eval --model knn-hf: pretrained=M,datastore=D")
    parser.add_argument("--tasks", required=True, help="perplexity tasks, separated by commas")
    parser.add_argument("--min_knns", default="1,8,64,256,1024,inf", help="the settings to walk with")
    parser.add_argument(
        "--clusters",
        help="clusterings to walk with, `none` for pointers alone (default: none and all that there are)",
    )
    parser.add_argument("--max_knns", type=int, default=1024)
    parser.add_argument("--duplicates", choices=["keep", "merge"], default="merge")
    parser.add_argument("--metadata", default="", help="as for lm_eval, such as data_dir=FOLDER")
    parser.add_argument("--limit", type=float, help="as for lm_eval: documents per task")
    parser.add_argument("--batch_size", default="4")
    parser.add_argument("--output", type=Path, required=True, help="the folder for CSV, JSON, PNG and SVG")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report_user_errors()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        min_knns = [float(number) for number in arguments.min_knns.split(",")]
    except ValueError as error:
        raise UserError(f"--min_knns {arguments.min_knns} should be numbers separated by commas.") from error

    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import simple_parse_args_string

    from knn_lm_eval.methods.automaton import AutomatonSettings
    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.report.plots import draw_foss_curve
    from knn_lm_eval.store.clusters import Clusters, cluster_names
    from knn_lm_eval.study.foss_curve import SweepScorer

    model_args = simple_parse_args_string(arguments.model_args)
    lm = KNNHF(**{"batch_size": arguments.batch_size} | model_args)
    store = lm.retriever.datastore
    names = arguments.clusters.split(",") if arguments.clusters else ["none", *cluster_names(store)]
    clusterings = [None if name == "none" else Clusters.open(store, name) for name in names]
    settings = AutomatonSettings(
        lm.settings["k"],
        lm.settings["knn_temp"],
        max_knns=arguments.max_knns,
        duplicates=arguments.duplicates,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    manager = TaskManager(metadata=model_args | simple_parse_args_string(arguments.metadata))
    for task in arguments.tasks.split(","):
        scorer = SweepScorer(lm, min_knns, clusterings, settings)
        lm.scorer = scorer
        lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            limit=arguments.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        rows = write(arguments.output / task, task, lm.settings | {"limit": arguments.limit}, scorer.points)
        draw_foss_curve(arguments.output / task, task, rows)


def write(path: Path, task: str, settings: dict[str, Any], points: list[CurvePoint]) -> list[dict[str, Any]]:
    """Print the table, write it as CSV and JSON, and return its rows."""
    rows = [
        {
            "method": point.method,
            "clusters": point.clusters or "",
            "min_knns": "" if point.min_knns is None else point.min_knns,
            "token_perplexity": round(point.perplexity, 4),
            "saved_searches": round(point.saved_searches, 4) if point.method != "base" else "",
            "mean_candidates": round(point.candidates / point.tokens, 1) if point.method == "retomaton" else "",
            "tokens": point.tokens,
        }
        for point in points
    ]
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(
        json.dumps({"task": task, "settings": settings, "points": rows}, indent=1) + "\n"
    )
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    return rows
