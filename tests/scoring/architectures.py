"""The architectures that the layouts are tried on: tiny random models, and what each may share.

A window shorter than the sequences is set wherever the model has one.
"""

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import tiny_model

_WINDOW = {"sliding_window": 7}
# PyTorch's own attention has no soft-cap; older versions of transformers use it all the same, without the cap.
_CAPPED = {"query_pre_attn_scalar": 8, "attn_implementation": "eager"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Exact in the layout "shared".
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
    "deepseek_v3": {
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
    },
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
}

# Not exact, or not known to be: these fall back to "padded", for the reason that a part of which is given.
FALLING_BACK = {
    "mamba2": (
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        "carry a state along the row",
    ),
    "qwen3_next": (
        {
            **_EXPERTS,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 16,
        },
        "carry a state along the row",
    ),
    "bloom": ({"n_layer": 2, "n_head": 4}, "does not go through transformers' attention interface"),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, "does not go through transformers' attention interface"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "llama4_text": (
        {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
        "carry a state along the row",
    ),
    "gpt_oss": ({**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
    "stablelm": ({}, "its forward refuses it"),
    "doge": ({}, "a mask of the module's own making"),  # with learned weights in it
}

_WITHOUT_HEAD_DIM = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def architecture(name: str) -> PreTrainedModel:
    """A tiny random model of that architecture."""
    if name == "falcon":  # its config computes head_dim and takes none
        config = AutoConfig.for_model(name, **_WITHOUT_HEAD_DIM, **FALLING_BACK[name][0])
        return AutoModelForCausalLM.from_config(config).eval()
    return tiny_model(name, **(SHARING[name] if name in SHARING else FALLING_BACK[name][0]))
