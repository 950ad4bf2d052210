"""How fast suffixes are sorted and n-grams looked up, beside a dictionary of 5-grams, on text as long as one likes.

``python tests/helpers/ngram_speed.py --values STORE/values.npy --tokens 1e6,1e7`` strings runs of 50 to 5,000 tokens of
real text together, with a tenth of the tokens exchanged, and looks up 20,000 tokens made the same way. CPU seconds of
one thread; the dictionary maps each 5-gram to how often each token follows, and gives p where the 5-gram is there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from texts import make_text_store

from knn_lm_eval.make.suffix_building import build_suffix_array
from knn_lm_eval.methods.ngrams import Ngrams
from knn_lm_eval.system.memory import resident_bytes

N = 5
QUERIES = 20_000
DOCUMENT = 1000  # tokens
MOST_IN_DICTIONARY = 10**7


def make_text(real: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int32 ``[count]``."""
    rng, text, at = np.random.default_rng(seed), np.empty(count, dtype=np.int32), 0
    while at < count:
        size = min(int(rng.integers(50, 5000)), count - at, len(real))
        start = int(rng.integers(0, len(real) - size + 1))
        text[at : at + size] = real[start : start + size]
        at += size
    exchanged = rng.random(count) < 0.1
    text[exchanged] = real[rng.integers(0, len(real), int(exchanged.sum()))]
    return text


def look_up(ngrams: Ngrams, queries: np.ndarray) -> dict[str, float]:
    """Microseconds a token."""
    rows, targets = np.arange(len(queries)), queries.astype(np.int64)
    for some in (queries[:50], queries):  # the first compiles
        start = time.process_time()
        matches = ngrams.matches(some, 0, len(some))
        ngrams.probabilities(matches, rows[: len(some)], targets[: len(some)])
        middle = time.process_time()
        ngrams.overlap_lengths(some)
        end = time.process_time()
    number = len(queries) / 1e6
    return {"p of a token": (middle - start) / number, "overlap": (end - middle) / number}


def dictionary(text: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Tokens a second of building it, and microseconds a token of looking up."""
    start, counts = time.process_time(), defaultdict(dict)
    tokens = text.tolist()
    for begin in range(0, len(tokens), DOCUMENT):
        document = tokens[begin : begin + DOCUMENT]
        for at in range(N, len(document)):
            following = counts[tuple(document[at - N : at])]
            following[document[at]] = following.get(document[at], 0) + 1
    middle, asked = time.process_time(), queries.tolist()
    for at in range(N, len(asked)):
        if (following := counts.get(tuple(asked[at - N : at]))) is not None:
            following.get(asked[at], 0) / sum(following.values())
    end = time.process_time()
    return {"million tokens a second": len(text) / (middle - start) / 1e6, "p": (end - middle) / len(queries) * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=Path, nargs="+", required=True, help="values.npy of real text")
    parser.add_argument("--tokens", default="1e6,1e7")
    arguments = parser.parse_args()
    real = np.concatenate([np.load(path) for path in arguments.values])
    queries = make_text(real, QUERIES, seed=1)
    for count in (int(float(number)) for number in arguments.tokens.split(",")):
        text = make_text(real, count, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            store = make_text_store(Path(folder) / "store", np.split(text, range(DOCUMENT, count, DOCUMENT)))
            start, clock = time.process_time(), time.perf_counter()
            ngrams = build_suffix_array(store)
            seconds, waited = time.process_time() - start, time.perf_counter() - clock
            print(f"{count:,} tokens: {count / seconds / 1e6:.2f} million a CPU second ({waited:.1f} s by the clock)")
            print("  memory:", resident_bytes())
            print("  microseconds a token:", {name: round(of, 2) for name, of in look_up(ngrams, queries).items()})
            del ngrams
        if count <= MOST_IN_DICTIONARY:
            print(f"  dictionary of {N}-grams:", {name: round(v, 2) for name, v in dictionary(text, queries).items()})


if __name__ == "__main__":
    main()
