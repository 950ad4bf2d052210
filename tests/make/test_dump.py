"""Dumping: every token once, with the context promised, the model's own keys, and safe against interruptions."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ready import Ready, script
from helpers.tiny_model import EVAL_TEXT, MAX_LENGTH, TRAIN_TEXT, make_llama
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.dump_progress import entries_done
from knn_lm_eval.make.text import cut_into_documents, read_dataset
from knn_lm_eval.make.windows import WindowSettings, cut_windows
from knn_lm_eval.store.datastore import Datastore

FILES = ("keys.npy", "values.npy", "document_starts.npy")


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(1, 12).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length))),
)
def test_windows_hold_each_entry_once_and_are_lm_evals_rolling_windows(document_lengths, length_and_stride) -> None:
    max_length, stride = length_and_stride
    count = sum(document_lengths)
    tokens = np.arange(count)
    starts = np.cumsum([0, *document_lengths[:-1]])
    expected = []
    for start, length in zip(starts, document_lengths, strict=True):
        rolling = get_rolling_token_windows(
            tokens[start : start + length].tolist(), -1, max_length, max_length - stride + 1
        )
        for context, continuation in map(make_disjoint_window, rolling):
            expected.append(((context + continuation)[:-1], continuation))
    actual = []
    for window in cut_windows(starts, count, WindowSettings(max_length, stride, 1)):
        begin = window.start if window.context is None else window.context
        read = ([-1] if window.context is None else []) + tokens[begin : window.stop - 1].tolist()
        assert len(read) == window.length <= max_length
        actual.append((read, tokens[window.start : window.stop].tolist()))
    assert actual == expected
    assert [token for _, scored in actual for token in scored] == tokens.tolist()


@pytest.mark.parametrize("stride", [None, 24])
def test_keys_and_values_are_those_of_the_model(tmp_path: Path, lm: CausalHFLM, stride: int | None) -> None:
    text = TRAIN_TEXT[:1500] + "\n\nAnother, shorter document.\n"
    store = dump_datastore(
        lm,
        cut_into_documents(lines(text), "line"),
        tmp_path / "s",
        max_length=40,
        stride=stride,
        batch_size=2,
    )
    assert store.keys.dtype == np.float16 and store.values.dtype == np.int32
    entry = 0
    for document in filter(str.strip, text.split("\n")):
        tokens = lm.tok_encode(document)
        assert entry in store.document_starts
        assert store.values[entry : entry + len(tokens)].tolist() == tokens
        rolling = get_rolling_token_windows(tokens, lm.prefix_token_id, 40, 40 - (stride or 40) + 1)
        for context, continuation in map(make_disjoint_window, rolling):
            captured: list[torch.Tensor] = []
            handle = lm.model.model.layers[-1].mlp.register_forward_pre_hook(lambda m, a, c=captured: c.append(a[0][0]))
            with torch.no_grad():
                lm.model(torch.tensor([(context + continuation)[:-1]]))
            handle.remove()
            expected = captured[0][-len(continuation) :].numpy()
            # One unit in the last place of float16: the batch's shape may round differently.
            np.testing.assert_allclose(store.keys[entry : entry + len(continuation)], expected, rtol=2e-3, atol=1e-4)
            entry += len(continuation)
    assert entry == len(store)


def test_manifest_says_how_the_store_was_made(store: Datastore, model_folder: Path) -> None:
    manifest = store.manifest
    assert manifest.model["args"] == {"pretrained": str(model_folder)}
    assert manifest.key_type == "last_ffn_input" and manifest.key_module == "model.layers.1.mlp"
    assert manifest.windows == {
        "max_length": MAX_LENGTH,
        "stride": MAX_LENGTH,
        "batch_size": 4,
        "prefix_token_id": 0,
    }
    assert len(manifest.fingerprint["key"]) == manifest.dimension == 32
    assert set(manifest.files) == set(FILES)


def test_max_tokens_cuts_the_text(tmp_path: Path, lm: CausalHFLM, store: Datastore) -> None:
    cut = dump_datastore(lm, cut_into_documents(lines(TRAIN_TEXT), "line"), tmp_path / "s", max_tokens=777)
    assert len(cut) == 777
    assert cut.values.tolist() == store.values[:777].tolist()


def dumping(model_folder: Path, train_file: Path, output: Path, *more: str) -> Ready:
    """The command under way."""
    arguments = ["--model_args", f"pretrained={model_folder}", "--text", train_file, "--output", output]
    return Ready(script("dump_datastore", *arguments, "--batch_size", "1", "--max_length", "16", *more))


def test_a_killed_dump_resumes_to_the_same_bytes(tmp_path: Path, model_folder: Path, train_file: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert dumping(model_folder, train_file, whole).wait() == 0
    kills = 0
    resume: list[str] = []
    for wanted in (500, 2000):
        process = dumping(model_folder, train_file, killed, *resume)
        while process.poll() is None:
            if (killed / "progress.json").exists() and entries_done(killed) >= wanted:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.001)
        resume = ["--resume"]
        # Whatever a killed write left behind is not trusted.
        if (part := killed / "keys.npy.part").exists():
            with open(part, "ab") as file:
                file.write(b"torn")
        assert not (killed / "manifest.json").exists()
    assert kills == 2
    unresumed = dumping(model_folder, train_file, killed).completed()
    assert unresumed.returncode == 1 and "add --resume" in unresumed.stderr and "Traceback" not in unresumed.stderr
    assert dumping(model_folder, train_file, killed, "--resume").wait() == 0
    for name in FILES:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert sorted(path.name for path in killed.iterdir()) == sorted([*FILES, "manifest.json"])
    Datastore.open(killed)


def test_other_settings_do_not_resume(tmp_path: Path, lm: CausalHFLM) -> None:
    def interrupted() -> object:
        yield True, EVAL_TEXT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump_datastore(lm, interrupted(), tmp_path, batch_size=2)
    pieces = [(True, EVAL_TEXT)]
    with pytest.raises(UserError, match="unfinished dump"):
        dump_datastore(lm, pieces, tmp_path, batch_size=2)
    with pytest.raises(UserError, match=r"begun with windows=.*'batch_size': 2"):
        dump_datastore(lm, pieces, tmp_path, batch_size=3, resume=True)
    assert len(dump_datastore(lm, pieces, tmp_path, batch_size=2, resume=True)) == len(lm.tok_encode(EVAL_TEXT))


def test_a_finished_store_is_not_overwritten(tmp_path: Path, lm: CausalHFLM) -> None:
    dump_datastore(lm, [(True, "Some text.")], tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(UserError, match="already holds a finished datastore"):
            dump_datastore(lm, [(True, "Other text.")], tmp_path, resume=resume)
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("pieces", [[], [(True, "")]])
def test_empty_text_is_refused(tmp_path: Path, lm: CausalHFLM, pieces: list) -> None:
    with pytest.raises(UserError, match="text is empty"):
        dump_datastore(lm, pieces, tmp_path)


def test_a_full_disk_is_noticed_before_the_model_runs(tmp_path: Path, lm: CausalHFLM, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="Not enough disk space"):
        dump_datastore(lm, [(True, EVAL_TEXT)], tmp_path)
    assert not (tmp_path / "keys.npy.part").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, lm: CausalHFLM) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot write to .*Not a directory"):
        dump_datastore(lm, [(True, EVAL_TEXT)], tmp_path / "file" / "store")


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_keys_that_float16_cannot_hold_are_refused(tmp_path: Path, tokenizer, bad: float) -> None:
    model = make_llama()
    model.model.layers[-1].post_attention_layernorm.weight.data[:] = bad
    lm = CausalHFLM(model, tokenizer=tokenizer)
    with pytest.raises(UserError, match="not a finite float16 number"):
        dump_datastore(lm, [(True, EVAL_TEXT)], tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_documents_are_cut_as_asked() -> None:
    text = "One\nTwo\n\n \nThree\n"
    assert list(cut_into_documents(lines(text), "line")) == [(True, "One"), (True, "Two"), (True, "Three")]
    assert list(cut_into_documents(lines(text), "blank-line")) == [(True, "One\nTwo\n"), (True, "Three\n")]
    assert list(cut_into_documents(lines(text), "file")) == [(True, text)]


def test_wikitext_articles_begin_at_their_headings_only() -> None:
    text = " \n = A = \n \n Text . \n \n = = Section = = \n \n More = text = . \n \n = B = \n \n Text . \n"
    pieces = list(cut_into_documents(lines(text), "wikitext"))
    assert [begins for begins, _ in pieces] == [True, True]
    assert pieces[1][1] == " = B = \n \n Text . \n"
    assert pieces[0][1] + pieces[1][1] == text.removeprefix(" \n")


def test_one_large_document_comes_in_pieces_and_stays_one(tmp_path: Path, lm: CausalHFLM, monkeypatch) -> None:
    monkeypatch.setattr("knn_lm_eval.make.text.PIECE_CHARACTERS", 300)
    text = TRAIN_TEXT[:2000].replace(". ", ".\n")
    pieces = list(cut_into_documents(lines(text), "file"))
    assert len(pieces) > 2 and [begins for begins, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    store = dump_datastore(lm, pieces, tmp_path)
    assert store.document_starts.tolist() == [0]
    assert lm.tok_decode(store.values.tolist()) == text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_give_one_document_per_row(tmp_path: Path, suffix: str, streaming: bool) -> None:
    import datasets

    rows = ["First\nrow", "", "Second row"]
    dataset = datasets.Dataset.from_dict({"body": rows})
    file = tmp_path / f"data{suffix}"
    dataset.to_parquet(str(file)) if suffix == ".parquet" else dataset.to_json(str(file))
    read = read_dataset(str(file), text_column="body", streaming=streaming)
    assert list(cut_into_documents(read, "line")) == [(True, "First\nrow"), (True, "Second row")]


def test_a_data_set_without_the_column_says_which_it_has(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match="no column 'text'; it has body"):
        list(read_dataset(str(file)))


def test_hub_wikitext_rows_give_the_raw_file(tmp_path: Path) -> None:
    raw = " \n = A = \n \n Text . \n \n = B = \n \n Text . \n"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": line if line.strip() else ""}) + "\n" for line in lines(raw)))
    rows = read_dataset(str(file), mode="wikitext")
    assert list(cut_into_documents(rows, "wikitext")) == list(cut_into_documents(lines(raw), "wikitext"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--model_args", "pretrained=NOWHERE", "--text", "TRAIN"],
            "Cannot load the model pretrained=NOWHERE",
        ),
        (["--model_args", "dtype=float32", "--text", "TRAIN"], "names no model"),
        (["--model_args", "pretrained=MODEL", "--text", "missing.txt"], "There is no text file missing.txt"),
        (["--model_args", "pretrained=T5", "--text", "TRAIN"], "encoder-decoder"),
        (
            ["--model_args", "pretrained=MODEL", "--text", "TRAIN", "--key_module", "layers.9.mlp"],
            "LlamaForCausalLM has no module 'layers.9.mlp'",
        ),
        (
            ["--model_args", "pretrained=NOWHERE", "--text", "TRAIN", "--factory", "IVF4,SQ8"],
            "--factory is for --keys none; where keys are kept, build_index makes the index.",
        ),
        (
            ["--model_args", "pretrained=NOWHERE", "--text", "TRAIN", "--memory", "8GiB"],
            "--memory is for --keys none: a dump that keeps keys takes the LM's memory alone.",
        ),
        (
            ["--model_args", "pretrained=NOWHERE", "--text", "TRAIN", "--keys", "none", "--factory", "IVF4,SQ99"],
            "faiss knows no index 'IVF4,SQ99'",
        ),
    ],
)
def test_user_mistakes_end_with_one_sentence(
    tmp_path: Path,
    model_folder: Path,
    train_file: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=400)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    known = {"TRAIN": str(train_file), "MODEL": str(model_folder), "T5": str(tmp_path / "t5")}
    for name, path in known.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    run = Ready(script("dump_datastore", *arguments, "--output", tmp_path / "s")).completed()
    assert run.returncode == 1
    assert f"error: {sentence}" in run.stderr or sentence in run.stderr.splitlines()[-1], run.stderr
    assert "Traceback" not in run.stderr
