"""Time and memory of knn-hf beside lm-eval's hf, a bare faiss search and knn-transformers, in one run.

With retomaton=True, RetoMaton is timed beside kNN-LM, here and in the published code.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from knn_lm_eval.errors import UserError, report_user_errors

if TYPE_CHECKING:
    import numpy as np
    from lm_eval.models.huggingface import HFLM

# Arguments of hf that change what it computes; the others only say how the model is loaded.
SHARED_ARGUMENTS = ("add_bos_token", "prefix_token_id", "softmax_dtype", "mixed_precision_dtype")
HF, SEARCH, OURS, PUBLISHED = "hf", "bare search", "knn-hf", "knn-transformers"
OUR_RETOMATON, PUBLISHED_RETOMATON = f"{OURS} RetoMaton", f"{PUBLISHED} RetoMaton"
MIB = 2**20
# The stages of ours that are the LM's own, or lm-eval's.
NOT_RETRIEVAL = ("forward", "head", "other")

Stages = dict[str, float]


@dataclass
class Outcome:
    """What one system gave: seconds; the text's log-likelihood, saved searches and stages where it has such."""

    seconds: float
    log_likelihood: float | None = None
    saved_searches: float | None = None
    stages: Stages | None = None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_args", required=True, help="as for knn-hf: datastore=...,k=...,...")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file, scored as one stream")
    parser.add_argument("--tokens", type=int, help="score the first so many tokens (default: all)")
    parser.add_argument("--batch_size", type=int, default=4, help="windows per batch (default: 4)")
    parser.add_argument("--max_length", type=int, help="tokens per window (default: at most 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after a warm-up (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch and faiss choose)")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count CPU seconds on one thread, not the clock's: for a machine on which other programs run",
    )
    parser.add_argument("--knn_transformers", type=Path, help="run the wrapper of this checkout, too")
    parser.add_argument("--no_memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    # For the processes that this one starts: measure one system's memory.
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report_user_errors()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for path in filter(None, (arguments.text, arguments.knn_transformers)):
        if not path.exists():
            raise UserError(f"There is no {path}.")
    for name in ("tokens", "batch_size", "max_length", "repeats", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1.")

    if arguments.cpu_time:
        # One thread, since a thread that waits for another may count as busy.
        arguments.threads = 1
        time.perf_counter = time.process_time

    bench = Bench(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory_of:
            print(json.dumps(bench.measure_memory(arguments.memory_of, Path(folder))))
            return
        report = bench.measure_time(Path(folder))
    if not arguments.no_memory:
        report["memory"] = {name: _memory_of(name) for name in report["seconds"] if name != SEARCH}
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class Bench:
    """One model, one datastore and one text; the systems to compare, each a function that scores the text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import faiss
        import torch
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import simple_parse_args_string

        from knn_lm_eval.make.text import read_text_file
        from knn_lm_eval.model.knn_hf import KNNHF
        from knn_lm_eval.model.scoring import Scorer

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
            faiss.omp_set_num_threads(arguments.threads)
        self.arguments = arguments
        model_args = simple_parse_args_string(arguments.model_args)
        self.lm = KNNHF(**model_args, batch_size=arguments.batch_size, max_length=arguments.max_length)
        if arguments.max_length is None:
            self.lm._max_length = min(self.lm.max_length, 1024)
        if self.lm.context_len != 1:
            raise UserError("hf has no sliding windows to compare with; leave context_len out.")
        self.hf = HFLM(
            pretrained=self.lm.model,
            tokenizer=self.lm.tokenizer,
            batch_size=arguments.batch_size,
            max_length=self.lm.max_length,
            **{name: model_args[name] for name in SHARED_ARGUMENTS if name in model_args},
        )
        scorer = self.lm.scorer
        self.scorers = {OURS: scorer}
        if hasattr(scorer, "automaton"):
            knn_lm = Scorer(scorer.model, scorer.retriever, scorer.lmbda, scorer.knn_temp, scorer.softmax_dtype)
            self.scorers = {OURS: knn_lm, OUR_RETOMATON: scorer}
        self.text = first_tokens(self.lm, "".join(read_text_file(arguments.text)), arguments.tokens)
        self.tokens = len(self.lm.tok_encode(self.text))
        if not self.tokens:
            raise UserError(f"{arguments.text} is empty: there is nothing to score.")

    def measure_time(self, folder: Path) -> dict[str, Any]:
        """Seconds, log-likelihoods and stages, after a warm-up each, the systems taking turns."""
        from knn_lm_eval.search import retriever as retrieval

        batches: list[np.ndarray] = []
        search = retrieval.search

        def recording_search(index: Any, queries: np.ndarray, k: int, parameters: Any) -> Any:
            batches.append(queries.copy())
            return search(index, queries, k, parameters)

        systems = self.systems(folder)
        with patch.object(retrieval, "search", recording_search):
            systems[OURS]()
        systems = {HF: systems.pop(HF), SEARCH: partial(self.bare_search, batches), **systems}
        first = {name: score() for name, score in systems.items()}
        rounds: dict[str, list[Outcome]] = {name: [] for name in systems}
        for number in range(self.arguments.repeats):
            for name, score in systems.items():
                rounds[name].append(score())
            took = ", ".join(f"{name} {outcomes[-1].seconds:.2f} s" for name, outcomes in rounds.items())
            print(f"round {number + 1}: {took}", file=sys.stderr)
        store = self.lm.retriever.datastore
        return {
            "tokens": self.tokens,
            "queries": sum(map(len, batches)),
            "windows": self.lm.max_length,
            "batch_size": self.arguments.batch_size,
            "cpu_time": self.arguments.cpu_time,
            "entries": len(store),
            "index": self.lm.retriever.metadata["factory"],
            "settings": self.lm.settings,
            "seconds": {name: [outcome.seconds for outcome in outcomes] for name, outcomes in rounds.items()},
            "stages": {name: [outcome.stages for outcome in rounds[name]] for name in self.scorers},
            "perplexity": {
                name: None if outcome.log_likelihood is None else math.exp(-outcome.log_likelihood / self.tokens)
                for name, outcome in first.items()
            },
            "saved_searches": {name: outcome.saved_searches for name, outcome in first.items()},
        }

    def measure_memory(self, name: str, folder: Path) -> dict[str, int]:
        """Resident bytes: before ``name`` scores the text, at the peak, and newly read from mapped files."""
        from knn_lm_eval.system.memory import resident_bytes

        score = self.systems(folder)[name]
        # A few tokens first: weights may be read from disk, and libraries loaded, only when used.
        text, self.text = self.text, first_tokens(self.lm, self.text, 8)
        score()
        self.text = text
        before = resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        score()
        after = resident_bytes()
        assert before and after  # as where clear_refs is
        return {
            "loaded": before["anonymous"] + before["mapped_files"],
            "peak": after["peak_resident"],
            "newly mapped": after["mapped_files"] - before["mapped_files"],
        }

    def systems(self, folder: Path) -> dict[str, Callable[[], Outcome]]:
        """What is compared, but for the bare search; ``folder`` is for the published code's files."""
        systems: dict[str, Callable[[], Outcome]] = {HF: lambda: self.rolling(self.hf)}
        systems |= {name: partial(self.ours, name) for name in self.scorers}
        if self.arguments.knn_transformers is None:
            return systems

        from knn_lm_eval.study.published_code import PublishedCode, ScoreText, why_not

        if reason := why_not(self.lm):
            print(f"{PUBLISHED} is left out: {reason}.", file=sys.stderr)
            return systems

        def published(score: ScoreText) -> Outcome:
            return Outcome(*score(self.text))

        code = PublishedCode(self.lm, self.arguments.knn_transformers, folder)
        systems[PUBLISHED] = partial(published, code.knn_lm(self.arguments.batch_size))
        if OUR_RETOMATON in systems:
            how = (self.lm.settings[name] for name in ("min_knns", "max_knns", "clusters"))
            systems[PUBLISHED_RETOMATON] = partial(published, code.retomaton(*how))
        return systems

    def rolling(self, lm: HFLM) -> Outcome:
        """Score the text as lm-eval's perplexity tasks do."""
        from lm_eval.api.instance import Instance

        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(self.text,), idx=0)
        with redirect_stderr(io.StringIO()):  # hf shows a progress bar for each batch, asked or not
            start = time.perf_counter()
            (log_likelihood,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
            seconds = time.perf_counter() - start
        searches = getattr(log_likelihood, "num_searches", None)
        return Outcome(seconds, float(log_likelihood), None if searches is None else 1 - searches / self.tokens)

    def ours(self, name: str) -> Outcome:
        """One of our scorers, with its seconds by stage."""
        self.lm.scorer = self.scorers[name]
        before = self.stages()
        outcome = self.rolling(self.lm)
        outcome.stages = {stage: value - before[stage] for stage, value in self.stages().items()}
        outcome.stages["other"] = outcome.seconds - sum(outcome.stages.values())
        return outcome

    def bare_search(self, batches: list[np.ndarray]) -> Outcome:
        """Nothing but faiss, for the same queries in the same batches."""
        index, k = self.lm.retriever.index, self.lm.retriever.k
        start = time.perf_counter()
        for queries in batches:
            index.search(queries, k)
        return Outcome(time.perf_counter() - start)

    def stages(self) -> Stages:
        """Seconds that the scorer in use has spent so far, by stage."""
        seconds = self.lm.scorer.seconds | self.lm.retriever.statistics.seconds
        if automaton := getattr(self.lm.scorer, "automaton", None):
            # The retriever counts the automaton's searches as well.
            seconds |= {name: value for name, value in automaton.statistics.seconds.items() if name != "search"}
        return seconds


def first_tokens(lm: HFLM, text: str, tokens: int | None) -> str:
    """The beginning of ``text`` that has so many tokens."""
    ids = lm.tok_encode(text)
    if tokens is None or len(ids) <= tokens:
        return text
    return lm.tokenizer.decode(ids[:tokens], skip_special_tokens=True)


def _memory_of(name: str) -> dict[str, int] | None:
    """One system's memory, measured in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        print("Peak memory is left out: it is measured on Linux only.", file=sys.stderr)
        return None
    command = [sys.executable, "-m", "knn_lm_eval.cli", "speed", *sys.argv[1:], "--memory_of", name]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def _print_ratio(name: str, numerators: list[float], denominators: list[float]) -> None:
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    print(f"{name:60}{statistics.median(ratios):8.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")


def print_report(report: dict[str, Any]) -> None:
    """Print the figures as tables."""
    tokens, seconds = report["tokens"], report["seconds"]
    print(
        f"{tokens:,} tokens in windows of {report['windows']}, batches of {report['batch_size']}; "
        f"{report['entries']:,} entries, {report['index']}, "
        + ", ".join(f"{name}={report['settings'][name]}" for name in ("k", "lmbda", "knn_temp", "probe"))
    )
    print(f"\n{'':28}{'CPU s' if report['cpu_time'] else 'seconds':>9}{'tokens/s':>10}{'perplexity':>12}{'saved':>8}")
    for name, values in seconds.items():
        median = statistics.median(values)
        perplexity, saved = report["perplexity"][name], report["saved_searches"][name]
        shown = "-" if perplexity is None else f"{perplexity:.4f}"
        print(f"{name:28}{median:9.2f}{tokens / median:10.0f}{shown:>12}{'' if saved is None else f'{saved:8.4f}'}")

    print("\nratios, median of the rounds (least to greatest)")
    hf, search = seconds[HF], seconds[SEARCH]
    both = [a + b for a, b in zip(hf, search, strict=True)]
    compared = [name for name in seconds if name not in (HF, SEARCH)]
    for name in compared:
        _print_ratio(f"{name} / ({HF} + {SEARCH})", seconds[name], both)
        _print_ratio(f"{name} / {HF}", seconds[name], hf)
    retrieval = {
        name: [sum(part[stage] for stage in part if stage not in NOT_RETRIEVAL) for part in parts]
        for name, parts in report["stages"].items()
    }
    for name, published in ((OURS, PUBLISHED), (OUR_RETOMATON, PUBLISHED_RETOMATON)):
        if published in compared:
            beyond = [a - b for a, b in zip(seconds[published], hf, strict=True)]
            _print_ratio(f"{published} beyond {HF} / retrieval of {name}", beyond, retrieval[name])

    stages = list(dict.fromkeys(stage for parts in report["stages"].values() for stage in parts[0]))
    print(f"\n{'ms a token by stage':20}" + "".join(f"{stage:>11}" for stage in [*stages, "retrieval"]))
    for name, parts in report["stages"].items():
        figures = [statistics.median(part.get(stage, 0.0) for part in parts) for stage in stages]
        figures.append(statistics.median(retrieval[name]))
        print(f"{name:20}" + "".join(f"{1000 * figure / tokens:11.4f}" for figure in figures))

    if memory := {name: figures for name, figures in report.get("memory", {}).items() if figures}:
        print(f"\n{'resident MiB':28}{'loaded':>9}{'peak':>10}{'difference':>12}{'of it mapped files':>20}")
        for name, figures in memory.items():
            loaded, peak = figures["loaded"], figures["peak"]
            numbers = [f"{x / MIB:.0f}" for x in (loaded, peak, peak - loaded, figures["newly mapped"])]
            print(f"{name:28}{numbers[0]:>9}{numbers[1]:>10}{numbers[2]:>12}{numbers[3]:>20}")
