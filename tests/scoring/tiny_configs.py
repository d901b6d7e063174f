"""Configurations of tiny models of any family, from the defaults of the family in transformers.

Numbers that make a model large are replaced by small ones, by the field names in configs. Lists with an entry for each
layer keep the first layer of each kind. Windows, chunks and top-k are shorter than the sequences of the tests.
"""

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.tiny_models import VOCABULARY, random_rows

# Families of masked language models that a flag makes causal.
_BIDIRECTIONAL = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
_LAYERS = r"(num_hidden_layers|n_layers?|num_layers|num_blocks|depth|(num_)?(en|de)coder_layers|num_layers_per_stack)"
# The first pattern that matches a whole name is used; other names keep their default.
RULES: list[tuple[str, Any]] = [
    (r"(unpadded_)?vocab_size|vocab_size_per_layer_input|pronunciation_vocab_size|shape_vocab_size", VOCABULARY),
    (r"encoder_hash_byte_group_vocab|ngram_vocab_size_base", VOCABULARY),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start)_token_id", 1),
    (r"eos_token_id", 2),
    (_LAYERS, 2),
    (r"num_(nextn_predict|mtp)_layers|num_kv_shared_layers", 0),
    (r"(swa_)?(num_attention_heads|n_heads?|num_heads|attention_heads)|(num_)?(en|de)coder_attention_heads", 4),
    # A key that no head of an indexer likes has a score of 0 (its scores go through a ReLU). Of 4 heads, one key in 16
    # has, and which of several such keys is among the top k is left to the kernel. Real indexers have 32 heads or more.
    (r"index_n_heads", 32),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups|linear_num_key_heads", 2),
    (r"linear_num_(value_)?heads", 4),
    (
        r"(swa_|attention_|linear_|linear_key_|linear_value_|index_)?head_dim|qk_nope_head_dim|dim_head|d_head|kv_channels",
        8,
    ),
    (r"(swa_)?v_head_dim|qk_rope_head_dim|attention_head_size|rotary_dim|query_pre_attn_scalar", 8),
    (r"qk_head_dim", 16),
    (r"(q|kv|o)_lora_rank|laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank|router_hidden_size|d_rel", 8),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_dt_rank|time_step_rank", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"mamba_d_ssm|lru_width|attention_hidden_size|embedding_size|(in|out)put_embedding_size|word_embed_proj_dim", 32),
    (r"mamba_(n_?groups)|n_groups|mamba_ngroups", 1),
    (r"(mamba_)?chunk_size|(encoder_)?chunk_length", 8),
    (r"hidden_size_per_layer_input|ple_embed_dim|dim_model_base", 8),
    (r"moe_intermediate_size|expert_ffn_hidden_size|.*shared_experts?_intermediate_size|shared_intermediate_size", 16),
    (
        r"intermediate_size(_mlp)?|dense_intermediate_size|(en|de)?coder_ffn_dim|ffn_(hidden_size|dim)|dim_ff|dff|d_inner",
        64,
    ),
    (r"feed_forward_size|block_multiple_of", 32),
    (
        r"hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_dim|dim|embed_dim|hidden_dim|projection_dim|out_hidden_size",
        32,
    ),
    (r"(num|n_routed|num_local|moe_num)_experts", 4),
    (r"zero_expert_num", 2),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|o_groups", 1),
    (r"(n|num|moe_num)_shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(sliding_window|attention_window|window)(_size)?|attention_chunk_size|local_attention(_window_len)?", 8),
    (r"index_topk|index_topk_blocks|keep_window_size|index_block_size|block_size|local_attn_chunk_length", 8),
    (r"lsh_attn_chunk_length", 8),
    (
        r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|rel_extent",
        256,
    ),
    (r"max_(source|target)_positions", 256),
    (r"floor_scale|log_scaling_n_floor", 8),
    (r"initializer_range|init_std|embedding_initializer_range", 0.2),
    (r"router_jitter_noise|input_jitter_noise|jitter_noise", 0.0),
    (r"layer_group_size|sliding_window_pattern|global_attn_every_n_layers", 2),
    # Towers for images and audio.
    (r"image_size|input_size", 28),
    (r"patch_size", 14),
]

# None, because the model computes it from values that the rules change.
_COMPUTED = {"head_dim": 8, "num_key_value_heads": 2}
_MEANING = r"(image|video|audio|vision|img|boi|eoi|boa|eoa|speech).*token_?(id|index)"


def _sections(*sizes: int) -> dict[str, Any]:
    """Rotary embeddings of three dimensions."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes)}}


# For Mistral 4: positions beyond those of its pretraining.
_SCALED_QUERIES: dict[str, Any] = {
    **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    **{"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8},
}
# Two kinds of layers, each with its own rotary embeddings.
_COMPASS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        kind: _sections(2, 1, 1)["rope_parameters"] for kind in ("sliding_attention", "full_attention")
    },
}
_DOTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8},
    **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8, "swa_v_head_dim": 8},
}
# 32 heads, as index_n_heads above.
_INDEXER: dict[str, Any] = {
    **{"indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 8, "indexer_compress_ratio": 2},
}
_VQ: dict[str, Any] = {"base_channels": 32, "codebook_size": 64, "channel_multiplier": [1, 1]}
# Attention twice as wide as the model; two of its layers share it.
_ZAMBA: dict[str, Any] = {
    **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    **{"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
}
# The ids that stand for an image, audio or their ends are the last ones of the vocabulary.
FIRST_SPECIAL = VOCABULARY - 20
# Settings that no rule can derive, keyed by model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"num_expert_group": 1, "n_group": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": FIRST_SPECIAL}},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": FIRST_SPECIAL, "<|extra_200|>": FIRST_SPECIAL + 1}, "vq_config": _VQ},
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2}
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots3_note": {
        "text_config": _DOTS,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS,
    "ernie4_5_vl_moe": {"text_config": _sections(1, 1, 2)},
    "granite4_vision": {
        **{"deepstack_layer_map": [[1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
        "vision_config": {"hidden_size": 64},
    },
    "mistral_large4": {"text_config": {"kv_source_layers": None}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "doge": {"is_moe": False},
    "falcon": {"alibi": False},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_local_experts": 4, "n_group": 1, "num_experts_per_tok": 2},
    "hunyuan_vl": {"text_config": _sections(2, 1, 1)},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mistral4": {"rope_parameters": _SCALED_QUERIES},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": FIRST_SPECIAL, "text_config": _sections(2, 1, 1)},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": FIRST_SPECIAL},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16)},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": [1, 3]},
    **{name: {"text_config": _sections(2, 1, 1)} for name in ("glm46v", "glm4v", "glm_ocr", "glmga")},
    **{name: {"text_config": _sections(2, 1, 1)} for name in ("paddleocr_vl", "qwen2_vl", "qwen2_5_vl")},
    "glm4v_moe": {"text_config": _sections(1, 1, 0)},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a tiny configuration of a family.

    Args:
        changes: settings of the text model that no rule determines.
    """
    config_class = CONFIG_MAPPING[model_type]
    causal = {"is_decoder": True} if model_type in _BIDIRECTIONAL else {}
    settings = _shrunk(config_class())
    for name, value in {**causal, **EXCEPTIONS.get(model_type, {}), **changes}.items():
        inside = settings.get(name) if isinstance(value, dict) else None
        settings[name] = {**inside, **value} if isinstance(inside, dict) else value
    return config_class(**settings)


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that are replaced, in a configuration and in those inside it."""
    settings: dict[str, Any] = {}
    known = vars(config)
    layers = next((v for k, v in known.items() if re.fullmatch(_LAYERS, k) and isinstance(v, int)), None)
    lists = {k: v for k, v in known.items() if isinstance(v, list | tuple) and layers and len(v) == layers}
    kept = _first_of_each_kind(lists, layers)
    for name, value in known.items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = {"model_type": value.model_type, **_shrunk(value)}
        elif name in lists:
            settings[name] = [_ruled(name, value[place]) for place in kept]
        elif isinstance(value, dict) and "mrope_section" in value:
            half = int(4 * value.get("partial_rotary_factor", 1.0))  # heads of size 8
            settings[name] = {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
        elif re.search(_MEANING, name) and isinstance(value, int):
            settings[name] = FIRST_SPECIAL + len(settings) % 20
        elif value is None and name in _COMPUTED:
            settings[name] = _COMPUTED[name]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            replaced = len(kept) if re.fullmatch(_LAYERS, name) and kept else _ruled(name, value)
            if replaced != value:
                settings[name] = replaced
    if "kv_lora_rank" in known:  # latent attention has a key for each query head
        settings["num_key_value_heads"] = 4
    return settings


def _ruled(name: str, value: Any) -> Any:
    """Return the number that a rule gives; a number that disables something (0, −1) stays."""
    if not isinstance(value, int | float) or isinstance(value, bool) or (value <= 0 and "token" not in name):
        return value
    return next((small for pattern, small in RULES if re.fullmatch(pattern, name)), value)


def _first_of_each_kind(lists: dict[str, Any], layers: int | None) -> list[int]:
    """Return the indices of the first layer of each kind, in order, at least two; empty if there are no kinds."""
    if not lists:
        return []
    kinds = {name: [str(entry) for entry in values] for name, values in lists.items()}
    first = {values.index(kind) for values in kinds.values() for kind in values if len(set(values)) <= 4}
    return sorted(first | {layers - 1} if len(first) < 2 else first)


def text_rows(count: int = 4, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Return `random_rows` without the ids that stand for an image or audio, and without repeated ids in a sequence.

    Equal tokens are equal keys in the first layer. In models that keep the k best keys (Doge), the kernel then chooses
    among equal keys, and may choose differently in a longer row.
    """
    rows = random_rows(count, seed, longest)
    for row in rows:
        row["prompt_ids"] = _distinct(row["prompt_ids"], set())
        row["response_ids"] = [_distinct(ids, set(row["prompt_ids"])) for ids in row["response_ids"]]
    return rows


def _distinct(ids: list[int], taken: set[int]) -> list[int]:
    """Replace ids that occur twice, or that are not text, by the next free ones."""
    for place, id in enumerate(ids):
        while id in taken or id >= FIRST_SPECIAL:
            id = 3 + (id - 2) % (FIRST_SPECIAL - 3)
        ids[place] = id
        taken.add(id)
    return ids
