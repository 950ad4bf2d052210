"""Results files as lm-eval writes them, with figures made up."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def documents(count: int, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two methods' log-likelihoods and tokens, the first better by ``shift`` a token."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 60, count).astype(float)
    baseline = -tokens * generator.gamma(9, 1 / 3, count)
    ours = baseline + tokens * generator.normal(shift, 0.3, count)
    return np.stack([ours, tokens], axis=1), np.stack([baseline, tokens], axis=1)


def write_results(
    folder: Path,
    pairs: np.ndarray | None,
    value: float | None = None,
    stamp: str = "1",
    windows: Sequence[np.ndarray] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A results file with a perplexity task, as lm-eval writes it; ``changes`` go to its top level.

    ``windows`` are what each document's pair is the sum of, ``[windows, 2]``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if pairs is not None:
        value = math.exp(-pairs[:, 0].sum() / pairs[:, 1].sum())
        lines = [
            {
                "doc_id": number,
                "doc_hash": f"hash {number}",
                "filter": "none",
                "token_perplexity": [float(log_p), int(tokens)],
            }
            for number, (log_p, tokens) in enumerate(pairs)
        ]
        for line, of_document in zip(lines, windows or [], strict=False):
            line["token_perplexity_stderr"] = of_document.tolist()
        text = "".join(json.dumps(line) + "\n" for line in lines[::-1])  # lm-eval's order is not ours
        (folder / f"samples_law_{stamp}.jsonl").write_text(text)
    content = {
        "results": {"law": {"alias": "law", "token_perplexity,none": value, "token_perplexity_stderr,none": "N/A"}},
        "configs": {"law": {"metric_list": [{"metric": "token_perplexity", "aggregation": "weighted_perplexity"}]}},
        "versions": {"law": 1.0},
        "n-shot": {"law": 0},
        "higher_is_better": {"law": {"token_perplexity": False}},
        "n-samples": {"law": {"original": 2000, "effective": 2000 if pairs is None else len(pairs)}},
        "config": {"model": "hf", "model_args": {"pretrained": "models/m"}, "limit": None},
        "date": 1.0,
        "max_length": 1024,
        "tokenizer_bos_token": ["<s>", "0"],
        "model_name": "models/m",
    } | changes
    (folder / f"results_{stamp}.json").write_text(json.dumps(content))
    return content


def knn_config(**changes: Any) -> dict[str, Any]:
    """The configuration of a results file of kNN-LM; ``changes`` go to its retrieval part."""
    knn = {
        "k": 1024,
        "lmbda": 0.25,
        "knn_temp": 1.0,
        "context_len": 1,
        "datastore": {"path": "stores/law", "entries": 1000, "model": "models/m"},
        "index_bytes": 3 * 2**20,
        "tokens_scored": 600,
        "seconds": {"forward": 1.0, "search": 0.5},
    }
    return {"model": "knn-hf", "model_args": {"datastore": "stores/law"}, "limit": None, "knn": knn | changes}
