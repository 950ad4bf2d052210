"""What a user of the hub does in one process, whose libraries read where it is when they are imported.

``tests/test_through_the_hub.py`` runs it, and says where by the environment. It prints a JSON object in its last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers.places import TASKS


def main(store: str) -> None:
    """Publish the store, and evaluate with what the hub has."""
    import datasets
    from transformers import AutoModelForCausalLM

    from knn_lm_eval import fetch_datastore, push_datastore

    # The libraries alone: a model and a data set in parquet files.
    model = AutoModelForCausalLM.from_pretrained("org/tiny")
    rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="validation")["text"]
    # A store goes there, and an evaluation takes model, store and text from there.
    address = push_datastore(store, "me/store", "cc-by-sa-4.0", model="org/tiny")
    said = {
        "weights": float(sum(weights.detach().double().abs().sum() for weights in model.parameters())),
        "rows": list(rows),
        "perplexity": perplexity("org/tiny", address),
        "folder": str(fetch_datastore(address)),
    }
    print("\n" + json.dumps(said))


def perplexity(model: str, datastore: str | Path) -> float:
    """Of WikiText's test split, by lm-eval."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="knn-hf",
        model_args=f"pretrained={model},max_length=64,datastore={datastore},k=8,lmbda=0.5,dtype=float32",
        tasks=["wikitext103"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    return results["results"]["wikitext103"]["token_perplexity,none"]


if __name__ == "__main__":
    main(*sys.argv[1:])
