"""The architectures with which the layouts are tested: tiny random models, and the layouts that each one supports.

If a model has a sliding window, the window is shorter than the sequences.
"""

from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import tiny_model, with_lora

_WINDOW = {"sliding_window": 7}
# PyTorch's own attention has no soft-cap; older versions of transformers use it for such models, without the cap.
_CAPPED = {"query_pre_attn_scalar": 8, "attn_implementation": "eager"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

_LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_LLAMA4 = {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64, "num_hidden_layers": 4}
_SINKS = {**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}

# These are exact in the layout "shared".
SHARING = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": _WINDOW,
    "gemma2": {**_WINDOW, **_CAPPED},
    "gemma3_text": {**_WINDOW, "query_pre_attn_scalar": 8},
    "phi3": _WINDOW,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": _LATENT,
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "cohere2": _WINDOW,
    "qwen3_moe": _EXPERTS,
    "smollm3": {},
    "afmoe": {**_EXPERTS, **_WINDOW},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "hyperclovax": {"logits_scaling": 0.25},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "stablelm": {},  # decoder layers that drop keyword arguments
    "nemotron": {},
    "gpt_oss": _SINKS,
    "granite_swa": _WINDOW,
    "granitemoe_swa": _SINKS,
    "mimo_v2_flash": {**_WINDOW, **_EXPERTS, "v_head_dim": 8},
    "flint": _WINDOW,
    "llama4_text": {**_LLAMA4, "attn_temperature_tuning": False},
    "phimoe": {**_SINKS, "router_jitter_noise": 0.0},
    "qwen2_moe": {**_EXPERTS, **_WINDOW, "use_sliding_window": True, "shared_expert_intermediate_size": 16},
}

_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}
_STATE, _INTERFACE = "carry a state along the row", "does not use transformers' attention interface"

# These are exact in the layout "around" but not in "shared", with a part of the reason.
AROUND = {
    "mamba": ({"state_size": 8}, _STATE),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}, _STATE),
    "qwen3_next": ({**_EXPERTS, **_DELTA_NET, "shared_expert_intermediate_size": 16}, _STATE),
    "qwen3_5_text": (_DELTA_NET, _STATE),
    "olmo_hybrid": (_DELTA_NET, _STATE),
    "kimi_linear": (
        {
            **_LATENT,
            "num_hidden_layers": 2,
            "num_experts": 4,
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1],
                "head_dim": 8,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
        _STATE,
    ),
    "lfm2": ({"num_hidden_layers": 4, "full_attn_idxs": [1, 3], "block_multiple_of": 8}, _STATE),
    "nemotron_h": (
        {
            "num_hidden_layers": 4,
            "hybrid_override_pattern": "M*-M",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        _STATE,
    ),
    "granitemoehybrid": (
        {
            **_MAMBA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
        _STATE,
    ),
    "bamba": ({**_MAMBA, "attn_layer_indices": [1]}, _STATE),
    "falcon_h1": ({**_MAMBA, "mamba_d_ssm": 64}, _STATE),
    "jamba": (
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        _STATE,
    ),
    "minimax": ({"num_local_experts": 4, "block_size": 8}, _STATE),
    "recurrent_gemma": ({"num_hidden_layers": 3, "attention_window_size": 7, "lru_width": 32}, _STATE),
    # With 16 heads of the indexer, almost no two tokens have an equal score of 0, for which the kernel selects the top
    # k.
    "deepseek_v32": ({**_LATENT, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 16}, "select tokens"),
    "bloom": ({"n_layer": 2, "n_head": 4}, _INTERFACE),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, _INTERFACE),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], **_WINDOW},
        _INTERFACE,
    ),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, _INTERFACE),
    "falcon": ({"alibi": True}, "ALiBi"),
    "llama4_text with scaled queries": ({**_LLAMA4, "floor_scale": 4}, "scales queries by their position in the row"),
    "doge": ({}, "a mask that the module builds itself"),  # the mask has learned weights
}

_WITHOUT_HEAD_DIM = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def architecture(name: str) -> PreTrainedModel:
    """Return a tiny random model of an architecture; the first word of the name is the model type."""
    settings = SHARING[name] if name in SHARING else AROUND[name][0]
    if name == "falcon":  # the config computes head_dim and does not accept it
        config = AutoConfig.for_model(name, **_WITHOUT_HEAD_DIM, **settings)
        return AutoModelForCausalLM.from_config(config).eval()
    return tiny_model(name.split()[0], **settings)


def adapted(name: str) -> PeftModel:
    """Return the model with a fresh LoRA adapter on all linear layers that PEFT can adapt."""
    # Not routers that return a pair, and not layers whose weights a kernel multiplies itself.
    routed = name.split()[0] in ("llama4_text", "phimoe", "mamba", "mamba2", "falcon_h1", "nemotron_h")
    settings = {"target_modules": ["q_proj", "v_proj", "o_proj", "in_proj", "up_proj"]} if routed else {}
    return with_lora(architecture(name), **settings)
