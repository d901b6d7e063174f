"""Model shapes for the GPU benchmark. Their weights are random, because the results do not depend on the values."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense transformer with grouped-query attention."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    vocab: int
    tied: bool
    head_size: int | None = None

    @property
    def body(self) -> int:
        """The number of parameters of the linear layers, without embeddings and head."""
        size = self.head_size or self.hidden // self.heads
        attention = self.hidden * size * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    def step_flop(self, positions: int, scored: int, context: int) -> float:
        """Return the minimal FLOP of a LoRA step with these positions: policy, reference and activation gradients.

        Args:
            positions: number of computed positions. scored: number of positions that reach the head.
            context: mean number of keys of a query.
        """
        size = self.head_size or self.hidden // self.heads
        # Scores and values: 2 products forward and 4 backward for the policy, 2 forward for the reference.
        attention = self.layers * self.heads * size * context * positions * 2 * 2 * (1 + 2 + 1)
        return 3 * 2 * (self.body * positions + self.hidden * self.vocab * scored) + attention


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 512, True),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151_936, True),  # Qwen2.5-0.5B
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151_936, True),  # Qwen2.5-1.5B
    "3B": Shape(2048, 11008, 36, 16, 2, 151_936, True),  # Qwen2.5-3B
    "8B": Shape(4096, 12288, 36, 32, 8, 151_936, False, 128),  # Qwen3-8B
}


def random_model(name: str, device: str, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """Return a model of a shape, with random weights initialized on the device."""
    shape = SHAPES[name]
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 32_768,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": attention,
    }
    config = Qwen3Config(**sizes, head_dim=shape.head_size) if shape.head_size else Qwen2Config(**sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
