"""Build the policy: add a new adapter to a loaded model.

Only layers that text passes through, and whose adapters PEFT can load again, are adapted.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from peft import PeftConfig, PeftModel, PeftType, get_layer_status, get_peft_model
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import number_of_arguments

from hf_prefopt.adapted import LOST, UNREACHED, left_out, lost_adapters, unreached_adapters

logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module)


def with_adapter(model: PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """Add a new adapter to the model. Without a `peft_config`, return the model without a new adapter.

    Some layers that the configuration selects get no adapter; see `adapted.left_out` and `adapted.lost_adapters`.

    Raises:
        ValueError: there is a `peft_config`, but the model already has an adapter; `target_modules` selects no module;
            or PEFT would save adapters that it cannot load again.
    """
    if peft_config is None:
        if isinstance(model, PeftModel):
            _check_given(model)
        return _called_late(model)
    if isinstance(model, PeftModel) or any(map(_has_adapters, model.modules())):
        raise ValueError(
            "the model already has an adapter, so peft_config cannot be applied: remove peft_config to train the "
            "adapter further, or merge it first with model = model.merge_and_unload()"
        )
    return _called_late(_adapted(model, peft_config))


def under_adapter(
    model_init: Callable[..., PreTrainedModel], peft_config: PeftConfig | None
) -> Callable[..., PreTrainedModel | PeftModel]:
    """Return a `model_init` function that adds a new adapter to each model that the given `model_init` returns.

    It takes a trial as an argument if the given function does.
    """

    def fresh_policy() -> PreTrainedModel | PeftModel:
        return with_adapter(model_init(), peft_config)

    def policy_of_trial(trial: Any) -> PreTrainedModel | PeftModel:
        return with_adapter(model_init(trial), peft_config)

    return policy_of_trial if number_of_arguments(model_init) else fresh_policy


def sample_of(model_init: Callable[..., PreTrainedModel | PeftModel]) -> PreTrainedModel | PeftModel:
    """Call `model_init` as the Trainer does outside a hyperparameter search, and return the model."""
    return model_init(None) if number_of_arguments(model_init) else model_init()


def _adapted(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Add a new adapter to the model, except on the layers that must be left out."""
    reasons = left_out(model, peft_config) if isinstance(model, PreTrainedModel) else {}
    adapted = _applied(model, _without(peft_config, reasons))
    if lost := _lost(adapted):
        if len(lost) == len(get_layer_status(adapted)):
            raise ValueError(
                f"PEFT saves adapters of {type(model).__name__} but loads none of them again, because transformers' "
                "renaming rules for checkpoint tensors also match adapter tensors: train all weights (peft_config=None)"
            )
        adapted.unload()
        reasons = {**reasons, LOST: lost}
        adapted = get_peft_model(model, _without(peft_config, reasons))
    for reason, names in reasons.items():
        said = "target_modules=%r: %d layers get no adapter (%s): %s"
        logger.warning(said, getattr(peft_config, "target_modules", None), len(names), _short(names), reason)
    if still := _lost(adapted) if lost else []:
        raise ValueError(
            f"PEFT saves the adapters of {len(still)} modules ({_short(still)}) but does not load them again: remove "
            "these modules from target_parameters and modules_to_save"
        )
    return adapted


def _applied(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Call `get_peft_model`. If no module matches `target_modules`, the error lists the model's linear layers."""
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        if not re.match("Target modules .* not found in the base model", str(error)):
            raise
        wanted: Any = getattr(peft_config, "target_modules", None)
        there = dict.fromkeys(
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
        )
        asked = wanted if isinstance(wanted, str) else ", ".join(sorted(wanted))
        raise ValueError(
            f"target_modules: the model has no module {asked}; its linear layers are {', '.join(there)}, and "
            "target_modules='all-linear' selects all except the output layer"
        ) from error


def _lost(model: PeftModel) -> list[str]:
    """Return `lost_adapters(model)` for LoRA. Return [] for other methods, because PEFT renames only LoRA's tensors."""
    return lost_adapters(model) if model.active_peft_config.peft_type == PeftType.LORA else []


def _check_given(model: PeftModel) -> None:
    """Check the adapters of a model that the user passed, and warn if some of them have no effect.

    Raises:
        ValueError: PEFT would not load some of the adapters again.
    """
    if unreached := unreached_adapters(model):
        logger.warning(
            "%d layers with an adapter (%s) are not trained: %s", len(unreached), _short(unreached), UNREACHED
        )
    if lost := _lost(model):
        last_names = sorted({name.rpartition(".")[2] for name in lost})
        raise ValueError(
            f"PEFT saves the adapters of {len(lost)} layers ({_short(lost)}) but does not load them again, so their "
            f"training would be lost: set exclude_modules={last_names} in the adapter's configuration, or pass the "
            "base model and a peft_config; the trainer then excludes these layers"
        )


def _without(peft_config: PeftConfig, reasons: dict[str, list[str]]) -> PeftConfig:
    """Return the configuration, with the layers in `reasons` added to `exclude_modules`.

    Args:
        reasons: Lists of layer names, keyed by the reason.
    """
    names = [name for part in reasons.values() for name in part]
    if not names:
        return peft_config
    changed: Any = copy.deepcopy(peft_config)  # a PEFT method with target modules
    excluded = changed.exclude_modules
    if isinstance(excluded, str):  # a regular expression that must match the whole name
        changed.exclude_modules = "|".join([f"(?:{excluded})", *map(re.escape, names)])
    else:
        changed.exclude_modules = {*(excluded or ()), *names}
    return changed


def _short(names: list[str]) -> str:
    """Format at most three distinct names as text. Layer indices are replaced by `*`."""
    shapes: Iterator[str] = iter(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    first = [shape for shape, _ in zip(shapes, range(4), strict=False)]
    return ", ".join([*first[:3], *["…"] * (len(first) > 3)])


def _has_adapters(module: nn.Module) -> bool:
    """Return True if PEFT or transformers (`load_adapter`, `add_adapter`) has added an adapter to the module."""
    if isinstance(module, ModulesToSaveWrapper):
        return bool(module.modules_to_save)
    return isinstance(module, BaseTunerLayer) and bool(module._get_available_adapters())


def _called_late(model: _Model) -> _Model:
    """Make PEFT's adaption-prompt wrapper call the current forward of the model, not the one that it has stored."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, AdaptionPromptModel):
        tuner.forward = tuner.model.__call__
    return model
