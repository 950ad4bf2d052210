"""The ways in which models are loaded: precision, adapters, quantisation, code of their own, bos tokens, chats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
import transformers
from helpers.stores import change_json
from helpers.tiny_model import EVAL_TEXT, TRAIN_TEXT, make_llama
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from knn_lm_eval import KNNHF, UserError
from knn_lm_eval.lm.language_model import LanguageModel
from knn_lm_eval.lm.loading import CausalHFLM
from knn_lm_eval.make.dump import dump_datastore
from knn_lm_eval.make.text import cut_into_documents
from knn_lm_eval.search.indexing import build_index
from knn_lm_eval.store.datastore import Datastore

PAIRS = [("The operator module", " also defines"), ("", "A module"), (EVAL_TEXT[:90], " and then some")]
REQUESTS = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]


@pytest.fixture
def dump(tmp_path: Path) -> Callable[..., Datastore]:
    """Makes a small datastore with an exact index."""

    def dump(lm: CausalHFLM, **arguments: Any) -> Datastore:
        documents = cut_into_documents([TRAIN_TEXT[:400]], "line")
        store = dump_datastore(lm, documents, tmp_path / "store", max_length=32, **arguments)
        build_index(store, "Flat")
        return store

    return dump


def equal_without_retrieval(model: str, store: Datastore, tolerance: float = 1e-5, **arguments: Any) -> None:
    hf = HFLM(model, device="cpu", batch_size=2, logits_cache=False, **arguments)
    lm = KNNHF(model, device="cpu", batch_size=2, datastore=store.path, lmbda=0, k=5, **arguments)
    for (log_prob, is_greedy), expected in zip(lm.loglikelihood(REQUESTS), hf.loglikelihood(REQUESTS), strict=True):
        assert log_prob == pytest.approx(expected[0], rel=tolerance) and is_greedy == expected[1]


@pytest.mark.parametrize("quantization", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_give_keys_and_logits_of_their_own(
    quantization: str, tmp_path: Path, tokenizer: Any, dump: Callable[..., Datastore]
) -> None:
    pytest.importorskip("bitsandbytes")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = {"pretrained": str(tmp_path / "model"), quantization: True, "batch_size": 2, "max_length": 32}
    lm = CausalHFLM(**arguments)
    assert "bit" in type(lm.model.model.layers[1].mlp.down_proj).__name__
    model = LanguageModel(lm.model)
    assert model.key_module_name == "model.layers.1.mlp" and model.has_separate_head
    ids = torch.randint(3, 400, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.encode(ids)[1][0]), lm.model(ids).logits[0], rtol=1e-3, atol=1e-3)
    store = dump(lm, model_args=arguments)
    knn = KNNHF(datastore=store.path, k=5)  # loaded as the store says
    assert "bit" in type(knn.model.model.layers[1].mlp.down_proj).__name__
    assert all(log_prob < 0 for log_prob, _ in knn.loglikelihood(REQUESTS))


def test_a_peft_adapter_counts_in_the_scores(
    model_folder: Path, tokenizer: Any, tmp_path: Path, dump: Callable[..., Datastore]
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(make_llama(), config).save_pretrained(tmp_path / "adapter")
    arguments = {"peft": str(tmp_path / "adapter"), "max_length": 32}
    store = dump(CausalHFLM(str(model_folder), **arguments))
    equal_without_retrieval(str(model_folder), store, **arguments)
    with pytest.raises(UserError, match="keys are .* away"):
        KNNHF(str(model_folder), datastore=store.path, k=5)


def test_parallelize_without_gpus_loads_on_the_cpu(model_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPUs")
    monkeypatch.chdir(tmp_path)
    lm = CausalHFLM(str(model_folder), parallelize=True, batch_size=2)
    expected = HFLM(str(model_folder), device="cpu", batch_size=2).loglikelihood(REQUESTS)
    assert [score for score, _ in lm.loglikelihood(REQUESTS)] == pytest.approx([score for score, _ in expected])
    assert not list(tmp_path.iterdir())  # nothing is written to disk as if the GPUs' memory were full


def test_models_on_several_devices_by_accelerates_hooks(tmp_path: Path) -> None:
    """With device_map the modules' forward methods are accelerate's; disk stands in for another device."""
    from accelerate import dispatch_model

    model = make_llama()
    ids = torch.randint(3, 400, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits[0]
    keys = LanguageModel(model).encode(ids)[0]
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.1": "disk", "lm_head": "cpu"}
    lm = LanguageModel(dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True))
    found, hidden = lm.encode(ids)
    torch.testing.assert_close(found, keys)
    torch.testing.assert_close(lm.logits(hidden[0]), expected)


# --------------------------------------------------------------------------------- models with their own code

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("was_run").touch()
Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> tuple[str, Path]:
    """A model folder with a modeling file, and the file that running it makes."""
    folder, marker = tmp_path / "own", tmp_path / "was_run"
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(OWN_CODE.format(marker=str(marker)))
    return str(folder), marker


def test_a_models_own_code_runs_only_with_trust_remote_code(own_code, dump: Callable[..., Datastore]) -> None:
    folder, marker = own_code
    with pytest.raises(UserError, match=f"{folder} brings code of its own.*trust_remote_code=True"):
        CausalHFLM(folder)
    assert not marker.exists()
    arguments = {"pretrained": folder, "trust_remote_code": True, "max_length": 32}
    lm = CausalHFLM(**arguments)
    assert marker.exists() and type(lm.model).__name__ == "OwnForCausalLM"
    store = dump(lm, model_args=arguments)
    equal_without_retrieval(folder, store, trust_remote_code=True, max_length=32)
    # A datastore that came from elsewhere must not be able to ask for it.
    marker.unlink()
    with pytest.raises(UserError, match="brings code of its own"):
        KNNHF(datastore=store.path, k=5)
    assert not marker.exists()


def test_a_datastore_cannot_ask_for_code_from_elsewhere(
    tmp_path: Path, store: Datastore, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    # Attention by that name is a kernel that transformers would fetch and run.
    asked = {"attn_implementation": "somebody/kernel", "weights_only": False, "max_length": 32}
    manifest["model"]["args"] |= asked
    change_json(tmp_path / "store" / "manifest.json", model=manifest["model"])
    lm = KNNHF(datastore=tmp_path / "store", k=5)
    assert lm.max_length == 32
    assert "made with attn_implementation=somebody/kernel, weights_only=False" in caplog.text


# --------------------------------------------------------------------------------- models that don't fit


def test_a_seq2seq_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    config = transformers.T5Config(vocab_size=400, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for given in (str(tmp_path), model):
        with pytest.raises(UserError, match="t5 is an encoder-decoder model; retrieval is for decoder-only"):
            CausalHFLM(given, tokenizer=tokenizer)


def test_what_transformers_does_not_know_or_is_no_language_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "nobody-knows-it", "architectures": ["Nobody"]}))
    with pytest.raises(UserError, match="Cannot load the model .*nobody-knows-it") as error:
        CausalHFLM(str(tmp_path / "model"))
    assert "\n" not in str(error.value)
    file.write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(UserError, match="Cannot load the model .*ViTConfig") as error:
        CausalHFLM(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- what HFLM does with text


@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_bos_tokens_are_added_as_by_hf(model_folder: Path, store: Datastore, add_bos_token: bool | None) -> None:
    equal_without_retrieval(str(model_folder), store, add_bos_token=add_bos_token)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_scores_are_those_of_hf(model_folder: Path, store: Datastore, dtype: str) -> None:
    # Both round to 16 bits, in batches of other shapes.
    equal_without_retrieval(str(model_folder), store, tolerance=2**-7, dtype=dtype, softmax_dtype="float32")


def test_chat_templates_are_applied_as_by_hf(
    model_folder: Path, store: Datastore, tmp_path: Path, tokenizer: Any
) -> None:
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    chat_model = tmp_path / "model"
    shutil.copytree(model_folder, chat_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(chat_model)
    rows = [{"q": f"The operator {i}", "choices": ["module", "x", "defines it"], "gold": i} for i in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    task = {
        "task": "choose",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.parquet")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n", "split": "test"},
    }

    def samples(lm: HFLM) -> list[dict]:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[dict(task)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            system_instruction="Be brief.",
        )
        return results["samples"]["choose"]

    hf = samples(HFLM(str(chat_model), device="cpu", batch_size=2, logits_cache=False))
    lm = samples(KNNHF(str(chat_model), device="cpu", batch_size=2, datastore=store.path, lmbda=0, k=5))
    for mine, theirs in zip(lm, hf, strict=True):
        assert mine["arguments"] == theirs["arguments"]
        assert "<s>system: Be brief." in str(mine["arguments"])
        for actual, expected in zip(mine["resps"], theirs["resps"], strict=True):
            assert float(actual[0][0]) == pytest.approx(float(expected[0][0]), rel=1e-5)
