"""Time and memory of knn-hf beside lm-eval's hf, a bare faiss search and knn-transformers, in one run."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
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
MIB = 2**20

# Seconds, and the text's log-likelihood where the system gives one.
Outcome = tuple[float, float | None]
Stages = dict[str, float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_args", required=True, help="as for knn-hf: datastore=...,k=...,...")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file, scored as one stream")
    parser.add_argument("--tokens", type=int, help="score the first so many tokens (default: all)")
    parser.add_argument("--batch_size", type=int, default=4, help="windows per batch (default: 4)")
    parser.add_argument("--max_length", type=int, help="tokens per window (default: at most 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after a warm-up (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch and faiss choose)")
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

    bench = Bench(arguments)
    if arguments.memory_of:
        print(json.dumps(bench.measure_memory(arguments.memory_of)))
        return
    report = bench.measure_time()
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

        from knn_lm_eval.knn_hf import KNNHF

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
        self.text = first_tokens(self.lm, arguments.text.read_text(encoding="utf-8"), arguments.tokens)
        self.tokens = len(self.lm.tok_encode(self.text))
        if not self.tokens:
            raise UserError(f"{arguments.text} is empty: there is nothing to score.")

    def measure_time(self) -> dict[str, Any]:
        """Seconds, log-likelihoods and stages, after a warm-up each, the systems taking turns."""
        from knn_lm_eval import retrieval

        batches: list[np.ndarray] = []
        search = retrieval.search

        def recording_search(index: Any, queries: np.ndarray, k: int) -> Any:
            batches.append(queries.copy())
            return search(index, queries, k)

        with patch.object(retrieval, "search", recording_search):
            log_likelihoods = {OURS: self.rolling(self.lm)[1]}
        with self.published() as score_published:
            systems: dict[str, Callable[[], Outcome]] = {
                HF: lambda: self.rolling(self.hf),
                SEARCH: lambda: self.bare_search(batches),
                OURS: lambda: self.rolling(self.lm),
            }
            if score_published:
                systems[PUBLISHED] = score_published
            log_likelihoods |= {name: score()[1] for name, score in systems.items() if name != OURS}
            seconds: dict[str, list[float]] = {name: [] for name in systems}
            stages: list[Stages] = []
            for round_number in range(self.arguments.repeats):
                for name, score in systems.items():
                    before = self.stages()
                    seconds[name].append(score()[0])
                    if name == OURS:
                        now = {stage: value - before[stage] for stage, value in self.stages().items()}
                        stages.append(now | {"other": seconds[name][-1] - sum(now.values())})
                took = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
                print(f"round {round_number + 1}: {took}", file=sys.stderr)
        store = self.lm.retriever.datastore
        return {
            "tokens": self.tokens,
            "queries": sum(map(len, batches)),
            "windows": self.lm.max_length,
            "batch_size": self.arguments.batch_size,
            "entries": len(store),
            "index": self.lm.retriever.metadata["factory"],
            "settings": self.lm.settings,
            "seconds": seconds,
            "stages": stages,
            "perplexity": {
                name: None if value is None else math.exp(-value / self.tokens)
                for name, value in log_likelihoods.items()
            },
        }

    def measure_memory(self, name: str) -> dict[str, int]:
        """Resident bytes: before ``name`` scores the text, at the peak, and newly read from mapped files."""
        with self.published() if name == PUBLISHED else nullcontext() as score_published:
            score = score_published or (lambda: self.rolling(self.hf if name == HF else self.lm))
            # A few tokens first: weights may be read from disk, and libraries loaded, only when used.
            text, self.text = self.text, first_tokens(self.lm, self.text, 8)
            score()
            self.text = text
            before = _memory_status()
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
            score()
            after = _memory_status()
        mapped = after["RssFile"] - before["RssFile"]
        return {"loaded": before["VmRSS"], "peak": after["VmHWM"], "newly mapped": mapped}

    def rolling(self, lm: HFLM) -> Outcome:
        """Score the text as lm-eval's perplexity tasks do."""
        from lm_eval.api.instance import Instance

        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(self.text,), idx=0)
        with redirect_stderr(io.StringIO()):  # hf shows a progress bar for each batch, asked or not
            start = time.perf_counter()
            (log_likelihood,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
            return time.perf_counter() - start, float(log_likelihood)

    def bare_search(self, batches: list[np.ndarray]) -> Outcome:
        """Nothing but faiss, for the same queries in the same batches."""
        index, k = self.lm.retriever.index, self.lm.retriever.k
        start = time.perf_counter()
        for queries in batches:
            index.search(queries, k)
        return time.perf_counter() - start, None

    def stages(self) -> Stages:
        """Seconds that knn-hf has spent so far, by stage."""
        seconds = self.lm.scorer.seconds | self.lm.retriever.statistics.seconds
        if automaton := getattr(self.lm.scorer, "automaton", None):
            # The retriever counts the automaton's searches as well.
            seconds |= {name: value for name, value in automaton.statistics.seconds.items() if name != "search"}
        return seconds

    @contextmanager
    def published(self) -> Iterator[Callable[[], Outcome] | None]:
        """knn-transformers' wrapper around the same model, index and values; None where it can't run."""
        if self.arguments.knn_transformers is None:
            yield None
        elif reason := self.why_not_published():
            print(f"{PUBLISHED} is left out: {reason}.", file=sys.stderr)
            yield None
        else:
            sys.path.insert(0, str(self.arguments.knn_transformers.resolve()))
            with tempfile.TemporaryDirectory() as folder:
                yield self.published_system(folder)

    def why_not_published(self) -> str | None:
        """What keeps knn-transformers from running with these settings, if anything does."""
        import faiss
        import torch

        retriever, model = self.lm.retriever, self.lm.scorer.model
        if not isinstance(faiss.downcast_index(retriever.index), faiss.IndexIVF):
            return f"it needs an index with inverted lists, which {retriever.metadata['factory']} has not"
        if not hasattr(model.inner, "lm_head"):
            return f"{type(model.inner).__name__} has no head of the name lm_head"
        if retriever.sim_func != "l2" or model.inner.dtype != torch.float32 or not self.lm.scorer.lmbda:
            return "it needs knn_sim_func=l2, dtype=float32 and lmbda above 0"
        if self.lm.settings.get("retomaton"):
            return "only its kNN-LM is compared, not its RetoMaton"
        longest = getattr(model.inner.config, "max_position_embeddings", math.inf)
        if longest <= self.lm.max_length:
            return f"it reads the last target too, which needs --max_length below {longest}"
        return None

    def published_system(self, folder: str) -> Callable[[], Outcome]:
        """Lay the store out as knn-transformers has it, and make a function that scores the text with it."""
        import torch
        from knnlm import DIST, KEY_TYPE, KNNWrapper, get_dstore_path, get_index_path, logger
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        from torch.nn.utils.rnn import pad_sequence

        logger.setLevel(logging.WARNING)
        lm, store, settings = self.lm, self.lm.retriever.datastore, self.lm.settings
        model: Any = lm.scorer.model.inner
        name = (folder, model.config.model_type, len(store), store.dimension)
        store.values.tofile(f"{get_dstore_path(*name)}_vals.npy")
        if settings["recompute_dists"]:
            store.require_keys("recompute_dists=True").tofile(f"{get_dstore_path(*name)}_keys.npy")
        Path(get_index_path(*name)).symlink_to(store.path.resolve() / f"{settings['index']}.faiss")
        key_module = model.base_model.get_submodule(lm.scorer.model.key_module_name)
        key_type = KEY_TYPE.from_string(settings["knn_keytype"])
        capture = (lambda _: key_module, key_type is KEY_TYPE.last_ffn_input)
        KNNWrapper.model_layer_to_capture[model.config.model_type] = {key_type: capture}
        wrapper = KNNWrapper(
            len(store),
            folder,
            store.dimension,
            knn_sim_func=DIST.l2,
            knn_keytype=key_type,
            no_load_keys=not settings["recompute_dists"],
            move_dstore_to_mem=True,
            knn_gpu=False,
            **{name: settings[name] for name in ("recompute_dists", "k", "lmbda", "knn_temp", "probe")},
        )

        def score() -> Outcome:
            ids = lm.tok_encode(self.text)
            windows = get_rolling_token_windows(ids, lm.prefix_token_id, lm.max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            log_likelihood = 0.0
            wrapper.break_into(model)  # reads the index and the values: not timed
            start = time.perf_counter()
            for first in range(0, len(pairs), self.arguments.batch_size):
                batch = pairs[first : first + self.arguments.batch_size]
                # The wrapper searches where the next label is not -100, so the last target is read as well.
                texts = [torch.tensor(context + continuation) for context, continuation in batch]
                labels = [torch.tensor([-100] * len(context) + rest) for context, rest in batch]
                padded = pad_sequence(texts, batch_first=True).to(lm.device)
                padded_labels = pad_sequence(labels, batch_first=True, padding_value=-100).to(lm.device)
                with torch.no_grad():
                    log_probs = model(input_ids=padded, labels=padded_labels).logits[:, :-1]
                asked = padded_labels[:, 1:] != -100
                target_log_probs = log_probs.gather(-1, padded[:, 1:, None])[..., 0][asked]
                log_likelihood += float(target_log_probs.double().sum())
                del log_probs
            seconds = time.perf_counter() - start
            wrapper.break_out()
            return seconds, log_likelihood

        return score


def first_tokens(lm: HFLM, text: str, tokens: int | None) -> str:
    """The beginning of ``text`` that has so many tokens."""
    ids = lm.tok_encode(text)
    if tokens is None or len(ids) <= tokens:
        return text
    return lm.tokenizer.decode(ids[:tokens], skip_special_tokens=True)


def _memory_status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines)
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if field[-1:] == ["kB"]}


def _memory_of(name: str) -> dict[str, int] | None:
    """One system's memory, measured in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        print("Peak memory is left out: it is measured on Linux only.", file=sys.stderr)
        return None
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def print_report(report: dict[str, Any]) -> None:
    """Print the figures as tables."""
    tokens, seconds = report["tokens"], report["seconds"]
    print(
        f"{tokens:,} tokens in windows of {report['windows']}, batches of {report['batch_size']}; "
        f"{report['entries']:,} entries, {report['index']}, "
        + ", ".join(f"{name}={report['settings'][name]}" for name in ("k", "lmbda", "knn_temp", "probe"))
    )
    print(f"\n{'':18}{'seconds':>9}{'tokens/s':>10}{'perplexity':>12}")
    for name, values in seconds.items():
        median = statistics.median(values)
        perplexity = report["perplexity"][name]
        shown = "-" if perplexity is None else f"{perplexity:.3f}"
        print(f"{name:18}{median:9.2f}{tokens / median:10.0f}{shown:>12}")

    print("\nratios, median of the rounds (least to greatest)")
    hf, both = seconds[HF], [sum(pair) for pair in zip(seconds[HF], seconds[SEARCH], strict=True)]
    for name in (OURS, PUBLISHED):
        for base_name, base in ((f"({HF} + {SEARCH})", both), (HF, hf)):
            if name in seconds:
                ratios = [a / b for a, b in zip(seconds[name], base, strict=True)]
                low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
                print(f"{name + ' / ' + base_name:40}{middle:7.3f}   ({low:.3f} to {high:.3f})")

    print(f"\n{OURS} by stage{'seconds':>13}{'ms/token':>10}")
    for stage in report["stages"][0]:
        median = statistics.median(stages[stage] for stages in report["stages"])
        print(f"{stage:18}{median:9.3f}{1000 * median / tokens:10.4f}")

    if memory := {name: figures for name, figures in report.get("memory", {}).items() if figures}:
        print(f"\n{'resident MiB':18}{'loaded':>9}{'peak':>10}{'difference':>12}{'of it mapped files':>20}")
        for name, figures in memory.items():
            loaded, peak = figures["loaded"], figures["peak"]
            numbers = [f"{x / MIB:.0f}" for x in (loaded, peak, peak - loaded, figures["newly mapped"])]
            print(f"{name:18}{numbers[0]:>9}{numbers[1]:>10}{numbers[2]:>12}{numbers[3]:>20}")


if __name__ == "__main__":
    main()
