"""Dump a datastore: the keys (hidden states) and values (next tokens) of a text under a causal LM."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_lm_eval.errors import UserError, report_user_errors

if TYPE_CHECKING:
    from knn_lm_eval.store.datastore import Datastore


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_args",
        required=True,
        help="as for lm_eval --model hf: pretrained=NAME,dtype=float16,peft=...",
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
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--knn_keytype",
        default="last_ffn_input",
        choices=["last_ffn_input", "last_ffn_output"],
        help="which keys",
    )
    parser.add_argument(
        "--key_module",
        help="the model's submodule whose input is the key (with last_ffn_output: whose output), such as "
        "model.layers.29.mlp (default: the last layer's feed-forward block, which is found by itself)",
    )
    parser.add_argument("--max_length", type=int, help="tokens per window (default: the model's limit, at most 1024)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens that each window adds (default: max_length, no overlapping windows)",
    )
    parser.add_argument("--batch_size", type=int, default=4, help="windows of max_length per batch (default: 4)")
    parser.add_argument("--max_tokens", type=int, help="stop after so many tokens")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted dump")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="dump as tasks of a Ray cluster: auto (the one on this machine, or a new one) or HOST:PORT",
    )
    parser.add_argument("--workers", type=int, help="with --ray, tasks side by side (default: one for each GPU)")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for mistakes that show without loading anything."""
    if arguments.text and not arguments.text.is_file():
        raise UserError(f"There is no text file {arguments.text}.")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise UserError(f"--max_tokens {arguments.max_tokens} must be at least 1.")
    if arguments.workers is not None and arguments.ray is None:
        raise UserError("--workers is for --ray; without it, torchrun or accelerate starts several processes.")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be at least 1.")


def main() -> None:
    arguments = parse_arguments()
    report_user_errors()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # Of several processes the first one says what is wrong, and the launcher ends the others.
    if os.environ.get("RANK", "0") == "0":
        check(arguments)

    # Imported late: --help and a mistyped path should not wait for torch.
    from lm_eval.utils import simple_parse_args_string

    from knn_lm_eval.lm.loading import CausalHFLM
    from knn_lm_eval.make.dump import dump_datastore
    from knn_lm_eval.make.text import TextSource
    from knn_lm_eval.system.processes import Processes

    def read_model_args() -> dict[str, Any]:
        model_args = simple_parse_args_string(arguments.model_args)
        if "pretrained" not in model_args:
            raise UserError("--model_args names no model; give pretrained=NAME or pretrained=FOLDER.")
        if Path(str(model_args["pretrained"])).is_dir():
            model_args["pretrained"] = str(Path(str(model_args["pretrained"])).resolve())
        return model_args

    names = ("text", "dataset", "config", "split", "text_column", "streaming", "documents")
    source = TextSource(**{name: getattr(arguments, name) for name in names})
    settings = {
        "key_type": arguments.knn_keytype,
        "key_module": arguments.key_module,
        "max_length": arguments.max_length,
        "stride": arguments.stride,
        "batch_size": arguments.batch_size,
        "max_tokens": arguments.max_tokens,
    }
    if arguments.ray is not None:
        from knn_lm_eval.make.ray_dump import DumpPlan, dump_on_ray

        plan = DumpPlan(read_model_args(), source.absolute(), arguments.output.resolve(), arguments.device, settings)
        report(dump_on_ray(arguments.ray, plan, arguments.workers, arguments.resume))
        return
    processes = Processes.of_this_launch()
    model_args = processes.each_does(read_model_args)
    lm = processes.each_does(lambda: CausalHFLM(**model_args, device=arguments.device))
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


def report(store: Datastore) -> None:
    print(
        f"{store.path}: {len(store):,} entries of {store.dimension} numbers from {len(store.document_starts):,} "
        f"documents. Next: build_index --datastore {store.path}"
    )
