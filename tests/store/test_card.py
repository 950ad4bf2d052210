"""The card of a published datastore."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from helpers.stores import make_store

from knn_lm_eval.store.card import dataset_card, size_category
from knn_lm_eval.store.manifest import Manifest

ADDRESS = "hf://datasets/me/store"
ROWS = [
    {"probe": 1, "recall": 0.5, "exact_cost": 0.1, "exact_cost_bound": 0.2},
    # The last two are against the highest probe.
    {
        **{"probe": 8, "recall": 0.91234, "exact_cost": 0.0036, "exact_cost_bound": 0.0101},
        **{"perplexity_cost": 0.0012, "perplexity_cost_bound": 0.0034},
    },
]
INDEX = {"factory": "IVF16,RaBitQfs", "sim_func": "l2", "probe": 8, "quality": ROWS, "bytes": 58_126}
HOW: dict[str, Any] = {"size": 193_477, "indexes": {"index": INDEX}, "clusters": {"kmeans": 20}}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_store(tmp_path_factory.mktemp("stores") / "store").manifest


def card(manifest: Manifest, **how: Any) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card."""
    whole = dataset_card(manifest, ADDRESS, "mit", **(HOW | how))
    head, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", whole, re.DOTALL).groups()
    return yaml.safe_load(head), text


def test_its_name_is_escaped_in_the_text_alone(manifest: Manifest) -> None:
    named = replace(manifest, source={"dataset": "python_docs", "split": "train"}, model={"pretrained": "org/a_b"})
    metadata, text = card(named)
    assert metadata["pretty_name"] == "kNN-LM datastore: python_docs train under org/a_b"
    assert "# kNN-LM datastore: python\\_docs train under org/a\\_b\n" in text


def test_it_says_what_the_store_is(manifest: Manifest) -> None:
    manifest = replace(
        manifest,
        documents=7,
        source={"dataset": "Salesforce/wikitext", "config": "wikitext-103-raw-v1", "split": "train"},
        model={"pretrained": "org/tiny", "args": {}, "dtype": "bfloat16"},
        windows={"max_length": 1024, "stride": 512, "batch_size": 4, "prefix_token_id": 1},
        created="2026-01-02T03:04:05+00:00",
        versions={"knn_lm_eval": "0.2.0"},
    )
    metadata, text = card(manifest)
    named = "Salesforce/wikitext wikitext-103-raw-v1 train"
    assert metadata["license"] == "mit" and metadata["size_categories"] == ["1K<n<10K"] and not metadata["viewer"]
    assert metadata["pretty_name"] == f"kNN-LM datastore: {named} under org/tiny" and "knn-lm" in metadata["tags"]
    for said in (
        "| language model | [`org/tiny`](https://huggingface.co/org/tiny), in `bfloat16` |",
        f"| text | `{named}` |",
        "| entries (tokens) | 3,000 |",
        "| documents | 7 |",
        "| numbers per key | 16 |",
        "| read in windows of | 1,024 tokens, of which 512 are new |",
        "| bytes | 193,477 |",
        "| made | 2026-01-02, by knn-lm-eval 0.2.0 |",
        "| `index` | `IVF16,RaBitQfs` | `l2` | 8 | 0.912 | 0.36% (1.01%) | 58,126 |",
        "| `kmeans` | 20 |",
        "lm_eval --model knn-hf --model_args pretrained=org/tiny,datastore=hf://datasets/me/store --tasks",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"k": 256, "knn_temp": 2.5, "lmbda": 0.25}, ",k=256,knn_temp=2.5,lmbda=0.25"),
        ({"k": 256, "lmbda": {"kind": "gate"}}, ""),
        ({"k": 256, "min_knns": 9}, ""),
        (None, ""),
    ],
)
def test_tuned_settings_stand_in_the_example(manifest: Manifest, settings: dict | None, arguments: str) -> None:
    assert f"pretrained=MODEL,datastore={ADDRESS}{arguments} --tasks" in card(manifest, settings=settings)[1]


def test_folders_are_not_named_and_nothing_is_said_that_is_not_known(manifest: Manifest) -> None:
    manifest = replace(
        manifest,
        keys=None,
        projection={"from": 576},
        source={"text": "/home/me/thesis/train.txt"},
        model={"pretrained": "/home/me/models/tiny", "args": {}},
    )
    index = {"factory": "Flat", "sim_func": "l2", "probe": None, "quality": "not measured", "bytes": 1}
    _, text = card(manifest, indexes={"index": index}, clusters={})
    assert "/home" not in text and "`train.txt`" in text and "| language model | `tiny` |" in text
    assert "16, projected from 576; keys are in the indexes alone" in text
    assert "| not measured | not measured |" in text and "## Clusters" not in text
    assert "[`org/tiny`]" in card(manifest, model="org/tiny")[1]


@pytest.mark.parametrize(
    "name", ["a|b`c`\n# d\x1b[2J", "<script>x</script>", "---\nlicense: none", "*" * 9999, "[x](y)"]
)
def test_names_are_shown_as_they_are(manifest: Manifest, name: str) -> None:
    metadata, text = card(replace(manifest, source={"text": name}, key_module=name))
    assert metadata["license"] == "mit" and len(text) < 4000
    assert not re.search(r"[\x00-\x08\x0b-\x1f]|^# d|^license", text, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)(?:<script|\[x\]\()", re.sub(r"`[^`\n]*`", "", text))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 8}


@pytest.mark.parametrize(
    ("count", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**6, "1M<n<10M"), (10**9, "1B<n<10B")]
    + [(10**12 - 1, "100B<n<1T"), (10**12, "n>1T")],
)
def test_sizes_have_the_hubs_names(count: int, name: str) -> None:
    assert size_category(count) == name
