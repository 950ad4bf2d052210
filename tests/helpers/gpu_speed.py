"""What searches on a GPU cost beside the LM alone: one table, as Markdown. ``scripts/gpu_check.sh`` runs it.

    PYTHONPATH=.:tests python -m helpers.gpu_speed --output table.md [--model FOLDER] [--text FILE] [--tokens N]

Without ``--model`` a tiny random LM is made, without ``--text`` Python's own help is read: enough to see that all of it
runs, not for figures that say much.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import faiss
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knn_lm_eval import KNNHF, Datastore, build_index, dump_datastore
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.text import cut_into_documents

TEXT_CHARACTERS = 2000  # of each text that is scored
ROUNDS = 3
STREAMED = "exact, keys streamed"  # where the GPU says that none of its memory is free
GPU_MEMORY = 2**34  # for the index for a GPU, where there is none to ask


def make_model(folder: Path, text: str) -> None:
    """A small random LM, and a tokenizer of 1,000 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1000, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def seconds_of(lm: HFLM, texts: list[str]) -> tuple[float, float]:
    """The time of scoring the texts, the median of some rounds after one to warm up, and their log-likelihood."""
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    seconds, total = [], 0.0
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        total = sum(map(float, lm.loglikelihood_rolling(requests, disable_tqdm=True)))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), total


def systems(model: str, store: Datastore, k: int, batch_size: int) -> dict[str, Callable[[], HFLM]]:
    """What is compared, by name; each makes a model of lm-eval."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common: dict[str, Any] = {"batch_size": batch_size, "max_length": 512, "device": device}
    knn = common | {"datastore": store.path, "k": k, "lmbda": 0.25, "knn_temp": 10.0}

    return {
        "hf": lambda: HFLM(model, **common),
        "exact, keys in memory": lambda: KNNHF(model, knn_gpu=True, index="exact", **knn),
        STREAMED: lambda: KNNHF(model, knn_gpu=True, index="exact", **knn),
        "faiss-gpu": lambda: KNNHF(model, knn_gpu=True, index="gpu", **knn),
        "index on the CPU": lambda: KNNHF(model, index="index", **knn),
    }


def make_store(model: str, text: str, folder: Path) -> Datastore:
    """A store of the text, with the automatic index and one for GPUs."""
    pieces = cut_into_documents(text.splitlines(keepends=True), "line")
    store = dump_datastore(CausalHFLM(model, batch_size=8), pieces, folder / "store", model_args={"pretrained": model})
    build_index(store, k=256, quality_queries=512)
    memory = None if torch.cuda.is_available() else GPU_MEMORY
    build_index(store, name="gpu", hardware="gpu", gpu_memory=memory, k=256, quality_queries=512)
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a transformers model or its folder (default: a tiny random one)")
    parser.add_argument("--text", type=Path, help="a UTF-8 text: its last tenth is scored (default: Python's help)")
    parser.add_argument("--tokens", type=int, default=20000, help="scored at most, about (default: 20000)")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    arguments = parser.parse_args()
    text = arguments.text.read_text("utf-8") if arguments.text else "\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 9 // 10
    scored = text[cut : cut + 4 * arguments.tokens]
    texts = [scored[start : start + TEXT_CHARACTERS] for start in range(0, len(scored), TEXT_CHARACTERS)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = arguments.model
        if model is None:
            model = str(folder / "model")
            make_model(folder / "model", text)
        store = make_store(model, text[:cut], folder)
        k = min(arguments.k, len(store))
        rows, tokens, base = [], 0, 0.0
        for name, make in systems(model, store, k, arguments.batch_size).items():
            full = mock.patch("torch.cuda.mem_get_info", lambda device=None: (0, 2**30))
            with full if name == STREAMED else nullcontext():
                lm = make()
                tokens = tokens or sum(len(lm.tok_encode(one)) for one in texts)
                seconds, log_prob = seconds_of(lm, texts)
            base = base or seconds
            place = lm.retriever.searched_on if isinstance(lm, KNNHF) else str(lm.device)
            rows.append(
                f"| {name} | {place} | {tokens / seconds:,.0f} | {base / seconds:.2f} | {log_prob / tokens:.4f} |"
            )
            del lm
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: all of this ran on the CPU"
    table = [
        f"**{card}** ({platform.processor() or platform.machine()}; PyTorch {torch.__version__}, faiss "
        f"{faiss.__version__}): {len(store):,} entries of {store.dimension} numbers, {tokens:,} tokens scored, "
        f"k = {k}, model {arguments.model or 'tiny, random'}, median of {ROUNDS} rounds.",
        "",
        "| system | where it searched | tokens/s | of hf's speed | log p per token |",
        "|---|---|---:|---:|---:|",
        *rows,
    ]
    arguments.output.write_text("\n".join(table) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
