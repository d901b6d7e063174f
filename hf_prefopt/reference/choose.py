"""Which reference a run has: what the configuration says, and what "auto" means for the model at hand."""

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from hf_prefopt.reference.live import (
    LiveReference,
    adapter_off,
    frozen_copy,
    named_adapter,
    separate_model,
)
from hf_prefopt.reference.shards import is_in_parts


def choose_reference(setting: str, model: nn.Module, ref_model: nn.Module | None, needed: bool) -> LiveReference | None:
    """The reference of a run, or `None` where the losses need none: then nothing is copied and nothing is run.

    Args:
        setting: `PreferenceConfig.reference`. "auto" is `ref_model` if one is given; under PEFT the adapter switched
            off when it is fresh, a frozen copy of it when it arrives trained; without PEFT a frozen copy of the policy.
        model: the policy as given, not yet wrapped by an engine.
        ref_model: the model that the user passed as reference.
        needed: whether the losses read the reference.

    Raises:
        ValueError: the setting contradicts the model, the `ref_model` or the losses.
    """
    _refuse_contradictions(setting, model, ref_model, needed)
    if not needed:
        return None
    if setting.startswith("adapter:"):
        return named_adapter(model, setting.removeprefix("adapter:"))
    if setting == "auto":
        setting = _automatic(model, ref_model)
    return {
        "adapter_off": lambda: adapter_off(model),
        "model": lambda: separate_model(ref_model),
        "copy": lambda: frozen_copy(model),
    }[setting]()


def _automatic(model: nn.Module, ref_model: nn.Module | None) -> str:
    if ref_model is not None:
        return "model"
    return "adapter_off" if isinstance(model, PeftModel) and is_fresh_adapter(model) else "copy"


def is_fresh_adapter(model: PeftModel) -> bool:
    """Whether the active adapter leaves the model's output as it is, as a newly made LoRA adapter does, and is all that
    trains, so that switching it off will always give the model as it is now.

    True for LoRA layers (DoRA and rsLoRA among them) whose B·A is zero, with any fully trained modules equal to the
    originals. Anything that cannot be told so, such as PiSSA's or another method's weights, counts as trained: a frozen
    copy is then the reference, which is right in either case.
    """
    if any(is_in_parts(parameter) for parameter in model.parameters() if parameter.requires_grad):
        return False  # no rank sees enough of it to tell
    neutral = all(_is_neutral(module, model.active_adapters) for module in model.modules())
    return neutral and not trained_beneath(model)


def trained_beneath(model: PeftModel) -> list[str]:
    """The parameters that train and belong to no adapter, such as LoRA's `bias="lora_only"`: no switch undoes them."""
    prefixes = (PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) for config in model.peft_config.values())
    marks = [*filter(None, prefixes), "modules_to_save.", "trainable_tokens_", "prompt_encoder."]
    return [name for name, p in model.named_parameters() if p.requires_grad and not any(mark in name for mark in marks)]


def _is_neutral(module: nn.Module, adapters: list[str]) -> bool:
    if isinstance(module, LoraLayer):
        # A linear layer's adapter starts with B at zero, an embedding's with A.
        start_at_zero = [*module.lora_B.items(), *module.lora_embedding_A.items()]
        found = [weight for name, weight in start_at_zero if name in adapters]
        tensors = [t for weight in found for t in (weight.parameters() if isinstance(weight, nn.Module) else (weight,))]
        return not any(torch.any(tensor) for tensor in tensors)
    if isinstance(module, ModulesToSaveWrapper):
        original = module.original_module.state_dict()
        copies = [module.modules_to_save[name].state_dict() for name in adapters if name in module.modules_to_save]
        return all(torch.equal(original[key], copy[key]) for copy in copies for key in original)
    return not any(getattr(module, "active_adapters", None) or ()) if _is_other_tuner(module) else True


def _is_other_tuner(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer)


def _refuse_contradictions(setting: str, model: nn.Module, ref_model: nn.Module | None, needed: bool) -> None:
    if not needed and (ref_model is not None or setting not in ("auto", "none")):
        given = "ref_model is given" if ref_model is not None else f"reference={setting!r}"
        raise ValueError(f"{given}, but the losses need no reference: leave it out")
    if needed and setting == "none":
        raise ValueError("reference='none', but a loss needs one: choose another, or reference_free=True where it can")
    if ref_model is not None and setting not in ("auto", "model"):
        raise ValueError(f"ref_model is given and reference={setting!r}: drop one of them")
    if setting == "model" and ref_model is None:
        raise ValueError("reference='model' wants the model: pass ref_model to the trainer")
    if ref_model is not None and ref_model is model:
        raise ValueError("ref_model is the policy itself, so it would train along: leave it out for a frozen copy")
    if setting.startswith("adapter") and not isinstance(model, PeftModel):
        raise ValueError(f"reference={setting!r} wants a PEFT model, and the policy is {type(model).__name__}")
    if setting.startswith("adapter"):
        _refuse_what_trains_along(setting, model)


def _refuse_what_trains_along(setting: str, model: PeftModel) -> None:
    if setting.removeprefix("adapter:") in model.active_adapters:
        raise ValueError(
            f"{setting.removeprefix('adapter:')!r} is the adapter that trains: reference='copy' freezes it"
        )
    if beneath := trained_beneath(model):
        raise ValueError(
            f"reference={setting!r}, but {len(beneath)} parameters that belong to no adapter train too "
            f"({beneath[0]}, …) and would change the reference: use reference='copy'"
        )
