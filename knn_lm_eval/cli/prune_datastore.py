"""Make a smaller datastore of an existing one: at random, by the LM's confidence, or by merging near neighbours."""

from __future__ import annotations

import argparse

from knn_lm_eval.cli.arguments import add_datastore, add_memory, add_output, check_options, merge_model_args
from knn_lm_eval.cli.main import NOTHING_KEPT, SAME_COMMAND, WITH_RESUME, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError

# Which arguments go with which method; the functions know the defaults.
OPTIONS = {
    "random": ("keep", "seed"),
    "confidence": ("keep", "max_p", "model_args", "device"),
    "greedy_merge": ("neighbours", "index", "probe", "resume", "memory"),
}

EXAMPLE = "knn-lm-eval prune_datastore --datastore stores/law --method random --keep 0.5 --output stores/law-half"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE, argument_default=argparse.SUPPRESS)
    add_datastore(parser, "; it stays as it is")
    add_output(parser, "the new datastore's folder")
    parser.add_argument(
        "--method",
        choices=list(OPTIONS),
        required=True,
        help="leave out entries at random, or those whose token the LM predicts best by itself, or merge near "
        "neighbours of the same token into one that counts as often",
    )
    parser.add_argument("--keep", type=float, help="random, confidence: the share of the entries to keep, such as 0.5")
    parser.add_argument(
        "--max_p", type=float, help="confidence: instead of --keep, the LM's largest probability to keep, such as 0.9"
    )
    parser.add_argument("--seed", type=int, help="random: of the choice (default: 0)")
    parser.add_argument(
        "--model_args",
        help="confidence: as for dump_datastore (default: what the datastore's manifest says). The LM reads the "
        "store's text once, and its probabilities are kept in the store's folder",
    )
    parser.add_argument("--device", help="confidence: cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--neighbours",
        type=int,
        help="greedy_merge: neighbours that an entry may absorb, which decides how many stay (default: 9)",
    )
    parser.add_argument("--index", help="greedy_merge: the index to search for them (default: index)")
    parser.add_argument(
        "--probe", type=int, help="greedy_merge: inverted lists visited per search (default: the index's)"
    )
    add_memory(parser, "greedy_merge, with its index,", "what it takes")
    parser.add_argument("--resume", action="store_true", help="greedy_merge: go on with interrupted searches")
    return parser.parse_args()


# What an interrupted run leaves: the LM's probabilities in the store, or the searches beside the output.
KEPT = {"random": NOTHING_KEPT, "confidence": SAME_COMMAND, "greedy_merge": WITH_RESUME}


@verb(parse_arguments, kept=lambda arguments: KEPT[arguments.method])
def main(arguments: argparse.Namespace) -> None:
    settings = vars(arguments)
    verify = settings.pop("verify")
    method = settings.pop("method")
    check_options(method, settings.keys() - {"datastore", "output"}, OPTIONS[method])
    if method == "random" and "keep" not in settings:
        raise UserError("The method random needs --keep, such as --keep 0.5.")
    model_args = merge_model_args(settings.pop("model_args", ""), {"device": settings.pop("device", None)})

    from knn_lm_eval.lm.loading import CausalHFLM, recorded_arguments
    from knn_lm_eval.make.pruning import prune_confidence, prune_greedy_merge, prune_random
    from knn_lm_eval.store.fetching import open_datastore

    datastore, output = open_datastore(settings.pop("datastore"), verify), settings.pop("output")
    if method == "random":
        pruned = prune_random(datastore, output, **settings)
    elif method == "greedy_merge":
        pruned = prune_greedy_merge(datastore, output, **settings)
    else:

        def load_lm() -> CausalHFLM:
            return CausalHFLM(**recorded_arguments(datastore.manifest.model) | model_args)

        pruned = prune_confidence(datastore, output, load_lm, **settings)
    weight = "" if pruned.weights is None else f", of weight {pruned.weights.mean():.2f} on average"
    print(
        f"{pruned.path}: {len(pruned):,} of {len(datastore):,} entries ({len(pruned) / len(datastore):.1%}){weight}. "
        f"Next: build_index --datastore {pruned.path}"
    )
