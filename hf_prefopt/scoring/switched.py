"""Find decoder layers and token mixers of a model, and switch modules to classes that extend their forward.

A token mixer is a module in a decoder layer that computes a token from several tokens: any kind of attention, a state
space model, a linear attention, a convolution. A token mixer is recognized by the parameter names of its forward.

A module is switched by replacing its class with a subclass of the same name. The module keeps its position in the
model, its tensors and its hooks, including the engine's hooks. A pickled or copied module has its original class.
"""

import copyreg
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Attribute under which a switched module stores its state; also the prefix of other names for such attributes.
STATE = "_hf_prefopt_switched"
# A module whose forward has one of these parameters counts as a token mixer.
_OF_MIXERS = {
    "alibi",
    "attention_mask",
    "cache_params",
    "cache_position",
    "layer_past",
    "past_key_value",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "state",
}


class Switched:
    """The base class of all classes that replace a module's class; see `switch`.

    Attributes:
        plain: The module's original class.
        before: The class that was replaced; it may itself be a `Switched` class.
    """

    plain: type
    before: type

    def __reduce_ex__(self, protocol):
        state = super().__reduce_ex__(protocol)[2]
        kept = {name: value for name, value in state.items() if not name.startswith(STATE)}
        return copyreg._reconstructor, (self.plain, object, None), kept  # type: ignore[attr-defined]


def switch(module: nn.Module, roles: tuple[type, ...], state: Any, key: str = STATE) -> None:
    """Replace a module's class with a subclass that also inherits from the classes `roles`.

    Args:
        roles: Subclasses of `Switched` that extend the module's calls.
        state: Object that these classes read from `vars(module)[key]`.
        key: Attribute name that begins with `STATE`; use a different key for each `switch` of the same module.
    """
    module.__class__ = _subclass(type(module), roles)  # type: ignore[arg-type]  # classes are hashable
    vars(module)[key] = state
    _renew_put_aside(module)


def unswitch(module: nn.Module, key: str) -> None:
    """Undo the last `switch` of a module; `key` must be the key of that call."""
    assert isinstance(module, Switched)
    module.__class__ = module.before
    del vars(module)[key]
    _renew_put_aside(module)


def restore(model: nn.Module) -> None:
    """Restore the original class of all modules."""
    for module in model.modules():
        if isinstance(module, Switched):
            module.__class__ = module.plain
            for key in [key for key in vars(module) if key.startswith(STATE)]:
                del vars(module)[key]
            _renew_put_aside(module)


@cache
def _subclass(plain: type, roles: tuple[type, ...]) -> type:
    named = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (*roles, plain), {**named, "plain": getattr(plain, "plain", plain), "before": plain})


def _renew_put_aside(module: nn.Module) -> None:
    """Update `_old_forward`, the forward that accelerate's hooks call after moving weights to the device."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of the text model, with their wrappers if they have any; [] if no layers are found."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    found = next((each for each in lists if len(each) >= count and any(map(mixers_of, map(unwrapped, each)))), ())
    return list(found)[:count]


def unwrapped(layer: nn.Module) -> nn.Module:
    """Return a layer without PyTorch's wrapper for activation checkpointing."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def mixers_of(layer: nn.Module) -> list[nn.Module]:
    """Return the token mixers of a decoder layer. Only mixers that are modules of their own are found."""
    return list(outermost(layer, lambda module: not _OF_MIXERS.isdisjoint(parameters_of(module))))


def outermost(module: nn.Module, is_it: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Yield the outermost submodules for which `is_it` returns True, but not the submodules inside them."""
    for child in module.children():
        if is_it(child):
            yield child
        else:
            yield from outermost(child, is_it)


def parameters_of(module: nn.Module) -> list[str]:
    """Return the parameter names of a module's forward."""
    return list(inspect.signature(type(module).forward).parameters)


def first_parameter(layer: nn.Module) -> str:
    """Return the name of the first parameter of a layer's forward. It takes the hidden states."""
    return next(name for name in parameters_of(layer) if name != "self")
