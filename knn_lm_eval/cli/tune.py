"""Find the best k, temperature and lmbda (and probe, min_knns, max_knns), from one pass over a validation text."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_lm_eval.errors import UserError, report_user_errors

if TYPE_CHECKING:
    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.study.tuning import AdaptiveFit, Best, Grid, Surface, TuningScorer

GRID_HELP = "numbers separated by commas, or FIRST:LAST:COUNT (default: %(default)s)"
TUNED = ("params", "k", "lmbda", "knn_temp")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_args", required=True, help="as for lm_eval --model knn-hf: pretrained=M,datastore=D")
    parser.add_argument("--tasks", required=True, help="perplexity tasks on a validation split, separated by commas")
    parser.add_argument("--output", type=Path, required=True, help="the params file (.json); CSV and plots beside it")
    parser.add_argument("--k", help="numbers separated by commas (default: 16,64,256,1024 as far as the store has)")
    parser.add_argument("--knn_temp", default="0.25:256:21", help=GRID_HELP + ", a constant factor apart")
    parser.add_argument("--lmbda", default="0.02:0.98:25", help=GRID_HELP + ", evenly spaced")
    parser.add_argument("--probe", help="a search for each (default: the index's own)")
    parser.add_argument("--min_knns", help="with retomaton=True in --model_args")
    parser.add_argument("--max_knns", help="with retomaton=True in --model_args")
    parser.add_argument(
        "--adaptive",
        choices=["none", "buckets", "gate"],
        default="none",
        help="an lmbda per token: by nearest distance, or by a small network over LM and neighbours",
    )
    parser.add_argument(
        "--saved_searches",
        type=float,
        default=0.0,
        help="the fraction of searches to do without: by a gate's threshold, or by RetoMaton's min_knns",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --adaptive (default: %(default)s)")
    parser.add_argument("--save_default", action="store_true", help="keep the result in the datastore, for all to use")
    parser.add_argument("--allow_test", action="store_true", help="tune on a test split all the same")
    parser.add_argument("--metadata", default="", help="as for lm_eval, such as data_dir=FOLDER")
    parser.add_argument("--limit", type=float, help="as for lm_eval: documents per task")
    parser.add_argument("--batch_size", default="4")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report_user_errors()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")

    import lm_eval
    import numpy as np
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import simple_parse_args_string

    from knn_lm_eval.model.knn_hf import KNNHF
    from knn_lm_eval.model.params import STORE_DEFAULT
    from knn_lm_eval.report.plots import draw_grid
    from knn_lm_eval.study.tuning import TuningScorer, find_best, fit_adaptive, on_edges

    model_args = simple_parse_args_string(arguments.model_args)
    if given := [name for name in TUNED if name in model_args]:
        raise UserError(f"{given[0]} is what tune looks for: leave it out of --model_args (--k sets a grid).")
    if model_args.get("carry_state"):
        raise UserError("carry_state=True cannot be tuned with: leave it out of --model_args.")
    check(arguments, bool(model_args.get("retomaton")))
    grid = read_grid(arguments, model_args)
    manager = TaskManager(metadata=model_args | simple_parse_args_string(arguments.metadata))
    tasks = load_tasks(arguments, manager)

    # Any lmbda and temperature will do; they are given so that no saved default counts.
    lm = KNNHF(**{"batch_size": arguments.batch_size} | model_args, k=grid.k[-1], lmbda=0.5, knn_temp=1.0, params=False)
    scorer = TuningScorer(lm, grid, None if arguments.adaptive == "none" else arguments.seed)
    lm.scorer = scorer
    lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        limit=arguments.limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    best = find_best(scorer.surfaces, scorer.tokens, arguments.saved_searches)
    fit = None
    if scorer.sample is not None:
        number = next(i for i, surface in enumerate(scorer.surfaces) if surface is best.surface)
        fit = fit_adaptive(scorer.sample, best, number, arguments.adaptive, arguments.saved_searches, arguments.seed)
    params = make_params(lm, scorer, best, fit, arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_grid(arguments.output.with_suffix(".csv"), scorer)
    surface = best.surface
    axes = {"knn_temp": surface.knn_temp, "k": surface.k, "lmbda": surface.lmbda}
    draw_grid(arguments.output, arguments.tasks, np.exp(-surface.log_prob / scorer.tokens), axes, best.place)
    params.write(arguments.output)
    if arguments.save_default:
        params.write(lm.retriever.datastore.path / STORE_DEFAULT)
    print_results(scorer, best, fit)
    print(f"Wrote {arguments.output}: use it with params={arguments.output} in --model_args.")
    if arguments.save_default:
        print(f"The datastore {lm.retriever.datastore.path} has it as its default.")
    if edges := on_edges(best, scorer.surfaces, len(lm.retriever.datastore)):
        logging.warning(
            "The best setting lies on the grid's edge, and a better one may lie beyond: widen %s.",
            ", ".join(f"--{name} ({best.settings[name]:g})" for name in edges),
        )


def check(arguments: argparse.Namespace, retomaton: bool) -> None:
    """Raise UserError where arguments do not fit together."""
    if arguments.output.suffix != ".json":
        raise UserError(f"--output {arguments.output} should end in .json; CSV and plots are written beside it.")
    for name in ("min_knns", "max_knns"):
        if getattr(arguments, name) and not retomaton:
            raise UserError(f"--{name} is for RetoMaton: add retomaton=True to --model_args.")
    if retomaton and arguments.probe:
        raise UserError("--probe is tuned for kNN-LM; give RetoMaton its probe in --model_args.")
    if arguments.limit is not None and not arguments.limit > 0:
        raise UserError(f"--limit {arguments.limit:g} must be above 0.")
    if not 0 <= arguments.saved_searches < 1:
        raise UserError(f"--saved_searches {arguments.saved_searches:g} must be at least 0 and below 1.")
    if arguments.saved_searches and not retomaton and arguments.adaptive != "gate":
        raise UserError("--saved_searches needs --adaptive gate, or retomaton=True in --model_args.")
    if arguments.saved_searches and retomaton and arguments.adaptive == "gate":
        raise UserError("--saved_searches is for a gate or for RetoMaton, not for both together.")


def read_grid(arguments: argparse.Namespace, model_args: dict[str, Any]) -> Grid:
    """The grid that the arguments ask for; the datastore limits k."""
    from knn_lm_eval.model.opening import find_datastore
    from knn_lm_eval.study.tuning import Grid, parse_axis

    entries = len(find_datastore(model_args.get("datastore")))
    default_k = ",".join(map(str, sorted({min(k, entries) for k in (16, 64, 256, 1024)})))
    walks: dict[str, Any] = {}
    if arguments.probe:
        walks["probe"] = parse_axis("probe", arguments.probe, low=1, whole=True)
    if arguments.min_knns:
        walks["min_knns"] = parse_axis("min_knns", arguments.min_knns, low=0)
    if arguments.max_knns:
        walks["max_knns"] = parse_axis("max_knns", arguments.max_knns, low=1, whole=True)
    # RetoMaton walks anew for each k: one by default.
    if model_args.get("retomaton"):
        default_k = default_k.rpartition(",")[2]
    return Grid(
        k=parse_axis("k", arguments.k or default_k, low=1, high=entries, whole=True),
        knn_temp=parse_axis("knn_temp", arguments.knn_temp, low=1e-6, high=1e9),
        lmbda=parse_axis("lmbda", arguments.lmbda, low=0.0, high=0.999),
        **walks,
    )


def load_tasks(arguments: argparse.Namespace, manager: Any) -> list[Any]:
    """The tasks, none of which is scored on its test split unless that is allowed."""
    tasks: list[Any] = []
    for name in arguments.tasks.split(","):
        if name not in manager.all_subtasks:
            raise UserError(f"There is no task called {name!r}; `lm_eval ls tasks` lists them.")
        task = manager.load([name])["tasks"][name]
        if task.OUTPUT_TYPE != "loglikelihood_rolling":
            raise UserError(f"{name} is no perplexity task: tune on one that is, such as wikitext103_valid.")
        if task.has_test_docs() and not arguments.allow_test:
            other = f"{name}_valid"
            advice = f"such as {other}" if other in manager.all_subtasks else "such as wikitext103_valid"
            raise UserError(
                f"{name} is scored on its test split, and what is tuned there says nothing about new text: tune on "
                f"another, {advice}, or force it with --allow_test."
            )
        tasks.append(task)
    return tasks


def make_params(
    lm: KNNHF, scorer: TuningScorer, best: Best, fit: AdaptiveFit | None, arguments: argparse.Namespace
) -> Any:
    """The params file's content."""
    from knn_lm_eval.model.params import CONDITIONS, Params

    store = lm.retriever.datastore
    settings = {name: value for name, value in best.settings.items() if value is not None}
    result = {"token_perplexity": perplexity(best.log_prob, scorer.tokens)}
    if fit is not None:
        settings |= {"lmbda": fit.lmbda.plain(), "knn_temp": fit.knn_temp}
        result = {
            "token_perplexity": math.exp(-fit.log_prob),
            "constant_token_perplexity": math.exp(-fit.constant_log_prob),
            "sampled_tokens": fit.tokens,
        }
    return Params(
        settings,
        {
            "datastore": store.path.name,
            "keys_sha256": store.keys_checksum,
            "model": store.manifest.model["pretrained"],
            "conditions": {name: lm.settings[name] for name in CONDITIONS if name in lm.settings},
            "tasks": arguments.tasks.split(","),
            "limit": arguments.limit,
            "context_len": lm.context_len,
            "max_length": lm.max_length,
            "tokens": scorer.tokens,
            "seed": arguments.seed,
            "base_token_perplexity": perplexity(scorer.base_log_prob, scorer.tokens),
            **result,
        },
    )


def perplexity(log_prob: float, tokens: int) -> float:
    return math.exp(-log_prob / tokens)


def row(settings: dict[str, Any], log_prob: float, surface: Surface, tokens: int) -> dict[str, Any]:
    """A line of the table and of the CSV file."""
    # repr: all digits that there are, so that rows may be compared with separate evaluations.
    saved = {"saved_searches": round(1 - surface.searches / tokens, 4)} if "min_knns" in surface.fixed else {}
    return settings | {"token_perplexity": perplexity(log_prob, tokens)} | saved


def write_grid(path: Path, scorer: TuningScorer) -> None:
    """All settings and their perplexities, as CSV."""
    rows = [
        row(settings, log_prob, surface, scorer.tokens)
        for surface in scorer.surfaces
        for settings, log_prob in surface.settings()
    ]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def print_results(scorer: TuningScorer, best: Best, fit: AdaptiveFit | None) -> None:
    """A table of the LM alone, the papers' defaults and the best setting, and what the grid cost."""
    tokens = scorer.tokens
    rows: list[dict[str, Any]] = [
        {"": "LM alone", "token_perplexity": perplexity(scorer.base_log_prob, tokens)},
    ]
    defaults = scorer.defaults
    if defaults.log_prob.any():  # where the grid's searches or walks have them
        settings, log_prob = next(defaults.settings())
        rows.append({"": "defaults"} | row(settings, log_prob, defaults, tokens))
    rows.append({"": "best"} | row(best.settings, best.log_prob, best.surface, tokens))
    if fit is not None:
        kind = fit.lmbda.plain()["kind"]
        settings = best.settings | {"knn_temp": fit.knn_temp, "lmbda": kind}
        rows.append({"": kind} | settings | {"token_perplexity": math.exp(-fit.log_prob)})
        if fit.saved_searches:
            rows[-1]["saved_searches"] = round(fit.saved_searches, 4)
    columns = list(dict.fromkeys(name for line in rows for name in line))
    columns.sort(key=lambda name: name in ("token_perplexity", "saved_searches"))
    table = [columns, *([shown(line.get(name)) for name in columns] for line in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    if fit is not None and fit.tokens < tokens:
        print(
            f"({kind}: on a sample of {fit.tokens:,} tokens, on which the best constant has "
            f"{math.exp(-fit.constant_log_prob):.4f})"
        )
    seconds = scorer.seconds
    count = sum(surface.log_prob.size for surface in scorer.surfaces)
    once = sum(seconds[stage] for stage in ("forward", "head", "search", "walk"))
    print(
        f"{tokens:,} tokens, {count:,} settings: {seconds['grid']:.1f} s for the grid, {once:.1f} s for all else "
        f"({', '.join(f'{stage} {seconds[stage]:.1f}' for stage in ('forward', 'head', 'search', 'walk'))})"
    )


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) and value % 1 else f"{value}"
