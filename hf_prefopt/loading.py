"""Loading by name: the class that a checkpoint names, its tokenizer or processor, and adapters with their base model.

People serve a checkpoint with the class that its config names, and the tensors of an adapter are found there by their
names. A class of the same weights with other names would give an adapter that loads without an effect.
"""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import cached_file, find_adapter_config_file

logger = logging.getLogger(__name__)

_OF_THE_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
_OF_THE_CONFIG = (*_OF_THE_HUB, "trust_remote_code", "code_revision", "gguf_file", "force_download", "proxies")
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")


def load_model(
    name: str, init_kwargs: dict[str, Any] | None, quantization_config: Any = None
) -> PreTrainedModel | PeftModel:
    """A language model by name or path, in fp32 unless `init_kwargs` has a `dtype` (bf16 comes by autocast).

    Its class is the one that its config names (`architectures`), or else the first of `AutoModelForCausalLM` and
    `AutoModelForImageTextToText` that knows the config. An adapter is loaded on the base model that its configuration
    names, and is trainable.

    Raises:
        ValueError: an adapter's configuration names no base model, it is a soft prompt, or its tensors are of another
            class of models; a checkpoint lacks weights of its class.
    """
    kwargs = {"dtype": torch.float32, **(init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if not is_adapter(name, init_kwargs):
        return load_checkpoint(name, kwargs)[0]
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
    # A revision and a subfolder are the adapter's.
    of_base = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
    base, _ = load_checkpoint(config.base_model_name_or_path, of_base | {"revision": config.revision or "main"})
    return load_adapter(base, name, init_kwargs)


def load_adapter(base: PreTrainedModel, name: str, init_kwargs: dict[str, Any] | None = None) -> PeftModel:
    """An adapter by name or path on a model that is loaded already, trainable.

    Raises:
        ValueError: its tensors are of another class of models.
    """
    _make_room_for_tokens(base, name, init_kwargs)
    model = PeftModel.from_pretrained(base, name, is_trainable=True, **_hub_arguments(init_kwargs))
    _check_tensors(model, name, init_kwargs)
    return model


def model_class(config: PreTrainedConfig) -> Any:
    """The class that loads a checkpoint with this config; see `load_model`."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    # A class without a head over the vocabulary, such as one that classifies, says only what the checkpoint was before.
    if isinstance(named, type) and issubclass(named, GenerationMixin):
        return named
    auto = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((known for known in auto if type(config) in known._model_mapping), AutoModelForCausalLM)


def is_adapter(name: str, init_kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a folder or Hub repository holds an adapter and not a model."""
    return find_adapter_config_file(name, **_hub_arguments(init_kwargs)) is not None


def holds_adapter(run: str) -> bool:
    """As `is_adapter`; False where there is no such folder, nor anything of that name on the Hub."""
    try:
        return is_adapter(run)
    except OSError:
        return False


def load_processing_class(
    model: nn.Module, init_kwargs: dict[str, Any] | None, name: str | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The processor saved with a model, whose tokenizer has its chat template, or the tokenizer where there is none.

    For an adapter, its own tokenizer if it has one, else the base model's.

    Args:
        name: what the model was loaded by.

    Raises:
        ValueError: the model came from no folder or Hub name.
    """
    base = getattr(model.config, "_name_or_path", "")
    if name and is_adapter(name, init_kwargs):
        return processing_class_of(name, init_kwargs, base)
    if not base:
        raise ValueError("the model has no name to load its tokenizer from: pass processing_class=tokenizer")
    return processing_class_of(base, init_kwargs)


def processing_class_of(
    name: str, init_kwargs: dict[str, Any] | None = None, base: str | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The same by the name or path of a model or an adapter, which need not be loaded.

    Args:
        base: the base model of an adapter without a tokenizer; by default the one that its configuration names.
    """
    if is_adapter(name, init_kwargs) and not _has_file(name, "tokenizer_config.json", init_kwargs):
        config = PeftConfig.from_pretrained(name, **_hub_arguments(init_kwargs))
        return _processing_class(base or config.base_model_name_or_path, {}, None)  # a revision is the adapter's
    kwargs = {key: value for key, value in (init_kwargs or {}).items() if key in ("revision", "trust_remote_code")}
    return _processing_class(name, kwargs, init_kwargs)


def _processing_class(
    name: str, kwargs: dict[str, Any], init_kwargs: dict[str, Any] | None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    if any(_has_file(name, file, init_kwargs) for file in ("processor_config.json", "preprocessor_config.json")):
        try:
            processor = AutoProcessor.from_pretrained(name, **kwargs)
        except (ImportError, OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            logger.warning("the processor of %s cannot be loaded, so its tokenizer is: %s", name, reason)
        else:
            tokenizer = getattr(processor, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
                return processor
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    if tokenizer.chat_template is None and (file := _file(name, "chat_template.json", init_kwargs)):
        tokenizer.chat_template = json.loads(Path(file).read_text())["chat_template"]
    return tokenizer


def load_checkpoint(name: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """A model and not an adapter, and the tensors of the checkpoint that its class leaves out, which are said.

    Raises:
        ValueError: weights would be random.
    """
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        read = {key: value for key, value in kwargs.items() if key in _OF_THE_CONFIG}
        config = AutoConfig.from_pretrained(config or name, **read)
    is_remote = kwargs.get("trust_remote_code") and hasattr(config, "auto_map")
    loader = AutoModelForCausalLM if is_remote else model_class(config)
    model, info = loader.from_pretrained(name, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} has no weights for {_some(missing)} of {type(model).__name__}, which would be random: it is no "
            "checkpoint of a language model, or of another class than its config says "
            f"(architectures={config.architectures})"
        )
    if left_out := _left_out(name, model, info, kwargs):
        logger.warning(
            "%s: %s of the checkpoint are not in %s: they do not train, and a model that is saved in full is without "
            "them",
            name,
            _some(left_out),
            type(model).__name__,
        )
    return model, left_out


def _left_out(name: str, model: PreTrainedModel, info: dict[str, Any], kwargs: dict[str, Any]) -> list[str]:
    """The tensors of a checkpoint that its class does not load, also those of which transformers says nothing."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    silent = {key for key in _tensors_of(name, kwargs) if any(pattern.search(key) for pattern in patterns)}
    return sorted(set(info["unexpected_keys"]) | silent)


def _tensors_of(name: str, kwargs: dict[str, Any]) -> dict[str, str]:
    """The tensors of a checkpoint in safetensors, each with its file's name; of another checkpoint, none."""
    index, single = (_file(name, file, kwargs) for file in _WEIGHTS)
    if index is not None:
        return json.loads(Path(index).read_text())["weight_map"]
    if single is None:
        return {}
    with safe_open(single, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), _WEIGHTS[1])


def read_tensors(name: str, tensors: Iterable[str], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Some tensors of a checkpoint in safetensors as they are there, those of its files that its class leaves out."""
    files, read = _tensors_of(name, kwargs), {}
    for tensor in tensors:
        path = _file(name, files[tensor], kwargs)
        with safe_open(path, "pt") as content:
            read[tensor] = content.get_tensor(tensor)
    return read


def _make_room_for_tokens(base: PreTrainedModel, name: str, init_kwargs: dict[str, Any] | None) -> None:
    """Widen the embeddings where an adapter's tokenizer has more tokens, as PEFT does."""
    if _has_file(name, "tokenizer_config.json", init_kwargs):
        tokens = len(AutoTokenizer.from_pretrained(name, **_hub_arguments(init_kwargs)))
        embeddings = base.get_input_embeddings().weight.shape[0]
        if tokens > embeddings:
            said = "the tokenizer of %s has %d tokens, and the model beneath %d embeddings: the others are made anew"
            logger.warning(said, name, tokens, embeddings)
            base.resize_token_embeddings(tokens)


def _check_tensors(model: PeftModel, name: str, init_kwargs: dict[str, Any] | None) -> None:
    """Refuse an adapter of whose tensors some were not loaded: the model has other names, or PEFT loses them."""
    saved = load_peft_weights(name, device="cpu", **_hub_arguments(init_kwargs))
    loaded, prefix = get_peft_model_state_dict(model), model.base_model.prefix

    def is_lost(key: str) -> bool:
        return key not in loaded or not torch.equal(loaded[key].cpu(), saved[key].to(loaded[key].dtype))

    lost = sorted(key for key in saved if prefix in key and is_lost(key))
    if lost:
        raise ValueError(
            f"the adapter {name} has {_some(lost)}, which are not loaded into {type(model.get_base_model()).__name__}, "
            "so they would have no effect: load it on a model of the class that it was trained on, and pass that "
            "(PeftModel.from_pretrained(base_model, adapter, is_trainable=True))"
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _has_file(name: str, file: str, init_kwargs: dict[str, Any] | None) -> bool:
    return _file(name, file, init_kwargs) is not None


def _file(name: str, file: str, init_kwargs: dict[str, Any] | None) -> str | None:
    where = {**_hub_arguments(init_kwargs), "_raise_exceptions_for_missing_entries": False}
    return cached_file(name, file, **where)


def _hub_arguments(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (init_kwargs or {}).items() if key in _OF_THE_HUB}
