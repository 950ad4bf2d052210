"""Dumping straight into an index beside dumping keys, and building the index from them: time and disk, in one run.

    python tests/helpers/keyless_speed.py MODEL TEXT [--tokens 30000] [--rounds 1] [--output FOLDER]

The two ways take turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import add, sub
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import torch

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make import index_dump
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.search.passing_keys import NearestOfRuns
from knn_lm_eval.store.datastore import Datastore

WAYS = ("keys", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=1, help="how often each way is measured; the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="where the stores are written, and stay (default: nowhere)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    lm = CausalHFLM(arguments.model, device="cpu", dtype="bfloat16")
    folder = arguments.output or Path(tempfile.mkdtemp(prefix="keyless_speed-"))
    stages = timed_stages()
    spent: dict[str, list[Spent]] = {way: [] for way in (*WAYS, "build_index")}
    sizes: dict[str, int] = {}
    for number in range(arguments.rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            store = folder / f"{way}{number}"
            spent[way].append(time_of(partial(dump, lm, arguments.text, store, arguments.tokens, way)))
            if way == "keys":
                spent["build_index"].append(time_of(partial(build_index, Datastore.open(store))))
            sizes[way] = sum(path.stat().st_size for path in store.iterdir() if path.is_file())
    least = {way: Spent(*map(min, zip(*times, strict=True))) for way, times in spent.items()}
    with_index = Spent(*map(sum, zip(least["keys"], least["build_index"], strict=True)))
    training = (total / arguments.rounds for total in stages["train_index"])
    told: dict[str, Any] = {
        "tokens": arguments.tokens,
        "seconds": {way: [round(one.seconds, 1) for one in times] for way, times in spent.items()},
        "CPU seconds": {way: [round(one.cpu_seconds, 1) for one in times] for way, times in spent.items()},
        "tokens a second": {way: round(arguments.tokens / least[way].seconds) for way in WAYS},
        "speed without keys": least["none"].beside(least["keys"]),
        "speed without keys, training aside": Spent(*map(sub, least["none"], training)).beside(least["keys"]),
        "speed without keys beside keys and build_index": least["none"].beside(with_index),
        "bytes": sizes,
        "CPU seconds of stages, in all rounds": {name: round(one.cpu_seconds, 1) for name, one in stages.items()},
    }
    print(json.dumps(told, indent=1))
    if arguments.output is None:
        shutil.rmtree(folder)


class Spent(NamedTuple):
    """Time on the clock, and of all this process's threads."""

    seconds: float
    cpu_seconds: float

    def beside(self, other: Spent) -> str:
        """How fast that is beside another."""
        by_clock, by_cpu = (theirs / ours for ours, theirs in zip(self, other, strict=True))
        return f"{by_clock:.3f} (by CPU time {by_cpu:.3f})"


def time_of(work: Callable[[], object]) -> Spent:
    """Do it, and say how long it took."""
    began = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - began[0], time.process_time() - began[1])


def timed_stages() -> dict[str, Spent]:
    """What a dump's stages beside the LM take from now on, in all."""
    stages = {name: Spent(0.0, 0.0) for name in ("train_index", "write_segment", "compare_with_exact", "take")}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            found: list[Any] = []
            spent = time_of(lambda: found.append(work(*arguments, **more)))
            stages[name] = Spent(*map(add, stages[name], spent))
            return found[0]

        return call

    for name in stages:
        owner: Any = NearestOfRuns if name == "take" else index_dump
        setattr(owner, name, timed(name, getattr(owner, name)))
    return stages


def dump(lm: CausalHFLM, text: Path, output: Path, tokens: int, way: str) -> None:
    """Dump the first tokens of a text, with keys or without."""
    pieces = TextSource(text, documents="file").pieces()
    dump_datastore(lm, pieces, output, max_tokens=tokens, keys="none" if way == "none" else "all")


if __name__ == "__main__":
    main()
