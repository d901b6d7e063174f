"""Build the commands that serve a trained model with vLLM. Adapters that vLLM cannot load are merged first."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

# Values that vLLM accepts for --max-lora-rank (default: 16).
_RANKS = (16, 32, 64, 128, 256, 320, 512)
# Settings with which vLLM cannot load a LoRA adapter, because it loads only low-rank matrices of linear layers.
_MORE = (
    "use_dora",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
)
_NO_LINEAR_LAYERS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def serve_command(repository: str, base_model: str, adapter: PeftConfig | None) -> str:
    """Return the command that serves a model. For an adapter that vLLM cannot load, a first line merges the adapter.

    Args:
        repository: Folder of the model, or its name on the Hub.
        base_model: Base model of the adapter.
        adapter: Configuration of the adapter; `None` for a full model.
    """
    if adapter is None:
        return f"vllm serve {repository}"
    name = Path(repository).name
    if isinstance(adapter, LoraConfig) and beside_its_base(adapter):
        rank = largest_rank(adapter)
        room = "" if rank <= _RANKS[0] else f" --max-lora-rank {next(size for size in _RANKS if size >= rank)}"
        return f"vllm serve {base_model} --enable-lora --lora-modules {name}={repository}{room}"
    return f"hf_prefopt merge {repository} --to {name}-merged\nvllm serve {name}-merged"


def beside_its_base(adapter: PeftConfig) -> bool:
    """Return True if vLLM can load the adapter without merging it."""
    if not isinstance(adapter, LoraConfig) or adapter.bias != "none" or largest_rank(adapter) > _RANKS[-1]:
        return False
    targets: Any = adapter.target_modules or ()
    named = (targets,) if isinstance(targets, str) else targets
    if any(name.rpartition(".")[2] in _NO_LINEAR_LAYERS for name in named):
        return False
    return not any(getattr(adapter, setting, None) for setting in _MORE)


def largest_rank(adapter: LoraConfig) -> int:
    """Return the largest rank of a LoRA adapter."""
    return max([adapter.r, *(adapter.rank_pattern or {}).values()])
