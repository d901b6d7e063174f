"""Tiny random models, created from configs: no download, about a second each."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 300
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# bitsandbytes packs the weights of 4-bit layers in blocks of 64 on CPUs with AVX-512-BF16, and rejects others.
QUANTIZABLE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}


def tiny_model(
    model_type: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **config
) -> PreTrainedModel:
    """Return a random causal language model. Its initial weights are large, so that log-ratios are not tiny."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SIZES, **config}))
    return model.to(dtype).eval()


def perturbed(model: torch.nn.Module, scale: float = 0.02, seed: int = 1) -> torch.nn.Module:
    """Add noise to all trainable weights of the model in place, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def with_lora(model: PreTrainedModel, seed: int = 0, **config) -> PeftModel:
    """Return the model with a new LoRA adapter of rank 4 on all linear layers."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(model, LoraConfig(**settings))


def random_rows(count: int = 6, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Return prepared rows of random tokens: pairs with different lengths after prompts with different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for row in range(count):
        responses = [[*tokens(1, longest), 2] for _ in range(2)]
        rows.append(
            {
                "prompt_ids": tokens(2, longest),
                "response_ids": responses,
                "scored_masks": [[1] * len(response) for response in responses],
                "pairs": [[0, 1]],
                "row": row,
            }
        )
    return rows
