"""Keys and head of models of several architectures against the models themselves."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from conftest import make_llama

from knn_lm_eval.errors import UserError
from knn_lm_eval.language_model import CausalLM

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "llama": (t.LlamaConfig(**SMALL), "layers.1.mlp"),
    "llama-tied": (t.LlamaConfig(**SMALL, tie_word_embeddings=True), "layers.1.mlp"),
    "gpt2": (t.GPT2Config(**GPT2), "h.1.mlp"),
    "opt": (
        t.OPTConfig(
            vocab_size=100,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
        ),
        "decoder.layers.1.fc1",
    ),
    "bloom": (t.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4), "h.1.mlp"),
    "pythia": (
        t.GPTNeoXConfig(
            vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        "layers.1.mlp",
    ),
    "gemma2-soft-capping": (t.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0), "layers.1.mlp"),
    "cohere-logit-scale": (t.CohereConfig(**SMALL, logit_scale=0.25), "layers.1.mlp"),
    "granite-logit-scale": (t.GraniteConfig(**SMALL, logits_scaling=3.0), "layers.1.mlp"),
    "mixtral-experts": (t.MixtralConfig(**SMALL, num_local_experts=4), "layers.1.mlp"),
    "mamba": (t.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2), "layers.1.mixer"),
}


def build(config: t.PretrainedConfig, dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    torch.manual_seed(0)
    config.initializer_range = 0.2
    return t.AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_logits_are_the_models_own(name: str) -> None:
    config, key_module = CONFIGS[name]
    model = build(config)
    lm = CausalLM(model)
    assert lm.key_module_name == key_module
    assert lm.has_separate_head
    ids = torch.randint(1, 100, (2, 9))
    received: list[torch.Tensor] = []
    handle = model.base_model.get_submodule(key_module).register_forward_pre_hook(
        lambda m, args: received.append(args[0])
    )
    keys, hidden = lm.encode(ids)
    handle.remove()
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.equal(keys, received[0].reshape(keys.shape))
    for i in range(2):
        torch.testing.assert_close(lm.logits(hidden[i, 2:7]), expected[i, 2:7], rtol=1e-5, atol=1e-5)
    assert lm.vocabulary_size == 100


def test_bfloat16_logits_are_the_models_own() -> None:
    model = build(t.LlamaConfig(**SMALL), torch.bfloat16)
    lm = CausalLM(model)
    ids = torch.randint(1, 100, (1, 9))
    keys, hidden = lm.encode(ids)
    assert keys.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(hidden[0]), model(ids).logits[0])


def test_padding_on_the_right_does_not_change_keys() -> None:
    lm = CausalLM(build(t.LlamaConfig(**SMALL)))
    ids = torch.randint(1, 100, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(lm.encode(ids)[0], lm.encode(padded)[0][:, :9])


def test_last_ffn_output_is_the_last_layers_output() -> None:
    model = build(t.LlamaConfig(**SMALL))
    lm = CausalLM(model, "last_ffn_output")
    ids = torch.randint(1, 100, (1, 9))
    keys, hidden = lm.encode(ids)
    torch.testing.assert_close(model.model.norm(keys), hidden)


def test_lora_weights_count_in_keys_and_logits() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(t.LlamaConfig(**SMALL)), config).eval()
    lm = CausalLM(model)
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
    lm = CausalLM(model)
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
    lm = CausalLM(model)
    assert not lm.has_separate_head
    ids = torch.randint(1, 100, (2, 9))
    keys, hidden = lm.encode(ids)
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(hidden[1]), model(ids).logits[1])


def test_the_model_is_left_as_it_was() -> None:
    model = make_llama()
    lm = CausalLM(model)
    lm.logits(lm.encode(torch.randint(1, 100, (1, 5)))[1][0])
    assert "forward" not in model.model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_unknown_key_type_is_named() -> None:
    with pytest.raises(UserError, match="knn_keytype='ffn'"):
        CausalLM(make_llama(), "ffn")


def test_a_last_layer_without_a_feed_forward_block_lists_what_it_has() -> None:
    model = make_llama()
    layer = model.model.layers[-1]
    layer.perceptron = layer.mlp
    del layer.mlp
    with pytest.raises(UserError, match=r"layers\.1, which has .*perceptron.*last_ffn_output"):
        CausalLM(model)
