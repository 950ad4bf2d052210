"""Keys and head of a model against the model itself; ``test_architectures.py`` has the architectures."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from helpers.tiny_model import make_llama

from knn_lm_eval.errors import UserError
from knn_lm_eval.lm.language_model import LanguageModel

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def build(config: t.PretrainedConfig, dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    torch.manual_seed(0)
    config.initializer_range = 0.2
    return t.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def test_bfloat16_logits_are_the_models_own() -> None:
    model = build(t.LlamaConfig(**SMALL), torch.bfloat16)
    lm = LanguageModel(model)
    ids = torch.randint(1, 100, (1, 9))
    keys, hidden = lm.encode(ids)
    assert keys.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(hidden[0]), model(ids).logits[0])


def test_padding_on_the_right_does_not_change_keys() -> None:
    lm = LanguageModel(build(t.LlamaConfig(**SMALL)))
    ids = torch.randint(1, 100, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(lm.encode(ids)[0], lm.encode(padded)[0][:, :9])


def test_last_ffn_output_is_the_last_layers_output() -> None:
    model = build(t.LlamaConfig(**SMALL))
    lm = LanguageModel(model, "last_ffn_output")
    ids = torch.randint(1, 100, (1, 9))
    keys, hidden = lm.encode(ids)
    torch.testing.assert_close(model.model.norm(keys), hidden)


def test_lora_weights_count_in_keys_and_logits() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(t.LlamaConfig(**SMALL)), config).eval()
    lm = LanguageModel(model)
    ids = torch.randint(1, 100, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits[0]
        with model.disable_adapter():
            base = model(ids).logits[0]
    torch.testing.assert_close(lm.logits(lm.encode(ids)[1][0]), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)


def test_virtual_tokens_of_prompt_tuning_are_not_positions() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build(t.LlamaConfig(**SMALL)), config).eval()
    lm = LanguageModel(model)
    ids = torch.randint(1, 100, (2, 9))
    keys, hidden = lm.encode(ids)
    assert keys.shape[:2] == hidden.shape[:2] == (2, 9)
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(hidden[1]), model(ids).logits[1, 3:], rtol=1e-5, atol=1e-5)


def test_a_head_that_looks_back_falls_back_to_whole_windows() -> None:
    class LooksBack(t.LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.cumsum(1)
            return output

    torch.manual_seed(0)
    model = LooksBack(t.LlamaConfig(**SMALL, initializer_range=0.2)).eval()
    lm = LanguageModel(model)
    assert not lm.has_separate_head
    ids = torch.randint(1, 100, (2, 9))
    keys, hidden = lm.encode(ids)
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(hidden[1]), model(ids).logits[1])


def test_the_model_is_left_as_it_was() -> None:
    model = make_llama()
    lm = LanguageModel(model)
    lm.logits(lm.encode(torch.randint(1, 100, (1, 5)))[1][0])
    assert "forward" not in model.model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_unknown_key_type_is_named() -> None:
    with pytest.raises(UserError, match="knn_keytype='ffn'"):
        LanguageModel(make_llama(), "ffn")
