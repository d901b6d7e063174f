"""Which reference a run has: what the configuration says, and what "auto" means for the model at hand."""

import torch
from peft import PeftModel
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
    """Whether the active adapter leaves the model's output as it is, as a newly made LoRA adapter does.

    True for LoRA layers (DoRA and rsLoRA among them) whose B is zero, with any fully trained modules equal to the
    originals. Anything that cannot be told so, such as PiSSA's or another method's weights, counts as trained: a frozen
    copy is then the reference, which is right in either case.
    """
    return all(_is_neutral(module, model.active_adapters) for module in model.modules())


def _is_neutral(module: nn.Module, adapters: list[str]) -> bool:
    if isinstance(module, LoraLayer):
        weights = [*module.lora_B.items(), *module.lora_embedding_B.items()]
        tensors = [getattr(weight, "weight", weight) for name, weight in weights if name in adapters]
        return all(not torch.any(tensor) for tensor in tensors)
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
