"""From a loaded model to the policy: a new adapter on it, on the layers that text reaches and that PEFT can adapt."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import number_of_arguments

logger = logging.getLogger(__name__)

_ALL_LINEAR = "all-linear"


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """The model under a new adapter, or as it is where no adapter is asked for.

    Of "all-linear" some layers are left out, see `left_out_of_all_linear`.

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
    return _called_late(get_peft_model(model, _with_exclusions(model, peft_config)))


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


def left_out_of_all_linear(model: PreTrainedModel, peft_config: PeftConfig) -> dict[str, list[str]]:
    """The linear layers that "all-linear" leaves out, by the reason.

    Those are towers for images and sound, which text never reaches; subclasses of linear layers with other outputs,
    such as routers that return several tensors, around which PEFT's adapters do not fit; and what PEFT refuses.
    """
    text, reasons = _text_parts(model), {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is model.get_output_embeddings():
            continue
        reason = None
        if text and not any(name == part or name.startswith(f"{part}.") for part in text):
            reason = "text does not reach them"
        elif _has_other_output(module):
            reason = f"{type(module).__name__} has outputs of its own"
        elif _is_refused(name, model, peft_config):
            reason = "Mamba's fused kernel passes them by"
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    return reasons


def _with_exclusions(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """The configuration with what is left out of "all-linear" added to its `exclude_modules`."""
    target, excluded = (getattr(peft_config, name, None) for name in ("target_modules", "exclude_modules"))
    if not (isinstance(target, str) and target.lower() == _ALL_LINEAR and isinstance(model, PreTrainedModel)):
        return peft_config
    reasons = left_out_of_all_linear(model, peft_config)
    if not reasons:
        return peft_config
    for reason, names in reasons.items():
        logger.warning("target_modules='all-linear' leaves out %d layers (%s): %s", len(names), _short(names), reason)
    names = [name for part in reasons.values() for name in part]
    changed = copy.deepcopy(peft_config)
    if isinstance(excluded, str):  # a pattern of whole names
        changed.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, names)])
    else:
        changed.exclude_modules = {*(excluded or ()), *names}
    return changed


def _text_parts(model: PreTrainedModel) -> list[str]:
    """The names of the modules that text goes through in a model of several kinds of inputs; none for one of text."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []
    decoder = model.get_decoder()
    parts = [name for name, module in model.named_modules() if module is decoder and name]
    return parts if decoder is not model else []


def _has_other_output(linear: nn.Module) -> bool:
    """Whether a family's own subclass of a linear layer gives something else than a row of outputs for each input."""
    own = type(linear).__module__.startswith("transformers.models.") and type(linear).forward is not nn.Linear.forward
    if not own:
        return False
    inputs = linear.weight.new_zeros(2, linear.in_features)
    try:
        with torch.no_grad():
            outputs = linear(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return True
    return not isinstance(outputs, torch.Tensor) or outputs.shape != (2, linear.out_features)


def _is_refused(name: str, model: PreTrainedModel, peft_config: PeftConfig) -> bool:
    try:
        _check_lora_target_modules_mamba(peft_config, model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _short(names: list[str]) -> str:
    """Names with their numbers left out, each once, at most three."""
    shapes: Iterator[str] = iter(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    first = [shape for shape, _ in zip(shapes, range(4), strict=False)]
    return ", ".join([*first[:3], *["…"] * (len(first) > 3)])


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
