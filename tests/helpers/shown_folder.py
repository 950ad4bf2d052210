"""The folder in which shown commands run: a checkout with the model, texts, datastores and files that pages name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow
from helpers.classification_data import write_classification_data
from helpers.hub_contents import Hub
from helpers.hub_recipes import publish_for_recipes
from helpers.places import REPO
from helpers.shown_tables import ANYWHERE
from helpers.tiny_model import make_llama
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.appending import append_documents
from knn_lm_eval.make.clustering import cluster_kmeans
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import TextSource
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore

WINDOW = 2048  # of the model: with gsm8k's five examples, and room for what is generated
# Lines of so many words, and how many.
TEXTS = {
    **{"train.txt": (25, 40), "law.txt": (25, 32), "opinions-2020.txt": (25, 8), "wikipedia.txt": (25, 40)},
    **{"python.txt": (25, 40), "test.txt": (25, 4), "law_test.txt": (25, 4), "more.txt": (25, 2)},
    **{"raise.txt": (12, 1), "wiki.train.raw": (25, 40)},
    **{"DATA/law/train.en": (12, 80), "DATA/law/dev.en": (12, 8), "DATA/law/test.en": (12, 8)},
}
STORES = {
    "train.txt": ("stores/m-train", "stores/m-law", "stores/2m", "stores/410k", "FOLDER"),
    "law.txt": ("stores/law",),
    "wikipedia.txt": ("stores/wikipedia", "stores/wiki", "stores/m-wiki"),
    "python.txt": ("stores/python", "first_run/store"),
}
DATASET = "me/NAME"


def make_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make all of it, in an empty folder."""
    for name, text in (texts() | ANYWHERE).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    write_classification_data(folder / "DATA")
    for name in ("scripts", "tests"):
        (folder / name).symlink_to(REPO / name)
    make_llama(max_position_embeddings=WINDOW).save_pretrained(folder / "M")
    tokenizer.save_pretrained(folder / "M")
    for name, there in {"data": "DATA", "HuggingFaceTB/SmolLM2-135M": "../M"}.items():  # of the examples in help
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(there)
    (folder / "stores").mkdir()
    make_stores(folder)
    shutil.copytree(folder / "DATA", folder / "FOLDER", dirs_exist_ok=True)
    write_published_files(folder / "checkpoints" / "gpt2")


def texts() -> dict[str, str]:
    """The texts, of other words each."""
    words = iter(" ".join(topics[name] for name in sorted(topics)).split())
    return {
        name: "".join(" ".join(next(words) for _ in range(length)) + "\n" for _ in range(lines))
        for name, (length, lines) in TEXTS.items()
    }


def make_stores(folder: Path) -> None:
    lm = CausalHFLM(str(folder / "M"), device="cpu")
    for text, (name, *copies) in STORES.items():
        source = TextSource(folder / text)
        store = dump_datastore(
            lm,
            source.pieces(),
            folder / name,
            source=source.description(),
            model_args={"pretrained": str(folder / "M")},
        )
        if text == "law.txt":
            more = TextSource(folder / "opinions-2020.txt")
            append_documents(store.path, lm, more.pieces(), source=more.description())
        for index, factory in {"index": "IVF16,RaBitQfs", "ivfpq": "IVF16,PQ4x4"}.items():
            build_index(Datastore.open(store.path), factory, name=index, quality_queries=0)
        cluster_kmeans(Datastore.open(store.path), num_clusters=60)
        for copy in copies:
            shutil.copytree(store.path, folder / copy)


def write_published_files(folder: Path) -> None:
    """A datastore as knn-transformers writes it, of random keys."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    keys = generator.standard_normal((1500, 64)).astype(np.float16)
    for name, array in (("keys", keys), ("vals", generator.integers(0, 400, 1500, dtype=np.int32))):
        (folder / f"dstore_gpt2_1500_64_{name}.npy").write_bytes(array.tobytes())


def publish(hub: Hub, tokenizer: PreTrainedTokenizerBase, folder: Path, own: Path) -> None:
    """Put on the hub what pages take from there; ``own`` keeps files."""
    publish_for_recipes(hub, tokenizer, own, most_rows=60)
    hub.add_dataset(DATASET, folder / "stores" / "m-train")
    question = {"id": "1", "question": "What is it?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}}
    sum_of = {"question": "What is 1 + 1?", "answer": "1 and 1.\n#### 2"}
    article = {"page": "\n = A title = \n \n A text of some words . \n"}
    for name, config, rows in (
        ("allenai/ai2_arc", "ARC-Easy", [question | {"answerKey": "B"}] * 2),
        ("openai/gsm8k", "main", [sum_of] * 5),
        ("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", [article] * 2),
    ):
        publish_rows(hub, name, config, rows, own)


def publish_rows(hub: Hub, name: str, config: str, rows: Sequence[dict[str, object]], own: Path) -> None:
    """A data set of which each split has these rows."""
    folder, splits = own / name, ("train", "validation", "test")
    (folder / config).mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    for split in splits:
        table = pyarrow.Table.from_pylist(list(rows))
        parquet.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    hub.add_dataset(name, folder)
