"""A tiny random model of every decoder architecture of transformers, and where its last feed-forward block is.

Run as a program, it prints the list of them for docs/reference/models.md.
"""

from __future__ import annotations

import textwrap
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# What architectures call their sizes.
_SIZES = {
    100: "vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions",
    48: "intermediate_size n_inner d_ff dff ffn_dim decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp "
    "dense_intermediate_size",
    32: "hidden_size n_embd d_model embedding_size attention_hidden_size word_embed_proj_dim",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size",
    12: "qk_head_dim",
    8: "head_dim qk_nope_head_dim v_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts state_size mamba_d_state qk_rope_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads "
    "num_experts_per_tok eos_token_id",
    1: "n_group topk_group bos_token_id",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}

# The module whose input is the key, and the model types where it is called so.
BLOCKS = {
    "model.layers.1.mlp": "afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid beam bitnet cohere cohere2 "
    "cohere2_moe cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note_text emu3 "
    "ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma3n_text "
    "gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granite granite_swa helium "
    "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text jais2 jetmoe kimi_linear "
    "kolibri1 laguna llama mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 "
    "mistral mixtral mllama modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe persimmon "
    "phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next "
    "seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu zaya",
    "model.language_model.layers.1.mlp": "fuyu gemma3 gemma4",
    "model.H_module.layers.1.mlp": "hrm_text",
    "model.layers.1.mlp_block": "recurrent_gemma",
    "model.layers.1.mlps.1": "longcat_flash",
    "model.layers.1.experts": "gemma4_text",
    "model.layers.1.block_sparse_moe": "granitemoe granitemoe_swa",
    "model.layers.1.shared_mlp": "granitemoehybrid granitemoeshared",
    "model.layers.1.feed_forward": "bamba falcon_h1 jamba lfm2 lfm2_moe lfm3 llama4 llama4_text",
    "model.layers.2.mixer": "nemotron_h",
    "transformer.h.1.mlp": "bloom codegen falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj openai-gpt",
    "transformer.h.1.ffn": "ctrl",
    "transformer.blocks.1.ffn": "dbrx mpt",
    "gpt_neox.layers.1.mlp": "gpt_neox",
    "gpt_neox_japanese.layers.1.mlp": "gpt_neox_japanese",
    "reformer.encoder.layers.1.feed_forward": "reformer",
}
FIRST_MAPS = {
    "model.decoder.layers.1.fc1": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp opt pegasus "
    "plbart trocr whisper",
    "model.layers.1.fc1": "xglm",
    "biogpt.layers.1.fc1": "biogpt",
    "transformer.ffns.1.lin1": "xlm",
    "bert.encoder.layer.1.intermediate": "bert bert-generation big_bird megatron-bert",
    "data2vec_text.encoder.layer.1.intermediate": "data2vec-text",
    "electra.encoder.layer.1.intermediate": "electra",
    "ernie.encoder.layer.1.intermediate": "ernie",
    "rembert.encoder.layer.1.intermediate": "rembert",
    "roberta.encoder.layer.1.intermediate": "camembert roberta xlm-roberta xlm-roberta-xl xmod",
    "roberta_prelayernorm.encoder.layer.1.intermediate": "roberta-prelayernorm",
    "roc_bert.encoder.layer.1.intermediate": "roc_bert",
    "roformer.encoder.layer.1.intermediate": "roformer",
}
MIXERS = {
    "backbone.layers.1.mixer": "falcon_mamba mamba mamba2",
    "model.layers.1.mamba": "zamba2",
    "model.layers.4.mamba": "zamba",
    "rwkv.blocks.1.feed_forward": "rwkv",
}
KEY_MODULES = {
    model_type: name
    for kind in (BLOCKS, FIRST_MAPS, MIXERS)
    for name, model_types in kind.items()
    for model_type in model_types.split()
}

_TEXT = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
_TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "pad_token_id": 0}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {"head_dim": None, "qk_head_dim": None, "num_key_value_heads": 4}
_QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "out_hidden_size": 32}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
_GEMMA4 = _SLIDING | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
# What small sizes of some architectures need beyond SMALL to fit together; None leaves the default.
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for kind in list(FIRST_MAPS)[4:] for name in FIRST_MAPS[kind].split()},
    "axk1": _LATENT,
    "axk2": _LATENT | {"head_dim": 4, "rope_scaling": None},
    "bailing_hybrid": _LINEAR | {"num_key_value_heads": 4},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {
        "text_config": _TEXT,
        "vq_config": {
            "codebook_size": 10,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    },
    "falcon": {"head_dim": None},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "fuyu": {"text_config": _TEXT | {"model_type": "persimmon"}, "image_size": 28, "patch_size": 14},
    "gemma3": {
        "text_config": _TEXT,
        "vision_config": _VISION | {"num_hidden_layers": 3},
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "gemma3n_text": _SLIDING
    | {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "gemma4": {
        "text_config": _TEXT | _GEMMA4 | {"vocab_size_per_layer_input": 100},
        "vision_config": {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
        "audio_config": None,
    },
    "gemma4_text": _GEMMA4 | {"enable_moe_block": True, "top_k_experts": 2},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"shared_intermediate_size": 48},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR | _LATENT | {"linear_head_dim": 8, "head_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "text_config": _TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 4},
        "vision_config": _VISION
        | {
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
    },
    "longcat_flash": _LATENT | {"head_dim": 4},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 4},
    "mllama": {
        "text_config": _TEXT | {"cross_attention_layers": []},
        "vision_config": _VISION
        | {
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    },
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 4,
    },
    "qwen3_5": {"text_config": _TEXT | _LINEAR, "vision_config": _QWEN_VISION},
    "qwen3_5_moe": {
        "text_config": _TEXT
        | _LINEAR
        | {
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "vision_config": _QWEN_VISION,
    },
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8), "is_decoder": True},
    "xlm": {"causal": True},
    "youtu": _LATENT,
    "zamba": {
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "num_hidden_layers": 5,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 1,
    },
    "zamba2": {
        "layer_types": ["hybrid", "mamba"],
        "hybrid_layer_ids": [0],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_d_state": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "head_dim": None,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}
CHANGES["xmod"] |= {"default_language": "en_XX"}
CHANGES["roc_bert"] |= dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8)
CHANGES["roc_bert"] |= dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 10)


def build(model_type: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny random model; its weights are large enough for logits that differ."""
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    changes = CHANGES.get(model_type, {}) | changes
    sizes = {name: value for name, value in SMALL.items() if name in known} | changes
    config = config_class(**{name: value for name, value in sizes.items() if value is not None})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


WRAPPING: dict[str, Any] = {"subsequent_indent": "  ", "break_on_hyphens": False}


def documented_list() -> str:
    """The documentation's list of architectures."""
    kinds = {
        "The input of the last layer's feed-forward block or mixture of experts": BLOCKS,
        "The input of the first of the feed-forward part's linear maps, where they lie bare in the layer": FIRST_MAPS,
        "No feed-forward block reads one position at a time: the input of the last mixer, in RWKV of the last "
        "channel-mixing block": MIXERS,
    }
    lines = [f"{len(KEY_MODULES)} architectures:"]
    for sentence, modules in kinds.items():
        names = sorted(" ".join(modules.values()).split())
        lines += ["", *textwrap.wrap(f"- {sentence} ({len(names)}): {', '.join(names)}.", 118, **WRAPPING)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(documented_list(), end="")
