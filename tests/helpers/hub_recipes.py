"""A hub on which recipes find what they name: tiny random models, and a WikiText of Python's documentation."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import torch
from helpers.hub_contents import Hub
from pyarrow import parquet
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

MODELS = ("neulab/distilgpt2-finetuned-wikitext103", "neulab/gpt2-finetuned-wikitext103")
WIKITEXT, CONFIG = "Salesforce/wikitext", "wikitext-103-raw-v1"
# A topic in so many goes to each split.
SPLITS = {"train": range(0, 6), "validation": range(6, 7), "test": range(7, 8)}


def publish_for_recipes(
    hub: Hub, tokenizer: PreTrainedTokenizerBase, folder: Path, most_rows: int | None = None
) -> None:
    """Put models and data on the hub under their real names; ``folder`` keeps the files.

    Of each split of the data there are at most ``most_rows``.
    """
    for seed, name in enumerate(MODELS):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=400,
            n_positions=1024,
            n_embd=64,  # which the papers' 64 quantizers divide
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.3,
        )
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        hub.add_model(name, folder / name)
    data = folder / WIKITEXT
    (data / CONFIG).mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: {CONFIG}/{split}-*\n" for split in SPLITS)
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: {CONFIG}\n  data_files:\n{files}---\n")
    for split in SPLITS:
        table = pyarrow.table({"text": wikitext_rows(split)[:most_rows]})
        parquet.write_table(table, data / CONFIG / f"{split}-00000-of-00001.parquet")
    hub.add_dataset(WIKITEXT, data)


def wikitext_rows(split: str) -> list[str]:
    """As the hub's data set has them: a row for a line, with its line end, blank lines as empty rows."""
    rows = []
    for number, name in enumerate(sorted(topics)):
        if number % 8 in SPLITS[split]:
            lines = [" ".join(line.split()) for line in topics[name].splitlines()]
            rows += ["", f" = {name} = \n", "", *(f" {line} \n" for line in lines if line)]
    return rows
