"""The perplexity tasks: where their texts come from, and what they measure."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from helpers.places import TASKS
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knn_lm_eval.errors import UserError
from knn_lm_eval.model.scores import RollingLoglikelihood
from knn_lm_eval.tasks import corpora, perplexity

NAMES = ["wikitext103", "wikitext103_valid", "wikitext103_docs", "law", "law_valid", "python_docs"]
GROUP = NAMES[:-1]

RAW = (
    " \n = Grey heron = \n \n The grey heron ( Ardea cinerea ) is a long @-@ legged bird . It eats fish .\n"
    " \n = = Habitat = = \n \n Lakes , rivers , and the sea 's shore ; at 1 @,@ 200 m it is rare .\n"
    " \n = = = Winter = = = \n \n Some stay , some fly south . It 's a matter of ice = no food = .\n"
    " \n = Kiln ( oven ) = \n \n A kiln is an oven for pots . Heat \u2013 up to 1 @.@ 3 k \u00b0 C .\n \n"
)
LAW_TEST = "Article 1\n\nThe Member States shall apply this Directive.\n   \nDone at Brussels.\n"
LAW_DEV = "Regulation (EC) No 1/2004\nHaving regard to the Treaty,\n"


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(corpora.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests_cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def hub_rows(raw: str) -> list[str]:
    """The raw file as the hub's data set has it: a row per line, blank ones emptied."""
    return [line if line.strip() else "" for line in raw.splitlines(keepends=True)]


def write_parquet(file: Path, **columns: list[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(str(file))
    return file


@pytest.fixture
def data(tmp_path) -> Path:
    """One folder for all tasks."""
    folder = tmp_path / "data"
    write(folder / "wikitext103" / "wiki.test.raw", RAW)
    write(folder / "wikitext103" / "wiki.valid.raw", RAW.replace("heron", "goose"))
    write(folder / "law" / "test.en", LAW_TEST)
    write(folder / "law" / "dev.en", LAW_DEV)
    return folder


def make_hub(folder: Path, **columns: list[str]) -> dict[str, str]:
    """A local folder laid out like a data set on the hub."""
    config = "wikitext-103-raw-v1"
    write(
        folder / "README.md",
        "---\nconfigs:\n- config_name: other\n  data_files: other/*\n"
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("test", "validation"))
        + "---\n",
    )
    wrong = {name: ["wrong"] for name in columns}
    write_parquet(folder / config / "test-00000-of-00001.parquet", **columns)
    write_parquet(folder / config / "validation-00000-of-00001.parquet", **wrong)
    write_parquet(folder / "other" / "test-00000-of-00001.parquet", **wrong)
    return {"path": str(folder), "name": config}


def manager(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def load(name: str, **metadata: Any):
    return manager(**metadata).load([name])["tasks"][name]


def texts(name: str, **metadata: Any) -> list[str]:
    task = load(name, **metadata)
    return [task.doc_to_target(doc) for doc in task.eval_docs]


# --- WikiText-103 -----------------------------------------------------------------------------------------


def test_wikitext103_is_the_whole_file_as_one_document(data) -> None:
    assert texts("wikitext103", data_dir=str(data)) == [RAW]
    assert texts("wikitext103_valid", data_dir=str(data)) == [RAW.replace("heron", "goose")]


def test_rows_of_the_hub_give_the_text_of_the_raw_file() -> None:
    rows = hub_rows(RAW)
    assert "" in rows
    assert corpora.text_of_rows(rows) == RAW


def test_wikitext103_loads_from_the_hub(tmp_path) -> None:
    hub = make_hub(tmp_path / "hub", text=hub_rows(RAW))
    assert corpora.wikitext103(**hub, split="test")["test"]["text"][:] == [RAW]


def test_wikitext103_docs_loads_from_the_hub(tmp_path) -> None:
    pages = corpora.articles(RAW)
    hub = make_hub(tmp_path / "hub", page=pages)
    assert corpora.wikitext103_docs(**hub, split="test")["test"]["page"][:] == pages


def test_the_task_files_name_the_hubs_data_sets() -> None:
    sources = {}
    for name in NAMES:
        kwargs = manager().task_index[name].cfg.get("dataset_kwargs", {})
        sources[name] = (kwargs.get("path"), kwargs.get("name"), kwargs.get("split"))
    config = "wikitext-103-raw-v1"
    assert sources["wikitext103"] == ("Salesforce/wikitext", config, "test")
    assert sources["wikitext103_valid"] == ("Salesforce/wikitext", config, "validation")
    assert sources["wikitext103_docs"] == ("EleutherAI/wikitext_document_level", config, "test")


def test_a_failing_hub_is_said_in_one_sentence(tmp_path) -> None:
    with pytest.raises(UserError, match=r"could not be loaded .* give it by --metadata data_dir=FOLDER") as e:
        corpora.wikitext103(str(tmp_path / "none"), "wikitext-103-raw-v1", "test")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name",
    ["wiki.test.raw", "test.raw", "wiki.test.tokens", "test.txt", "WT103_test.raw", "sub/wiki.test.raw"],
)
@pytest.mark.parametrize("inner", ["", "wikitext103", "wikitext-103-raw"])
def test_finds_the_test_file(tmp_path, name, inner) -> None:
    write(tmp_path / inner / name, RAW)
    write(tmp_path / inner / name.replace("test", "train"), "not this\n")
    write(tmp_path / inner / name.replace("test", "latest"), "nor this\n")
    assert texts("wikitext103", data_dir=str(tmp_path)) == [RAW]


@pytest.mark.parametrize("name", ["wiki.valid.raw", "valid.tokens", "validation.txt"])
def test_finds_the_validation_file(tmp_path, name) -> None:
    write(tmp_path / name, RAW)
    write(tmp_path / "test.raw", "not this\n")
    assert texts("wikitext103_valid", data_dir=str(tmp_path)) == [RAW]


def test_prefers_raw_files_to_tokens(tmp_path) -> None:
    write(tmp_path / "wiki.test.tokens", "<unk>\n")
    write(tmp_path / "wiki.test.raw", RAW)
    assert texts("wikitext103", data_dir=str(tmp_path)) == [RAW]


def test_parquet_shards_are_joined_in_order(tmp_path) -> None:
    rows = hub_rows(RAW)
    for i in range(3):
        part = rows[i * 7 : (i + 1) * 7] if i < 2 else rows[14:]
        write_parquet(tmp_path / "wikitext-103-raw-v1" / f"test-0000{i}-of-00003.parquet", text=part)
    write_parquet(tmp_path / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", text=["not this"])
    assert texts("wikitext103", data_dir=str(tmp_path)) == [RAW]


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.5, 0.999])
def test_a_fraction_of_one_document_is_its_first_lines(data, fraction: float) -> None:
    """As few as have so much of the text; what lm-eval can limit itself is left alone."""
    (whole,) = texts("wikitext103", data_dir=str(data))
    (first,) = texts("wikitext103", data_dir=str(data), text_fraction=fraction)
    assert whole.startswith(first) and first.strip() and len(first) >= fraction * len(whole)
    lines = first.splitlines(keepends=True)
    assert first == whole or first.endswith("\n")
    assert not "".join(lines[:-1]).strip() or len("".join(lines[:-1])) < fraction * len(whole)
    assert texts("law", data_dir=str(data), text_fraction=fraction) == texts("law", data_dir=str(data))


@pytest.mark.parametrize("fraction", [0, 1.5, True, "half", float("nan")])
def test_what_is_no_fraction_of_a_text(data, fraction: object) -> None:
    with pytest.raises(UserError, match=r"text_fraction=.* should be a number above 0 and at most 1"):
        texts("wikitext103", data_dir=str(data), text_fraction=fraction)


def test_the_environment_variable_gives_the_folder_and_metadata_comes_first(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(corpora.DATA_VARIABLE, str(data))
    assert texts("wikitext103") == [RAW]
    other = write(tmp_path / "other" / "test.raw", "other\n")
    assert texts("wikitext103", data_dir=str(other.parent)) == ["other\n"]


def test_a_folder_with_law_only_leaves_wikitext_to_the_hub(tmp_path) -> None:
    hub = make_hub(tmp_path / "hub", text=hub_rows(RAW))
    for file in ("a/law/test.en", "b/test.en"):
        folder = write(tmp_path / file, LAW_TEST).parents[1 if "law" in file else 0]
        assert corpora.wikitext103(**hub, split="test", data_dir=folder)["test"]["text"][:] == [RAW]


def test_windows_line_ends_and_byte_order_mark_do_not_count(tmp_path) -> None:
    write(tmp_path / "test.raw", b"\xef\xbb\xbf" + RAW.replace("\n", "\r\n").encode())
    assert texts("wikitext103", data_dir=str(tmp_path)) == [RAW]


def test_articles_start_at_titles_and_not_at_sections() -> None:
    pages = corpora.articles(RAW)
    assert [page.split("\n")[0] for page in pages] == [" = Grey heron = ", " = Kiln ( oven ) = "]
    assert " \n" + "\n".join(pages) == RAW


def test_wikitext103_docs_detokenizes_and_counts_as_lm_evals_wikitext(data) -> None:
    task = load("wikitext103_docs", data_dir=str(data))
    pages = corpora.articles(RAW)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [
        wikitext_detokenizer({"page": page}) for page in pages
    ]
    assert "long-legged" in task.doc_to_target(task.eval_docs[0])
    metrics = task.process_results(task.eval_docs[0], [RollingLoglikelihood(-9.0, 4)])
    assert metrics["word_perplexity"] == (-9.0, len(re.split(r"\s+", pages[0])))
    assert metrics["bits_per_byte"] == metrics["byte_perplexity"] == (-9.0, len(pages[0].encode()))


# --- Law-MT -------------------------------------------------------------------------------------------------


def test_law_takes_each_line_as_a_document_and_drops_blank_ones(data) -> None:
    assert texts("law", data_dir=str(data)) == [
        "Article 1",
        "The Member States shall apply this Directive.",
        "Done at Brussels.",
    ]
    assert texts("law_valid", data_dir=str(data)) == LAW_DEV.splitlines()


def test_law_accepts_the_inner_folder_too(data) -> None:
    assert texts("law_valid", data_dir=str(data / "law")) == LAW_DEV.splitlines()


def test_a_sentence_ends_at_a_line_feed_only(tmp_path) -> None:
    write(tmp_path / "test.en", "one\u2028still one\x0cand still\r\ntwo")
    assert texts("law", data_dir=str(tmp_path)) == ["one\u2028still one\x0cand still", "two"]


def test_law_without_a_folder_says_where_the_data_is(tmp_path) -> None:
    with pytest.raises(UserError, match=r"Aharoni & Goldberg 2020.*unsupervised-domain-clusters.*test\.en"):
        load("law")
    with pytest.raises(UserError, match=r"no dev\.en in .*github\.com/roeeaharoni.*data_dir=FOLDER"):
        write(tmp_path / "test.en", LAW_TEST)
        load("law_valid", data_dir=str(tmp_path))


# --- Bad folders and files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("wikitext103", "readme.md", "no data", r"no WikiText-103 test file in .*whose name contains 'test'"),
        ("wikitext103_valid", "test.raw", RAW, r"no WikiText-103 validation file in .*contains 'valid'"),
        ("wikitext103", "wikitext103/x", "", r"no WikiText-103 test file in .*wikitext103:"),
        ("wikitext103", "test.raw", "\n \n", r"test\.raw has no text"),
        ("wikitext103_docs", "test.raw", b"caf\xe9\n", r"test\.raw is not UTF-8 text \(byte 3\)"),
        ("wikitext103", "test.parquet", "PAR?", r"test\.parquet cannot be read as a parquet file"),
        ("law", "test.en", "\n\n", r"test\.en has no text"),
        ("law", "law/test.en", b"\xff\xfe", r"test\.en is not UTF-8 text"),
    ],
)
def test_bad_data_is_said_in_one_sentence(tmp_path, task, file, content, message) -> None:
    write(tmp_path / file, content)
    with pytest.raises(UserError, match=message) as e:
        load(task, data_dir=str(tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", GROUP)
def test_a_missing_folder_is_named_with_its_source(tmp_path, monkeypatch, name) -> None:
    with pytest.raises(UserError, match=r"nowhere \(given by --metadata data_dir\) does not exist"):
        load(name, data_dir=str(tmp_path / "nowhere"))
    monkeypatch.setenv(corpora.DATA_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=rf"nowhere \(given by {corpora.DATA_VARIABLE}\) does not exist"):
        load(name)


def test_never_chooses_between_several_files(tmp_path) -> None:
    write(tmp_path / "wikitext-2" / "wiki.test.raw", "a\n")
    write(tmp_path / "wikitext-200" / "wiki.test.raw", "b\n")
    with pytest.raises(UserError, match=r"several WikiText-103 test files \(.*wikitext-2/.*wikitext-200/"):
        load("wikitext103", data_dir=str(tmp_path))


def test_a_parquet_file_of_another_data_set_is_refused(tmp_path) -> None:
    write_parquet(tmp_path / "test.parquet", page=["x"])
    with pytest.raises(UserError, match=r"no column 'text' \(but page\)"):
        load("wikitext103", data_dir=str(tmp_path))


# --- Python's documentation ---------------------------------------------------------------------------------


def test_python_docs_holds_out_every_eighth_topic() -> None:
    from pydoc_data.topics import topics

    names = sorted(topics)
    assert corpora.python_docs_split("test") == [topics[name] for name in names[::8]]
    train = corpora.python_docs_split("train")
    assert train == [topics[name] for i, name in enumerate(names) if i % 8]
    task = load("python_docs")
    assert task.test_docs()["text"][:] == corpora.python_docs_split("test")
    assert task.training_docs()["text"][:] == train


# --- Metrics ------------------------------------------------------------------------------------------------


def tiny_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([RAW, LAW_TEST, LAW_DEV], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adds_bos"])
def tiny_lm(request, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("lm"))
    tokenizer = tiny_tokenizer(adds_bos=request.param)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def by_hand(folder: str, text: str) -> tuple[float, int]:
    """Log-likelihood in float64 and number of tokens, over lm-eval's windows of at most 48 tokens."""
    lm = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = tokenizer.encode(text)
    context = [tokenizer.bos_token_id, *tokens]
    total, scored = 0.0, 0
    while scored < len(tokens):
        end = min(scored + 48, len(tokens))
        window = context[max(0, end - 48) : end]
        with torch.no_grad():
            log_p = lm(torch.tensor([window])).logits[0].log_softmax(-1)
        targets = torch.tensor(tokens[scored:end])
        total += log_p[-len(targets) :].gather(1, targets[:, None]).sum().item()
        scored = end
    return total, len(tokens)


def evaluate(name: str, model: Any = "hf", metadata: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    model_args = kwargs.pop("model_args", None)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[name],
        task_manager=manager(**{**(model_args or {}), **(metadata or {})}),
        device="cpu",
        bootstrap_iters=0,
        **kwargs,
    )


def values(results: Any, name: str) -> dict[str, float]:
    return {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if key.endswith(",none") and "_stderr" not in key
    }


def args_of(folder: str) -> dict[str, str]:
    return {"pretrained": folder, "dtype": "float32"}


@pytest.mark.parametrize("name", ["law", "wikitext103", "wikitext103_docs"])
def test_hf_gets_the_perplexities_computed_by_hand(tiny_lm, data, name) -> None:
    results = evaluate(name, model_args=args_of(tiny_lm), metadata={"data_dir": str(data)}, batch_size=3)

    task = load(name, data_dir=str(data))
    scores = [by_hand(tiny_lm, task.doc_to_target(doc)) for doc in task.eval_docs]
    total, tokens = (sum(column) for column in zip(*scores, strict=True))
    originals = [doc["page"] if "page" in doc else doc["text"] for doc in task.eval_docs]
    words = sum(len(re.split(r"\s+", text)) for text in originals)
    num_bytes = sum(len(text.encode()) for text in originals)
    assert values(results, name) == pytest.approx(
        {
            "token_perplexity": math.exp(-total / tokens),
            "word_perplexity": math.exp(-total / words),
            "byte_perplexity": math.exp(-total / num_bytes),
            "bits_per_byte": -total / num_bytes / math.log(2),
        },
        rel=1e-5,
    )
    for metric in values(results, name):
        assert results["higher_is_better"][name][metric] is False


@pytest.mark.parametrize("bos", [None, True, False])
def test_counts_tokens_as_hf_encodes(tiny_lm, bos) -> None:
    given = {} if bos is None else {"add_bos_token": bos}
    hf = HFLM(**args_of(tiny_lm), device="cpu", **given)
    count = perplexity.token_counter({**args_of(tiny_lm), **given})
    for text in ["", "A kiln", "<s>A kiln", " = Grey heron = \n", "\u20ac"]:
        assert count(text) == len(hf.tok_encode(text))


def test_counts_with_the_tokenizer_given_beside_the_model(tiny_lm, tmp_path) -> None:
    text = "The grey heron"
    expected = len(PreTrainedTokenizerFast.from_pretrained(tiny_lm).encode(text))
    for args in (
        {"tokenizer": tiny_lm},
        {"tokenizer": tiny_lm, "pretrained": str(tmp_path), "revision": 7, "dtype": "float32"},
        {"pretrained": str(tmp_path), "subfolder": os.path.basename(tiny_lm), "revision": None},
        {"tokenizer": PreTrainedTokenizerFast.from_pretrained(tiny_lm), "pretrained": object()},
        {"pretrained": LlamaForCausalLM.from_pretrained(tiny_lm)},
    ):
        if "subfolder" in args:
            args["pretrained"] = os.path.dirname(tiny_lm)
        assert perplexity.token_counter(args)(text) == expected


class CannedLM(LM):
    """Gives every text two nats a token; says how many tokens it saw where it is told to."""

    def __init__(self, tells_tokens: bool, searches_of_4: int | None = None) -> None:
        super().__init__()
        self.tells_tokens, self.searches_of_4 = tells_tokens, searches_of_4
        self.texts: list[str] = []

    def loglikelihood_rolling(self, requests) -> list[float]:
        scores = []
        for (text,) in (request.args for request in requests):
            self.texts.append(text)
            tokens = 4 * len(text)
            searches = None if self.searches_of_4 is None else self.searches_of_4 * len(text)
            score = RollingLoglikelihood(-2.0 * tokens, tokens, searches)
            scores.append(score if self.tells_tokens else float(score))
        return scores

    def loglikelihood(self, requests) -> None:
        raise NotImplementedError

    def generate_until(self, requests) -> None:
        raise NotImplementedError


def test_takes_the_number_of_tokens_from_an_lm_that_tells(data, tiny_lm) -> None:
    # Even where the arguments name a tokenizer: the LM knows better.
    results = evaluate("law", CannedLM(True), {"data_dir": str(data), "tokenizer": tiny_lm})
    assert values(results, "law")["token_perplexity"] == pytest.approx(math.exp(2))
    assert "saved_searches" not in values(results, "law")


@pytest.mark.parametrize("searches", [None, 1])
def test_samples_have_all_metrics_that_results_name(data, tiny_lm, searches: int | None) -> None:
    """lm-eval's loggers (wandb) look each of them up in each sample."""
    lm = CannedLM(True, searches_of_4=searches)
    results = evaluate("law", lm, {"data_dir": str(data), "tokenizer": tiny_lm}, log_samples=True)
    named = [metric["metric"] for metric in results["configs"]["law"]["metric_list"]]
    assert len(named) == 8 + (searches is not None)
    assert all(metric in sample for sample in results["samples"]["law"] for metric in named)


def test_reports_saved_searches_where_the_lm_counts_searches(data) -> None:
    results = evaluate("law", CannedLM(True, searches_of_4=1), {"data_dir": str(data)})
    assert values(results, "law")["saved_searches"] == pytest.approx(0.75)
    assert results["higher_is_better"]["law"]["saved_searches"] is True


def test_saved_searches_weigh_documents_by_tokens() -> None:
    assert perplexity.saved_searches([(0, 10), (30, 30)]) == pytest.approx(0.25)


def test_counts_survive_the_cache_of_responses(data, tmp_path) -> None:
    lm = CannedLM(True, searches_of_4=3)
    runs = [
        values(evaluate("law", lm, {"data_dir": str(data)}, use_cache=str(tmp_path / "cache")), "law") for _ in range(2)
    ]
    assert len(lm.texts) == 3  # the second run asked nothing
    assert runs[0] == runs[1]
    assert runs[0]["saved_searches"] == pytest.approx(0.25)


@pytest.mark.parametrize("metadata", [{}, {"datastore": "stores/x"}, {"pretrained": "/no/such/lm"}])
def test_leaves_token_perplexity_out_where_the_tokenizer_is_unknown(data, caplog, metadata) -> None:
    with caplog.at_level(logging.WARNING):
        results = evaluate("law", CannedLM(False), {"data_dir": str(data), **metadata})
    assert set(values(results, "law")) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert results["n-samples"]["law"]["effective"] == 3
    (warning,) = [record.getMessage() for record in caplog.records if "token" in record.getMessage()]
    assert "law: token_perplexity is left out" in warning
    assert "--metadata tokenizer=" in warning


def test_metadata_can_name_the_tokenizer_of_any_lm(data, tiny_lm) -> None:
    results = evaluate("law", CannedLM(False), {"data_dir": str(data), "tokenizer": tiny_lm})
    sentences = [line for line in LAW_TEST.split("\n") if line.strip()]
    tokens = sum(len(PreTrainedTokenizerFast.from_pretrained(tiny_lm).encode(text)) for text in sentences)
    expected = math.exp(2.0 * 4 * sum(map(len, sentences)) / tokens)
    assert values(results, "law")["token_perplexity"] == pytest.approx(expected)


# --- As lm-eval runs them -----------------------------------------------------------------------------------


def test_the_group_runs_every_task_and_reports_no_aggregate(data) -> None:
    results = evaluate("knn_lm", CannedLM(True), {"data_dir": str(data)})
    assert results["group_subtasks"] == {"knn_lm": GROUP}
    assert "groups" not in results
    assert values(results, "knn_lm") == {}
    for name in GROUP:
        assert values(results, name)["token_perplexity"] == pytest.approx(math.exp(2))
        assert results["versions"][name] == 1.0
        assert results["n-shot"][name] == 0


def test_loading_and_running_warns_of_nothing(data, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        evaluate("knn_lm", CannedLM(True), {"data_dir": str(data)})
    assert [record.getMessage() for record in caplog.records] == []


def test_limit_samples_log_and_write_out(data, caplog) -> None:
    with caplog.at_level(logging.INFO):
        results = evaluate("law", CannedLM(True, 1), {"data_dir": str(data)}, limit=2, log_samples=True, write_out=True)
    assert results["n-samples"]["law"] == {"original": 3, "effective": 2}
    assert "Article 1" in caplog.text
    sample = json.loads(json.dumps(results["samples"]["law"]))[1]
    assert sample["target"] == sample["doc"]["text"] == sample["arguments"][0][0]
    assert sample["resps"] == [[-8.0 * len(sample["target"])]]
    assert sample["token_perplexity"] == [-8.0 * len(sample["target"]), 4 * len(sample["target"])]
    results = evaluate("law", CannedLM(True), {"data_dir": str(data)}, samples={"law": [2]})
    assert results["n-samples"]["law"]["effective"] == 1


def test_few_shot_examples_and_chat_templates_change_nothing(data) -> None:
    class ChatLM(CannedLM):
        tokenizer_name = "chat"

    lm = ChatLM(True)
    lm.apply_chat_template = lambda *_, **__: pytest.fail("there is nothing to put into a template")
    lm.chat_template = lambda _: ""
    evaluate("law", lm, {"data_dir": str(data)}, num_fewshot=5, apply_chat_template=True)
    assert lm.texts == texts("law", data_dir=str(data))


def test_predict_only_keeps_the_responses_alone(data) -> None:
    results = evaluate("law", CannedLM(True), {"data_dir": str(data)}, predict_only=True, log_samples=True)
    assert values(results, "law") == {}
    assert len(results["samples"]["law"]) == 3


def test_cached_requests_of_other_data_are_not_used(data, tmp_path) -> None:
    other = write(tmp_path / "other" / "test.en", "Something else.\n").parent
    seen = []
    for folder in (data, other, data):
        lm = CannedLM(True)
        evaluate("law", lm, {"data_dir": str(folder)}, cache_requests=True)
        seen.append(lm.texts)
    assert seen == [texts("law", data_dir=str(data)), ["Something else."], seen[0]]
    assert len(list((tmp_path / "requests_cache").iterdir())) == 2


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run_lm_eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "dummy", "--include_path", str(TASKS), *arguments],
        capture_output=True,
        text=True,
        env=environment() | {"HF_HUB_OFFLINE": "1"},
    )


def test_the_command_line_takes_the_folder_as_metadata(data, tmp_path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer(adds_bos=False).save_pretrained(tokenizer)
    done = run_lm_eval("--tasks", "law", "--metadata", f"data_dir={data}", f"tokenizer={tokenizer}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|law .*\|bits_per_byte", done.stdout)
    assert "token_perplexity" in done.stdout


def test_the_command_line_reports_bad_data_without_a_traceback(tmp_path) -> None:
    done = run_lm_eval("--tasks", "law", "--metadata", f"data_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: there is no test.en in {tmp_path}: ")
    assert "Traceback" not in done.stderr


# --- Reporting errors ---------------------------------------------------------------------------------------


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


REPORT = "from knn_lm_eval.errors import *; from knn_lm_eval.errors import report_user_errors as r; r(); r()\n"


def test_user_errors_end_the_program_with_their_message_alone() -> None:
    done = run_python(REPORT + "raise UserError('no such folder: x')")
    assert (done.returncode, done.stderr) == (1, "error: no such folder: x\n")


def test_other_errors_keep_their_traceback_and_the_previous_hook() -> None:
    done = run_python(REPORT + "raise ValueError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a bug" in done.stderr
    done = run_python("import sys; sys.excepthook = lambda *_: print('mine')\n" + REPORT + "1 / 0")
    assert done.stdout == "mine\n" and not done.stderr


def test_a_hook_put_around_ours_does_not_make_a_loop() -> None:
    wrap = "import sys; ours = sys.excepthook; sys.excepthook = lambda *a: ours(*a); r()\n"
    done = run_python(REPORT + wrap + "raise KeyError('a bug')")
    assert done.stderr.count("KeyError: 'a bug'") == 1
    done = run_python(REPORT + wrap + "raise UserError('x')")
    assert done.stderr == "error: x\n"


def test_reporting_imports_nothing_heavy() -> None:
    done = run_python(REPORT + "import sys; print('torch' in sys.modules or 'lm_eval' in sys.modules)")
    assert done.stdout == "False\n"
