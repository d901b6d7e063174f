"""From what a user passes as model to the policy: loaded and adapted."""

from collections.abc import Callable
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import number_of_arguments
from transformers.utils import cached_file, find_adapter_config_file

_OF_THE_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def load_model(
    name: str, init_kwargs: dict[str, Any] | None, quantization_config: Any = None
) -> PreTrainedModel | PeftModel:
    """A causal language model by name or path, in fp32 unless `init_kwargs` has a `dtype` (bf16 comes by autocast).

    An adapter is loaded on the base model that its configuration names, and is trainable.

    Raises:
        ValueError: an adapter's configuration names no base model, or it is a soft prompt.
    """
    kwargs = {"dtype": torch.float32, **(init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if not is_adapter(name, init_kwargs):
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    config = PeftConfig.from_pretrained(name, **_hub_arguments(init_kwargs))
    if not config.base_model_name_or_path:
        raise ValueError(
            f"the adapter {name} does not say which model it belongs to (base_model_name_or_path in adapter_config.json"
            " is empty): pass PeftModel.from_pretrained(base_model, adapter, is_trainable=True) as the model"
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"the adapter {name} is a soft prompt ({config.peft_type.value}), which PEFT loads frozen: pass "
            "PeftModel.from_pretrained(base_model, adapter) as the model, after model.prompt_encoder.requires_grad_()"
        )
    return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **kwargs)


def is_adapter(name: str, init_kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a folder or Hub repository holds an adapter and not a model."""
    return find_adapter_config_file(name, **_hub_arguments(init_kwargs)) is not None


def _hub_arguments(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (init_kwargs or {}).items() if key in _OF_THE_HUB}


def load_tokenizer(
    model: nn.Module, init_kwargs: dict[str, Any] | None, name: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with the model; for an adapter, its own tokenizer if it has one, else the base model's.

    Args:
        name: what the model was loaded by.

    Raises:
        ValueError: the model came from no folder or Hub name.
    """
    base = getattr(model.config, "_name_or_path", "")
    if name and is_adapter(name, init_kwargs):
        return load_tokenizer_of(name, init_kwargs, base)
    if not base:
        raise ValueError("the model has no name to load its tokenizer from: pass processing_class=tokenizer")
    return load_tokenizer_of(base, init_kwargs)


def load_tokenizer_of(
    name: str, init_kwargs: dict[str, Any] | None = None, base: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer by the name or path of its model, or of an adapter.

    Args:
        base: the base model of an adapter without a tokenizer; by default the one that its configuration names.
    """
    if is_adapter(name, init_kwargs):
        where = {**_hub_arguments(init_kwargs), "_raise_exceptions_for_missing_entries": False}
        if cached_file(name, "tokenizer_config.json", **where) is None:
            config = PeftConfig.from_pretrained(name, **_hub_arguments(init_kwargs))
            # A revision is the adapter's.
            return AutoTokenizer.from_pretrained(base or config.base_model_name_or_path)
    kwargs = {key: value for key, value in (init_kwargs or {}).items() if key in ("revision", "trust_remote_code")}
    return AutoTokenizer.from_pretrained(name, **kwargs)


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """The model under a new adapter, or as it is where no adapter is asked for.

    Raises:
        ValueError: the model has an adapter already.
    """
    if peft_config is None:
        return _called_late(model)
    if isinstance(model, PeftModel) or any(map(_has_adapters, model.modules())):
        raise ValueError(
            "the model has an adapter and peft_config asks for another: drop peft_config to go on with the one it has, "
            "or merge it first (PeftModel.merge_and_unload(), also of an adapter folder: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload())"
        )
    return _called_late(get_peft_model(model, peft_config))


def under_adapter(
    model_init: Callable[..., PreTrainedModel], peft_config: PeftConfig | None
) -> Callable[..., PreTrainedModel | PeftModel]:
    """A `model_init`, of a trial or of nothing, whose models get a new adapter; see `with_adapter`."""

    def fresh_policy() -> PreTrainedModel | PeftModel:
        return with_adapter(model_init(), peft_config)

    def policy_of_trial(trial: Any) -> PreTrainedModel | PeftModel:
        return with_adapter(model_init(trial), peft_config)

    return policy_of_trial if number_of_arguments(model_init) else fresh_policy


def sample_of(model_init: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model from a `model_init`, as the Trainer makes one outside a search."""
    return model_init(None) if number_of_arguments(model_init) else model_init()


def _has_adapters(module: nn.Module) -> bool:
    """Whether an adapter has been put on a module, by PEFT or by transformers (`load_adapter`, `add_adapter`)."""
    if isinstance(module, ModulesToSaveWrapper):
        return bool(module.modules_to_save)
    return isinstance(module, BaseTunerLayer) and bool(module._get_available_adapters())


def _called_late(model: nn.Module) -> nn.Module:
    """The model, called through whatever forward it has at that time: adaption prompts keep the one they found."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, AdaptionPromptModel):
        tuner.forward = tuner.model.__call__
    return model
