"""Draw perplexity against the datastore's size, from one forward pass and one search per text."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from knn_lm_eval.errors import UserError, report_user_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_args", required=True, help="as for lm_eval --model knn-hf: datastore=D,lmbda=0.25,...")
    parser.add_argument("--tasks", required=True, help="perplexity tasks, separated by commas")
    parser.add_argument("--fractions", default="0.01,0.03,0.1,0.3,1", help="parts of the store (default: %(default)s)")
    parser.add_argument(
        "--searched",
        type=int,
        help="neighbours that the one search finds, of which a part keeps at most k (default: 4 k)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of entries (default: %(default)s)")
    parser.add_argument("--metadata", default="", help="as for lm_eval, such as data_dir=FOLDER")
    parser.add_argument("--limit", type=float, help="as for lm_eval: documents per task")
    parser.add_argument("--batch_size", default="4")
    parser.add_argument("--output", type=Path, required=True, help="the folder for a JSON file per task")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report_user_errors()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        fractions = [float(number) for number in arguments.fractions.split(",")]
    except ValueError as error:
        raise UserError(f"--fractions {arguments.fractions} should be numbers separated by commas.") from error

    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import simple_parse_args_string

    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.study.store_sizes import StoreSizeScorer
    from knn_lm_eval.system.files import write_json

    model_args = simple_parse_args_string(arguments.model_args)
    lm = KNNHF(**{"batch_size": arguments.batch_size} | model_args)
    k = int(lm.settings["k"])
    searched = min(arguments.searched or 4 * k, len(lm.retriever.datastore))
    if searched < k:
        raise UserError(f"--searched {searched} is less than k={k}.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    manager = TaskManager(metadata=model_args | simple_parse_args_string(arguments.metadata))
    for task in arguments.tasks.split(","):
        scorer = StoreSizeScorer(lm, k, fractions, arguments.seed, searched)
        lm.scorer = scorer
        lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            limit=arguments.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        rows = [
            {
                "fraction": point.fraction,
                "entries": point.entries,
                "token_perplexity": round(point.perplexity, 4),
                "mean_neighbours": round(point.neighbours / point.tokens, 1),
                "tokens": point.tokens,
            }
            for point in scorer.points
        ]
        settings = lm.settings | {"limit": arguments.limit, "searched": searched, "seed": arguments.seed}
        write_json(arguments.output / f"{task}.json", {"task": task, "settings": settings, "store_sizes": rows})
        print(f"{task}: {'entries':>12}  token_perplexity  neighbours")
        for row in rows:
            print(
                f"{'':{len(task)}}  {row['entries']:>12,}  {row['token_perplexity']:>16}  {row['mean_neighbours']:>10}"
            )
