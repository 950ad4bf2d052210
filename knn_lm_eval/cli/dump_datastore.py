"""Dump a datastore: the keys (hidden states) and values (next tokens) of a text under a causal LM."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_lm_eval.cli.arguments import (
    BATCH_SIZE,
    TEXT_ARGUMENTS,
    add_key_arguments,
    add_memory,
    add_model_arguments,
    add_output,
    add_text_arguments,
    check_at_least_one,
    check_text,
    read_model_args,
    whole_number,
)
from knn_lm_eval.cli.main import WITH_RESUME, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError, counted

if TYPE_CHECKING:
    from knn_lm_eval.make.index_plan import IndexPlan
    from knn_lm_eval.store.datastore import Datastore

EXAMPLE = (
    "knn-lm-eval dump_datastore --model_args pretrained=HuggingFaceTB/SmolLM2-135M --text train.txt --output stores/law"
)


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    add_model_arguments(
        parser,
        "as for lm_eval --model hf: pretrained=NAME,dtype=float16,peft=...",
        max_length="the model's limit, at most 1024",
    )
    add_text_arguments(parser)
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
    narrower = parser.add_mutually_exclusive_group()
    narrower.add_argument(
        "--keys",
        type=_keys_kept,
        default="all",
        metavar="all|NUMBER|none",
        help="what is kept of each key: all of its numbers (default), so many, of a projection to the directions in "
        "which the keys vary most, or none: the keys go straight into an index",
    )
    narrower.add_argument(
        "--projection_of",
        type=Path,
        metavar="DATASTORE",
        help="keep of each key what this datastore of the same model keeps, by its projection",
    )
    parser.add_argument("--factory", help="with --keys none, the index's faiss factory string (default: auto)")
    parser.add_argument("--index", help="with --keys none, the index's name (default: index)")
    parser.add_argument(
        "--sim_func", choices=["l2", "dot"], help="with --keys none, what near means in the index (default: l2)"
    )
    parser.add_argument("--parts", type=int, help="with --keys none, make the index in so many files (default: one)")
    add_memory(parser, "each process of a dump with --keys none, its LM included,")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted dump")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="dump as tasks of a Ray cluster: auto (the one on this machine, or a new one) or HOST:PORT",
    )
    parser.add_argument("--workers", type=int, help="with --ray, tasks side by side (default: one for each GPU)")
    return parser.parse_args()


def _keys_kept(text: str) -> int | str:
    if text in ("all", "none"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor none nor a number of at least 1")
    return int(text)


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError for mistakes that show without loading anything."""
    check_text(arguments)
    check_at_least_one(arguments, "max_tokens")
    if arguments.workers is not None and arguments.ray is None:
        raise UserError("--workers is for --ray; without it, torchrun or accelerate starts several processes.")
    check_at_least_one(arguments, "workers")
    check_at_least_one(arguments, "parts")
    if (index := read_index_plan(arguments)) is not None:
        index.check()


def read_index_plan(arguments: argparse.Namespace) -> IndexPlan | None:
    """The index to make; None where keys are kept, with which options for it are a mistake."""
    given = {"factory": arguments.factory, "name": arguments.index, "sim_func": arguments.sim_func}
    given = {name: value for name, value in (given | {"parts": arguments.parts}).items() if value is not None}
    if arguments.keys != "none":
        if given:
            option = "index" if "name" in given else next(iter(given))
            raise UserError(f"--{option} is for --keys none; where keys are kept, build_index makes the index.")
        if arguments.memory is not None:
            raise UserError("--memory is for --keys none: a dump that keeps keys takes the LM's memory alone.")
        return None

    from knn_lm_eval.make.index_plan import IndexPlan

    return IndexPlan(**given)


@verb(parse_arguments, kept=WITH_RESUME)
def main(arguments: argparse.Namespace) -> None:
    # Of several processes the first one says what is wrong, and the launcher ends the others.
    if os.environ.get("RANK", "0") == "0":
        check(arguments)

    from knn_lm_eval.lm.loading import CausalHFLM
    from knn_lm_eval.make.dump import dump_datastore
    from knn_lm_eval.make.text import TextSource
    from knn_lm_eval.system.processes import Processes

    source = TextSource(**{name: getattr(arguments, name) for name in TEXT_ARGUMENTS})
    if arguments.ray is not None:
        from knn_lm_eval.make.ray_dump import DumpPlan, dump_on_ray

        model_args, device, settings = read_lm(arguments)
        plan = DumpPlan(model_args, source.absolute(), arguments.output.resolve(), device, settings)
        report(dump_on_ray(arguments.ray, plan, arguments.workers, arguments.resume), settings["index"])
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
        report(store, settings["index"])


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
        "index": read_index_plan(arguments),
        "memory": arguments.memory,
        "projection_of": arguments.projection_of and arguments.projection_of.resolve(),
    }
    device = model_args.pop("device", None)
    # What an option says is of this dump alone; what --model_args says is recorded, and holds in evaluations, too.
    for name in ("max_length", "batch_size"):
        if getattr(arguments, name) is not None:
            del model_args[name]
    return model_args, device, settings


def report(store: Datastore, index: IndexPlan | None) -> None:
    made = (
        f"{store.path}: {counted(len(store), 'entry', 'entries')} of {store.dimension} numbers from "
        f"{counted(len(store.document_starts), 'document')}"
    )
    if index is None:
        print(
            f"{made}. Next: lm_eval --model knn-hf --model_args datastore={store.path}; a large one is searched faster "
            f"after build_index --datastore {store.path}"
        )
        return

    from knn_lm_eval.cli.build_index import print_index
    from knn_lm_eval.store.index_files import DEFAULT_INDEX, find_parts

    print_index(find_parts(store, index.name)[0])
    which = "" if index.name == DEFAULT_INDEX else f",index={index.name}"
    print(f"{made}, without keys. Next: lm_eval --model knn-hf --model_args datastore={store.path}{which}")
