"""From what a user passes as model to the policy: loaded, adapted, without dropout where asked."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(name: str, init_kwargs: dict[str, Any] | None, quantization_config: Any = None) -> PreTrainedModel:
    """A causal language model by name or path, in fp32 unless `init_kwargs` has a `dtype` (bf16 comes by autocast)."""
    kwargs = {"dtype": torch.float32, **(init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def load_tokenizer(model: nn.Module, init_kwargs: dict[str, Any] | None) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the model's weights.

    Raises:
        ValueError: the model came from no folder or Hub name.
    """
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError("the model has no name to load its tokenizer from: pass processing_class=tokenizer")
    kwargs = {key: value for key, value in (init_kwargs or {}).items() if key in ("revision", "trust_remote_code")}
    return AutoTokenizer.from_pretrained(name, **kwargs)


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """The model under a new adapter, or as it is where no adapter is asked for.

    Raises:
        ValueError: the model has an adapter already.
    """
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model has an adapter and peft_config asks for another: drop peft_config to go on with the one it has, "
            "or merge it first (model.merge_and_unload())"
        )
    return get_peft_model(model, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """No dropout in training: `nn.Dropout` modules, and the attention's own functional dropout rates."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        rates = [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        for name in rates:
            setattr(module, name, 0.0)


def without_fused_head(liger_kernel_config: dict[str, bool]) -> dict[str, bool]:
    """Liger's kernels but the one that replaces the model's forward, in which log-probs are computed here.

    Raises:
        ValueError: it is asked for.
    """
    if liger_kernel_config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config={'fused_linear_cross_entropy': True} replaces the model's forward, and the trainer "
            "needs its own, which never holds all logits either: leave it out"
        )
    return {**liger_kernel_config, "fused_linear_cross_entropy": False}
