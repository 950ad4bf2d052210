"""Dumping straight into an index beside dumping keys, and building the index from them: time and disk, in one run.

    python tests/helpers/keyless_speed.py MODEL TEXT [--tokens 30000] [--rounds 1] [--output FOLDER]

The two ways take turns, part by part of the text, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.search.indexing import build_index
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
    lm = CausalHFLM(arguments.model, device="cpu", dtype="bfloat16")
    folder = arguments.output or Path(tempfile.mkdtemp(prefix="keyless_speed-"))
    seconds: dict[str, list[float]] = {way: [] for way in (*WAYS, "build_index")}
    sizes: dict[str, dict[str, int]] = {}
    for number in range(arguments.rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            store = folder / f"{way}{number}"
            began = time.perf_counter()
            dump(lm, arguments.text, store, arguments.tokens, way)
            seconds[way].append(time.perf_counter() - began)
            if way == "keys":
                began = time.perf_counter()
                build_index(Datastore.open(store))
                seconds["build_index"].append(time.perf_counter() - began)
            sizes[way] = {path.name: path.stat().st_size for path in sorted(store.iterdir()) if path.is_file()}
    told: dict[str, Any] = {
        "tokens": arguments.tokens,
        "seconds": {way: [round(value, 1) for value in values] for way, values in seconds.items()},
        "tokens a second": {way: round(arguments.tokens / min(seconds[way])) for way in WAYS},
        "without keys beside with keys": round(min(seconds["keys"]) / min(seconds["none"]), 3),
        "the same with build_index": round(
            (min(seconds["keys"]) + min(seconds["build_index"])) / min(seconds["none"]), 3
        ),
        "bytes": {way: sum(of.values()) for way, of in sizes.items()},
    }
    print(json.dumps(told, indent=1))
    if arguments.output is None:
        shutil.rmtree(folder)


def dump(lm: CausalHFLM, text: Path, output: Path, tokens: int, way: str) -> None:
    """Dump the first tokens of a text, with keys or without."""
    pieces = TextSource(text, documents="file").pieces()
    dump_datastore(lm, pieces, output, max_tokens=tokens, keys="none" if way == "none" else "all")


if __name__ == "__main__":
    main()
