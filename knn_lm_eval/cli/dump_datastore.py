"""Dump a datastore: the keys (hidden states) and values (next tokens) of a text under a causal LM."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_lm_eval.cli.arguments import (
    BATCH_SIZE,
    add_key_arguments,
    add_model_arguments,
    add_output,
    check_at_least_one,
    read_model_args,
    whole_number,
)
from knn_lm_eval.cli.main import WITH_RESUME, verb
from knn_lm_eval.errors import UserError

if TYPE_CHECKING:
    from knn_lm_eval.store.datastore import Datastore


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(
        parser,
        "as for lm_eval --model hf: pretrained=NAME,dtype=float16,peft=...",
        max_length="the model's limit, at most 1024",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a UTF-8 text file")
    source.add_argument(
        "--dataset",
        help="a `datasets` data set: hub id, local folder, or a .jsonl, .parquet, .csv or .txt file",
    )
    parser.add_argument("--config", help="the data set's configuration (its `name`)")
    parser.add_argument("--split", default="train", help="the data set's split (default: train)")
    parser.add_argument("--text_column", default="text", help="the data set's column (default: text)")
    parser.add_argument("--streaming", action="store_true", help="stream the data set instead of downloading it")
    parser.add_argument(
        "--documents",
        choices=["line", "blank-line", "file", "wikitext"],
        default="line",
        help="what a document is: each line or row (default), separated by blank lines, the whole file (one token "
        "stream), or a WikiText article",
    )
    add_output(parser, "the folder to write")
    add_key_arguments(
        parser,
        "which keys",
        "the model's submodule whose input is the key (with last_ffn_output: whose output), such as "
        "model.layers.29.mlp (default: the last layer's feed-forward block, which is found by itself)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens that each window adds (default: max_length, no overlapping windows)",
    )
    parser.add_argument("--max_tokens", type=int, help="stop after so many tokens")
    parser.add_argument(
        "--keys",
        type=_keys_kept,
        default="all",
        metavar="all|NUMBER",
        help="what is kept of each key: all of its numbers (default), or so many, of a projection to the directions in "
        "which the keys vary most",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted dump")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="dump as tasks of a Ray cluster: auto (the one on this machine, or a new one) or HOST:PORT",
    )
    parser.add_argument("--workers", type=int, help="with --ray, tasks side by side (default: one for each GPU)")
    return parser.parse_args()


def _keys_kept(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a number of at least 1")
    return int(text)


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for mistakes that show without loading anything."""
    if arguments.text and not arguments.text.is_file():
        raise UserError(f"There is no text file {arguments.text}.")
    check_at_least_one(arguments, "max_tokens")
    if arguments.workers is not None and arguments.ray is None:
        raise UserError("--workers is for --ray; without it, torchrun or accelerate starts several processes.")
    check_at_least_one(arguments, "workers")


@verb(parse_arguments, kept=WITH_RESUME)
def main(arguments: argparse.Namespace) -> None:
    # Of several processes the first one says what is wrong, and the launcher ends the others.
    if os.environ.get("RANK", "0") == "0":
        check(arguments)

    from knn_lm_eval.lm.loading import CausalHFLM
    from knn_lm_eval.make.dump import dump_datastore
    from knn_lm_eval.make.text import TextSource
    from knn_lm_eval.system.processes import Processes

    names = ("text", "dataset", "config", "split", "text_column", "streaming", "documents")
    source = TextSource(**{name: getattr(arguments, name) for name in names})
    if arguments.ray is not None:
        from knn_lm_eval.make.ray_dump import DumpPlan, dump_on_ray

        model_args, device, settings = read_lm(arguments)
        plan = DumpPlan(model_args, source.absolute(), arguments.output.resolve(), device, settings)
        report(dump_on_ray(arguments.ray, plan, arguments.workers, arguments.resume))
        return
    processes = Processes.of_this_launch()
    model_args, device, settings = processes.each_does(lambda: read_lm(arguments))
    lm = processes.each_does(lambda: CausalHFLM(**model_args, device=device))
    store = dump_datastore(
        lm,
        source.pieces(),
        arguments.output,
        resume=arguments.resume,
        source=source.description(),
        model_args=model_args,
        processes=processes,
        **settings,
    )
    if processes.rank == 0:
        report(store)


def read_lm(arguments: argparse.Namespace) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """The arguments of the LM, as its datastore records them; its device; and the dump's settings."""
    model_args = read_model_args(arguments)
    if "pretrained" not in model_args:
        raise UserError("--model_args names no model; give pretrained=NAME or pretrained=FOLDER.")
    if Path(str(model_args["pretrained"])).is_dir():
        model_args["pretrained"] = str(Path(str(model_args["pretrained"])).resolve())
    settings = {
        "key_type": arguments.knn_keytype,
        "key_module": arguments.key_module,
        "max_length": model_args.get("max_length"),
        "stride": arguments.stride,
        "batch_size": whole_number(model_args, "batch_size", BATCH_SIZE),
        "max_tokens": arguments.max_tokens,
        "keys": arguments.keys,
    }
    device = model_args.pop("device", None)
    # What an option says is of this dump alone; what --model_args says is recorded, and holds in evaluations, too.
    for name in ("max_length", "batch_size"):
        if getattr(arguments, name) is not None:
            del model_args[name]
    return model_args, device, settings


def report(store: Datastore) -> None:
    print(
        f"{store.path}: {len(store):,} entries of {store.dimension} numbers from {len(store.document_starts):,} "
        f"documents. Next: lm_eval --model knn-hf --model_args datastore={store.path}; a large one is searched faster "
        f"after build_index --datastore {store.path}"
    )
