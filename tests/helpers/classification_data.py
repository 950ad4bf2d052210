"""Rows of the classification tasks, in local files as knnlm-limits has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOCAL: dict[str, list[dict[str, Any]]] = {
    "sst2/test.jsonl": [{"label": str(label), "text": f"a film of {label} stars ."} for label in (1, 2, 3, 4, 5)],
    "rotten_tomatoes/test.jsonl": [
        {"task": "rotten_tomatoes", "input": "the soundtrack is worth it .", "output": "positive", "options": []},
        {"task": "rotten_tomatoes", "input": "silly and tedious .", "output": "negative", "options": []},
    ],
    "mr/test.jsonl": [{"label": "0", "text": "simplistic ."}, {"label": "1", "text": "a joy ."}],
    "cr/test.jsonl": [{"label": "0", "text": "it does n't play ."}, {"label": "1", "text": "works well ."}],
    "rte/val.jsonl": [
        {"premise": "Dana had a cat.", "hypothesis": "Dana had an animal.", "label": "entailment", "idx": 0},
        {"premise": "Dana had a cat.", "hypothesis": "Dana had a dog.", "label": "not_entailment", "idx": 1},
    ],
    "cb/test.jsonl": [{"premise": "Nobody has said.", "hypothesis": "it is so", "idx": 0}],  # without labels, as there
    "cb/dev.jsonl": [{"premise": "Is there a shipment?", "hypothesis": "there is one", "label": "neutral", "idx": 1}],
    "agn/test.jsonl": [{"Class Index": "3", "Title": "Fears", "Description": "Unions say."}],
    "hyp/test.jsonl": [{"": "0", "text": "As seen on television ", "id": "0", "label": "1"}],
    "yahoo/test.jsonl": [{"topic": 4, "question_title": "why?", "best_answer": "a bug", "question_content": ""}],
}


def write_classification_data(folder: Path) -> None:
    """Write the files."""
    for name, rows in LOCAL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
