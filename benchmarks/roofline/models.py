"""Models with real shapes, built from their sizes on the current device."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

QWEN_VOCABULARY = 151_936


def _sizes(hidden: int, mlp: int, layers: int, heads: int, key_heads: int, vocabulary: int, tied: bool) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "qwen3-0.6b": (Qwen3Config, _sizes(1024, 3072, 28, 16, 8, QWEN_VOCABULARY, True) | {"head_dim": 128}),
    "qwen3-4b": (Qwen3Config, _sizes(2560, 9728, 36, 32, 8, QWEN_VOCABULARY, True) | {"head_dim": 128}),
    "llama-8b": (LlamaConfig, _sizes(4096, 14_336, 32, 32, 8, 128_256, False)),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        _sizes(2048, 6144, 48, 32, 4, QWEN_VOCABULARY, False) | {"head_dim": 128} | _EXPERTS,
    ),
    # The shapes that were measured on a GPU.
    "qwen2.5-0.5b": (Qwen2Config, _sizes(896, 4864, 24, 14, 2, QWEN_VOCABULARY, True)),
    "qwen3-8b": (Qwen3Config, _sizes(4096, 12_288, 36, 32, 8, QWEN_VOCABULARY, False) | {"head_dim": 128}),
    "tiny": (Qwen3Config, _sizes(64, 96, 2, 4, 2, 512, True) | {"head_dim": 64}),
}


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    """Return the config of a model, with changes."""
    kind, sizes = CONFIGS[name]
    return kind(**sizes | changes)


def build(name: str, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """Return the model, with weights on the current device; `changes` are fields of its config."""
    return AutoModelForCausalLM.from_config(config_of(name, **changes), dtype=dtype)
