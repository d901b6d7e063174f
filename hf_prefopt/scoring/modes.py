"""Context managers for a forward: evaluation mode, adapters off, no casts of adapter inputs.

They run in every step, so each walks the modules once and does nothing else. `nn.Module.modules()` and
`PeftModel.disable_adapter()` do more, and on a model of 24 layers they took longer than a forward's launches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

# What these do to a layer's forward is to set `_disable_adapters`; a layer with a switch of its own may do more.
_SWITCHES = {cls.enable_adapters for cls in (BaseTunerLayer, AuxiliaryTrainingWrapper, ModulesToSaveWrapper)}


def all_modules(model: nn.Module) -> list[nn.Module]:
    """The model and every module in it; one that is shared comes once for each of its places."""
    found = [model]
    for module in found:
        found.extend(child for child in module._modules.values() if child is not None)
    return found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the time of the context; each module gets its own mode back."""
    # A plain attribute, set past nn.Module.__setattr__, which looks for parameters and modules.
    states = [module.__dict__ for module in all_modules(model) if module.training]
    for state in states:
        state["training"] = False
    try:
        yield
    finally:
        for state in states:
            state["training"] = True


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """`model.train()` for the time of the context; each module gets its own mode back."""
    states = [module.__dict__ for module in all_modules(model) if not module.training]
    model.train()
    try:
        yield
    finally:
        for state in states:
            state["training"] = False


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """The model without its adapters for the time of the context.

    As `model.disable_adapter()`, but `requires_grad` of the adapters' tensors stays as it is, so use it under
    `torch.no_grad()`.
    """
    layers = [module for module in all_modules(model) if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if not _switched_by_layer(model) or not all(type(layer).enable_adapters in _SWITCHES for layer in layers):
        with model.disable_adapter():
            yield
        return
    states = [layer.__dict__ for layer in layers if not layer.disable_adapters]
    for state in states:
        state["_disable_adapters"] = True
    try:
        yield
    finally:
        for state in states:
            state["_disable_adapters"] = False


@contextmanager
def adapter_casts_off(model: nn.Module, autocast: bool) -> Iterator[None]:
    """Adapters take their inputs as they come, where autocast will cast them anyway; the results are the same bits.

    PEFT casts the input of each adapter to the adapter's dtype, fp32, and keeps the cast for the backward; autocast
    then casts it back. The context belongs around forward and backward, since checkpointing runs a forward in there.
    """
    layers = [module for module in all_modules(model) if isinstance(module, BaseTunerLayer)] if autocast else []
    states = [layer.__dict__ for layer in layers if getattr(layer, "cast_input_dtype_enabled", False)]
    for state in states:
        state["cast_input_dtype_enabled"] = False
    try:
        yield
    finally:
        for state in states:
            state["cast_input_dtype_enabled"] = True


def _switched_by_layer(model: PeftModel) -> bool:
    """Whether PEFT switches this method's adapters off layer by layer, and not by replacing forwards or modules."""
    tuner = type(model.base_model)
    return issubclass(tuner, BaseTuner) and tuner.disable_adapter_layers is BaseTuner.disable_adapter_layers
