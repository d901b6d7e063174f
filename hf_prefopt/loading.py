"""Load models, adapters, tokenizers and processors by name or path.

A model is loaded with the class that its config names, because a checkpoint is usually served with this class. When an
adapter is loaded, its tensors are matched to the model by name. If the adapter was trained on another class, the names
may differ, and the adapter would have no effect.
"""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

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
    """Load a language model or an adapter by name or path.

    The weights are loaded in fp32 unless `init_kwargs` has a `dtype`; bf16 training uses autocast. The model class is
    the one that the config names (`architectures`), or else the first of `AutoModelForCausalLM` and
    `AutoModelForImageTextToText` that supports the config. If `name` is an adapter, the base model that its
    configuration names is loaded, and the adapter is added to it as trainable.

    Raises:
        ValueError: the adapter's configuration names no base model; the adapter is a soft prompt; the adapter was
            trained on another model class; or the checkpoint lacks weights that the model class has.
    """
    kwargs = {"dtype": torch.float32, **(init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if not is_adapter(name, init_kwargs):
        return load_checkpoint(name, kwargs)[0]
    config = PeftConfig.from_pretrained(name, **_hub_arguments(init_kwargs))
    if not config.base_model_name_or_path:
        raise ValueError(
            f"the adapter {name} does not name its base model (base_model_name_or_path in adapter_config.json"
            " is empty): pass PeftModel.from_pretrained(base_model, adapter, is_trainable=True) as the model"
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"the adapter {name} is a soft prompt ({config.peft_type.value}), which PEFT loads frozen: pass "
            "PeftModel.from_pretrained(base_model, adapter) as the model, after model.prompt_encoder.requires_grad_()"
        )
    # revision and subfolder belong to the adapter, not to its base model.
    of_base = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
    base, _ = load_checkpoint(config.base_model_name_or_path, of_base | {"revision": config.revision or "main"})
    return load_adapter(base, name, init_kwargs)


def load_adapter(base: PreTrainedModel, name: str, init_kwargs: dict[str, Any] | None = None) -> PeftModel:
    """Load an adapter by name or path, and add it to a loaded model as trainable.

    Raises:
        ValueError: some of the adapter's tensors do not match the base model, because it has another class.
    """
    _make_room_for_tokens(base, name, init_kwargs)
    model = PeftModel.from_pretrained(base, name, is_trainable=True, **_hub_arguments(init_kwargs))
    _check_tensors(model, name, init_kwargs)
    return model


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads a checkpoint with this config; see `load_model`."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    # The config may name a class without a language-model head, such as a classifier, which cannot be trained here.
    if isinstance(named, type) and issubclass(named, GenerationMixin):
        return named
    auto = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((known for known in auto if type(config) in known._model_mapping), AutoModelForCausalLM)


def is_adapter(name: str, init_kwargs: dict[str, Any] | None = None) -> bool:
    """Return True if a folder or a Hub repository contains an adapter, and False otherwise."""
    return find_adapter_config_file(name, **_hub_arguments(init_kwargs)) is not None


def holds_adapter(run: str) -> bool:
    """Return True if `run` is a folder or a Hub repository with an adapter, and False if it is anything else."""
    try:
        return is_adapter(run)
    except OSError:
        return False


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor. If the argument is a tokenizer, return it unchanged."""
    return cast(PreTrainedTokenizerBase, getattr(processing_class, "tokenizer", processing_class))


def load_processing_class(
    model: nn.Module, init_kwargs: dict[str, Any] | None, name: str | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Load the processor saved with a model, or the tokenizer if no processor was saved.

    A processor's chat template is copied to its tokenizer. For an adapter, the tokenizer that was saved with the
    adapter is loaded or, if there is none, the tokenizer of the base model.

    Args:
        name: Name or path from which the model was loaded.

    Raises:
        ValueError: the model was not loaded from a folder or the Hub.
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
    """Load the processor or the tokenizer of a model or an adapter, without loading the model itself.

    Args:
        name: Name or path of the model or the adapter.
        base: Base model whose tokenizer is loaded if `name` is an adapter that was saved without a tokenizer. Default:
            the base model that the adapter's configuration names.
    """
    if is_adapter(name, init_kwargs) and not _has_file(name, "tokenizer_config.json", init_kwargs):
        config = PeftConfig.from_pretrained(name, **_hub_arguments(init_kwargs))
        # The revision in init_kwargs belongs to the adapter, not to its base model.
        return _processing_class(base or config.base_model_name_or_path, {}, None)
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
            logger.warning("cannot load the processor of %s, loading only its tokenizer: %s", name, reason)
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
    """Load a full model (not an adapter), and warn if the checkpoint has tensors that the model class does not use.

    Returns:
        The model, and the names of the unused tensors.

    Raises:
        ValueError: the checkpoint lacks weights, which would be initialized at random.
    """
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        read = {key: value for key, value in kwargs.items() if key in _OF_THE_CONFIG}
        config = AutoConfig.from_pretrained(config or name, **read)
    is_remote = kwargs.get("trust_remote_code") and hasattr(config, "auto_map")
    loader = AutoModelForCausalLM if is_remote else model_class(config)
    # With `output_loading_info`, `from_pretrained` returns a pair, although its annotation does not say so.
    model, info = cast("tuple[PreTrainedModel, dict]", loader.from_pretrained(name, output_loading_info=True, **kwargs))
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} has no weights for {_some(missing)} of {type(model).__name__}, which would be random: the "
            "checkpoint is not a language model, or its config names the wrong class "
            f"(architectures={config.architectures})"
        )
    if left_out := _left_out(name, model, info, kwargs):
        logger.warning(
            "%s: %s of the checkpoint are not in %s: they are not trained, and a fully saved model does not contain "
            "them",
            name,
            _some(left_out),
            type(model).__name__,
        )
    return model, left_out


def _left_out(name: str, model: PreTrainedModel, info: dict[str, Any], kwargs: dict[str, Any]) -> list[str]:
    """Return the names of the checkpoint tensors that the model class does not load.

    They include the tensors that transformers ignores without a warning.
    """
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    silent = {key for key in _tensors_of(name, kwargs) if any(pattern.search(key) for pattern in patterns)}
    return sorted(set(info["unexpected_keys"]) | silent)


def _tensors_of(name: str, kwargs: dict[str, Any]) -> dict[str, str]:
    """Return the names of the files of a safetensors checkpoint, keyed by tensor name. Return {} for other formats."""
    index, single = (_file(name, file, kwargs) for file in _WEIGHTS)
    if index is not None:
        return json.loads(Path(index).read_text())["weight_map"]
    if single is None:
        return {}
    with safe_open(single, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), _WEIGHTS[1])


def read_tensors(name: str, tensors: Iterable[str], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the tensors with these names from a safetensors checkpoint, without converting them.

    They may be tensors that the model class ignores.
    """
    files, read = _tensors_of(name, kwargs), {}
    for tensor in tensors:
        path = _file(name, files[tensor], kwargs)
        with safe_open(path, "pt") as content:
            read[tensor] = content.get_tensor(tensor)
    return read


def _make_room_for_tokens(base: PreTrainedModel, name: str, init_kwargs: dict[str, Any] | None) -> None:
    """Resize the base model's embeddings if the adapter's tokenizer has more tokens than there are embeddings."""
    if _has_file(name, "tokenizer_config.json", init_kwargs):
        tokens = len(AutoTokenizer.from_pretrained(name, **_hub_arguments(init_kwargs)))
        embeddings = len(base.get_input_embeddings().get_parameter("weight"))
        if tokens > embeddings:
            said = "the tokenizer of %s has %d tokens, but the base model has %d embeddings: adding new embeddings"
            logger.warning(said, name, tokens, embeddings)
            base.resize_token_embeddings(tokens)


def _check_tensors(model: PeftModel, name: str, init_kwargs: dict[str, Any] | None) -> None:
    """Raise `ValueError` if some tensors of the adapter were not loaded into the model."""
    saved = load_peft_weights(name, device="cpu", **_hub_arguments(init_kwargs))
    loaded, prefix = get_peft_model_state_dict(model), model.base_model.prefix

    def is_lost(key: str) -> bool:
        return key not in loaded or not torch.equal(loaded[key].cpu(), saved[key].to(loaded[key].dtype))

    lost = sorted(key for key in saved if prefix in key and is_lost(key))
    if lost:
        raise ValueError(
            f"{_some(lost)} of the adapter {name} are not loaded into {type(model.get_base_model()).__name__} and "
            "would have no effect: load the adapter on a model of the class that it was trained on, and pass the "
            "result (PeftModel.from_pretrained(base_model, adapter, is_trainable=True))"
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
