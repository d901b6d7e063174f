"""Choose the reference of a run from the configuration; "auto" depends on the model."""

from typing import cast

import torch
from peft import LoraModel, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from hf_prefopt.reference.live import (
    LiveReference,
    adapter_off,
    frozen_copy,
    named_adapter,
    separate_model,
)
from hf_prefopt.reference.shards import is_zero3_partitioned

# LoRA initializations that leave the base model's weights unchanged. PiSSA, OLoRA, CorDA and LoRA-GA subtract the
# adapter's product from the weights; LoftQ rounds the weights.
_KEEPS_BASE = {"gaussian", "eva", "orthogonal", "mica"}


def choose_reference(setting: str, model: nn.Module, ref_model: nn.Module | None, needed: bool) -> LiveReference | None:
    """Build the reference of a run; `None` if the losses need no reference (then nothing is copied or computed).

    Args:
        setting: Value of `PreferenceConfig.reference`. "auto" uses `ref_model` if it is passed. Otherwise, "auto" uses
            the model with its adapter disabled if the model has a new adapter, and a frozen copy of the policy if not.
        model: The policy, before an engine wraps it.
        ref_model: The model that the user passed as reference.
        needed: True if a loss uses the reference.

    Raises:
        ValueError: the setting contradicts the model, the `ref_model` or the losses.
    """
    check_reference(setting, model, ref_model, needed)
    if not needed:
        return None
    if isinstance(model, PeftModel) and setting.startswith("adapter:"):
        return named_adapter(model, setting.removeprefix("adapter:"))
    if setting == "auto":
        setting = _automatic(model, ref_model)
    # The setting is not "cache": the configuration has replaced "cache" by "auto". It also sets "copy" for
    # sync_ref_model.
    if setting == "model" and ref_model is not None:
        return separate_model(ref_model)
    return adapter_off(model) if isinstance(model, PeftModel) and setting == "adapter_off" else frozen_copy(model)


def _automatic(model: nn.Module, ref_model: nn.Module | None) -> str:
    if ref_model is not None:
        return "model"
    return "adapter_off" if isinstance(model, PeftModel) and is_fresh_adapter(model) else "copy"


def is_fresh_adapter(model: PeftModel) -> bool:
    """Return True if the model with its adapter disabled is the initial policy, and stays so during training.

    This holds if the adapter does not change the output yet, like a new LoRA adapter, and if training changes only the
    adapter's parameters. The function returns True for LoRA (including DoRA and rsLoRA) with B·A = 0, if all fully
    trained modules (`modules_to_save`) equal the originals. For everything else, such as PiSSA, soft prompts and other
    methods, it returns False. The reference is then a frozen copy, which is always correct.
    """
    if type(model.base_model) is not LoraModel:
        return False
    if any(is_zero3_partitioned(parameter) for parameter in model.parameters() if parameter.requires_grad):
        return False  # each rank has only a part of the weights, which is not enough to decide
    neutral = all(_is_neutral(module, model.active_adapters) for module in model.modules())
    return neutral and not trained_beneath(model)


def trained_beneath(model: PeftModel) -> list[str]:
    """Return the names of trained parameters outside all adapters, for example with LoRA's `bias="lora_only"`.

    Disabling the adapter does not undo changes of these parameters.
    """
    of_adapters = adapter_parameters(model)
    return [name for name, p in model.named_parameters() if p.requires_grad and name not in of_adapters]


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the parameters of all adapters, keyed by name, including inactive and frozen adapters."""
    prefixes = (
        PEFT_TYPE_TO_PREFIX_MAPPING.get(cast(PeftType, config.peft_type)) for config in model.peft_config.values()
    )
    marks = [*filter(None, prefixes), "modules_to_save.", "trainable_tokens_", "prompt_encoder."]
    return {name: p for name, p in model.named_parameters() if any(mark in name for mark in marks)}


def _is_neutral(module: nn.Module, adapters: list[str]) -> bool:
    if isinstance(module, LoraLayer):
        return not any(map(torch.any, _start_at_zero(module, adapters))) and all(
            _keeps_magnitudes(module, name) for name in adapters if name in module.lora_variant
        )
    if isinstance(module, ModulesToSaveWrapper):
        original = module.original_module.state_dict()
        copies = [module.modules_to_save[name].state_dict() for name in adapters if name in module.modules_to_save]
        return all(torch.equal(original[key], copy[key]) for copy in copies for key in original)
    return not (isinstance(module, BaseTunerLayer) and any(module.active_adapters))


def _start_at_zero(layer: LoraLayer, adapters: list[str]) -> list[Tensor]:
    """Return the factors that are zero in a new adapter: B for a linear layer, A for an embedding."""
    found = [w for name, w in (*layer.lora_B.items(), *layer.lora_embedding_A.items()) if name in adapters]
    return [t for weight in found for t in (weight.parameters() if isinstance(weight, nn.Module) else (weight,))]


def _keeps_magnitudes(layer: LoraLayer, adapter: str) -> bool:
    """Return True for DoRA whose magnitudes equal the norms of the base weights; False for other LoRA variants."""
    if adapter not in layer.lora_magnitude_vector:
        return False
    dora = cast(DoraLinearLayer, layer.lora_magnitude_vector[adapter])
    norms = dora.get_weight_norm(dequantize_module_weight(layer.get_base_layer()), 0.0, 0.0)
    return torch.equal(norms.to(dora.weight), dora.weight)


def check_reference(setting: str, model: nn.Module, ref_model: nn.Module | None, needed: bool) -> None:
    """Check that the setting is compatible with the model, `ref_model` and the losses; see `choose_reference`.

    Raises:
        ValueError: the setting is incompatible; the message names the setting and a fix.
    """
    if not needed and (ref_model is not None or setting not in ("auto", "none")):
        given = "ref_model is given" if ref_model is not None else f"reference={setting!r}"
        raise ValueError(f"{given}, but the losses need no reference: remove it")
    if needed and setting == "none":
        raise ValueError(
            "reference='none', but a loss needs a reference: choose another value, or set reference_free=True if the "
            "loss supports it"
        )
    if ref_model is not None and setting not in ("auto", "model"):
        raise ValueError(f"ref_model is given, but reference={setting!r}: drop one of them")
    if setting == "model" and ref_model is None:
        raise ValueError("reference='model' needs a model: pass ref_model to the trainer")
    if ref_model is not None and (shared := _trained_in_both(model, ref_model)):
        raise ValueError(
            f"ref_model is the policy itself or shares {len(shared)} trainable parameters with the policy "
            f"({shared[0]}, …), so training would change the reference: remove ref_model to use a frozen copy"
        )
    if setting.startswith("adapter"):
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"reference={setting!r} needs a PEFT model, but the policy is {type(model).__name__}: pass "
                "peft_config, or leave reference out"
            )
        _refuse_changed_base(setting, model)
        _refuse_what_trains_along(setting, model)


def refuse_moved(reference: LiveReference, model: nn.Module) -> None:
    """Raise `ValueError` if the policy now trains a parameter that it shares with the reference.

    The reference is chosen based on the parameters that are trainable when the trainer is created. Others may become
    trainable later, for example when layers are unfrozen one after the other.
    """
    if reference.is_separate:
        late = _trained_in_both(model, reference.model)
    elif reference.copies is not None:
        late = reference.copies.not_copied()
    else:
        late = trained_beneath(cast(PeftModel, model))
    if late:
        raise ValueError(
            f"{len(late)} parameters ({late[0]}, …) were made trainable after the trainer was created. The reference "
            "shares them, so training would change it: make them trainable before you create the trainer, or pass a "
            "ref_model"
        )


def _trained_in_both(model: nn.Module, ref_model: nn.Module) -> list[str]:
    others = {id(parameter) for parameter in ref_model.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) in others]


def _refuse_changed_base(setting: str, model: PeftModel) -> None:
    """Raise `ValueError` if initializing an adapter has changed the base model's weights, as PiSSA does."""
    inits = {name: getattr(config, "init_lora_weights", None) for name, config in model.peft_config.items()}
    for name, init in inits.items():
        if isinstance(init, str) and init.lower() not in _KEEPS_BASE:
            raise ValueError(
                f"reference={setting!r}, but init_lora_weights={init!r} of the adapter {name!r} changes the weights of "
                "the base model, so the model without this adapter is not the pretrained model: use "
                "reference='copy', a frozen copy of the policy"
            )


def _refuse_what_trains_along(setting: str, model: PeftModel) -> None:
    if setting.removeprefix("adapter:") in model.active_adapters:
        raise ValueError(
            f"{setting.removeprefix('adapter:')!r} is the adapter being trained: use reference='copy', a frozen copy"
        )
    if beneath := trained_beneath(model):
        raise ValueError(
            f"reference={setting!r}, but {len(beneath)} parameters outside all adapters are also trained "
            f"({beneath[0]}, …), which would change the reference: use reference='copy'"
        )
