"""Arguments that several verbs share: each one's name, type and help stand here once.

An argument of the LM may be given as an option of the verb or within ``--model_args``, in every verb that has both.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError
from knn_lm_eval.system.memory import parse_bytes

KNN_HF = "as for lm_eval --model knn-hf: pretrained=M,datastore=D"
# Options of a verb that are arguments of the LM as well.
LM_OPTIONS = ("max_length", "batch_size", "device")
BATCH_SIZE = 4
TEXT_ARGUMENTS = ("text", "dataset", "config", "split", "text_column", "streaming", "documents")  # of a TextSource


def add_model_arguments(
    parser: argparse.ArgumentParser,
    help: str = KNN_HF,
    *,
    max_length: str = "the model's limit",
    batches: bool = True,
) -> None:
    """``--model_args``, and those of its arguments that have an option of their own.

    Parameters
    ----------
    help : of ``--model_args``.
    max_length : what it is by default, to be shown.
    batches : whether there is a ``--batch_size``.
    """
    parser.add_argument("--model_args", required=True, help=help)
    parser.add_argument("--max_length", type=int, help=f"tokens per window (default: {max_length})")
    if batches:
        parser.add_argument("--batch_size", type=_number_or_word, help=f"windows per batch (default: {BATCH_SIZE})")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def _number_or_word(text: str) -> int | str:
    """As ``--model_args`` reads it: ``auto`` is a batch size, too."""
    return int(text) if text.removeprefix("-").isdigit() else text


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """``TEXT_ARGUMENTS``: a text, and what a document of it is."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a UTF-8 text file")
    source.add_argument(
        "--dataset",
        help="a `datasets` data set: hub id, local folder, or a .jsonl, .parquet, .csv or .txt file; or python_docs, "
        "the topics of Python's help() that the task of that name does not score",
    )
    parser.add_argument("--config", help="the data set's configuration (its `name`)")
    parser.add_argument("--split", default="train", help="the data set's split (default: train)")
    parser.add_argument("--text_column", default="text", help="the data set's column (default: text)")
    parser.add_argument("--streaming", action="store_true", help="stream the data set instead of downloading it")
    parser.add_argument(
        "--documents",
        choices=["line", "blank-line", "file", "wikitext", "wikitext-stream"],
        default="line",
        help="what a document is: each line or row (default), separated by blank lines, the whole file (one token "
        "stream), a WikiText article, or all of WikiText as one stream",
    )


def check_text(arguments: argparse.Namespace) -> None:
    """Raise UserError where the text is no file."""
    if arguments.text and not arguments.text.is_file():
        raise UserError(f"There is no text file {arguments.text}.")


def add_task_arguments(parser: argparse.ArgumentParser, tasks: str = "perplexity tasks, separated by commas") -> None:
    """``--tasks``, ``--metadata`` and ``--limit``, as ``lm_eval`` has them."""
    parser.add_argument("--tasks", required=True, help=tasks)
    parser.add_argument("--metadata", default="", help="as for lm_eval, such as data_dir=FOLDER")
    parser.add_argument("--limit", type=float, help="as for lm_eval: documents per task")


def add_timing_arguments(parser: argparse.ArgumentParser, chooser: str) -> None:
    """``--repeats``, ``--threads`` and ``--cpu_time``; ``chooser`` says who chooses the threads else."""
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after a warm-up (default: 3)")
    parser.add_argument("--threads", type=int, help=f"CPU threads (default: what {chooser})")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count CPU seconds on one thread, not the clock's: for a machine on which other programs run",
    )


def add_datastore(parser: argparse.ArgumentParser, more: str = "") -> None:
    """``--datastore``, and ``--verify``."""
    parser.add_argument("--datastore", required=True, help=f"the datastore's folder or address{more}")
    add_verify(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """``--verify``."""
    parser.add_argument(
        "--verify",
        default="auto",
        choices=["auto", "always", "never"],
        help="read the datastore's files for their checksums: where they were not verified before or changed since "
        "(auto), all, or none (default: auto)",
    )


def add_memory(parser: argparse.ArgumentParser, takes: str, default: str = "half of what is available") -> None:
    """``--memory``, in bytes; ``takes`` says what keeps to it, ``default`` what it may take without the option."""
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help=f"what {takes} may take, such as 8GiB or 512MiB (default: {default})",
    )


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_output(parser: argparse.ArgumentParser, help: str, *, required: bool = True) -> None:
    """``--output``, a file or a folder."""
    parser.add_argument("--output", type=Path, required=required, help=help)


def add_key_arguments(parser: argparse.ArgumentParser, keytype: str, key_module: str) -> None:
    """``--knn_keytype`` and ``--key_module``, with their help."""
    parser.add_argument(
        "--knn_keytype", default="last_ffn_input", choices=["last_ffn_input", "last_ffn_output"], help=keytype
    )
    parser.add_argument("--key_module", help=key_module)


def check_at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError where one of these numbers is given and below 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1.")


def check_options(method: str, given: Iterable[str], allowed: Collection[str]) -> None:
    """Raise UserError where an option is given that is not the method's."""
    for name in given:
        if name not in allowed:
            raise UserError(f"--{name} does not go with the method {method}; leave it out.")


def check_outputs(*outputs: Path | None) -> None:
    """Raise UserError, before any work is done, where one of the files to be written would overwrite a store's own."""
    from knn_lm_eval.store.names import check_output

    for output in outputs:
        if output is not None:
            check_output(output)


def parse_numbers(option: str, text: str) -> list[float]:
    """The numbers of an option that takes several, separated by commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text} should be numbers separated by commas.") from error


def read_model_args(arguments: argparse.Namespace) -> dict[str, Any]:
    """``--model_args``, and what the options of ``LM_OPTIONS`` add to it."""
    options = {name: getattr(arguments, name, None) for name in LM_OPTIONS}
    for name, value in options.items():
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} {value} must be at least 1.")
    return merge_model_args(arguments.model_args, options)


def merge_model_args(model_args: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments in ``model_args`` and those options that are not None.

    Raises
    ------
    UserError
        Where both give one argument different values.
    """
    from lm_eval.utils import simple_parse_args_string

    merged = simple_parse_args_string(model_args)
    for name, value in options.items():
        if value is None:
            continue
        if merged.get(name) not in (None, value):
            raise UserError(
                f"--{name} {value} and {name}={merged[name]} in --model_args contradict each other: leave one out."
            )
        merged[name] = value
    return merged


def whole_number(model_args: dict[str, Any], name: str, default: int) -> int:
    """An argument that must be a whole number here, though the LM takes other values as well (``auto``)."""
    value = model_args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value} must be a whole number of at least 1 here.")
    return value


def read_text(path: Path) -> str:
    """A UTF-8 text file that has something in it."""
    from knn_lm_eval.make.text import read_text_file

    text = "".join(read_text_file(path))
    if not text:
        raise UserError(f"{path} is empty: there is nothing to score.")
    return text


def read_metadata(arguments: argparse.Namespace) -> dict[str, Any]:
    """``--metadata``."""
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(arguments.metadata)


def task_names(arguments: argparse.Namespace) -> Sequence[str]:
    """``--tasks``."""
    return arguments.tasks.split(",")
