"""Decoder layers and token mixers of a model, and modules that do more when they are called.

A token mixer is the module of a decoder layer that looks at other tokens: attention of any kind, a state space model, a
linear attention, a convolution. It is known by the names of what its forward takes.

A module is switched by replacing its class by a subclass of the same name. It keeps its place, its tensors, its hooks
and the engines' own, and pickled or copied it is of its own class again.
"""

import copyreg
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# What a switched module keeps its state under.
STATE = "_hf_prefopt_switched"
# A module that takes one of these looks at other tokens.
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
    """The first base class of a class that replaced another one; see `switch`.

    Attributes:
        plain: the module's own class. before: the class that was replaced, which may be a switched one, too.
    """

    plain: type
    before: type

    def __reduce_ex__(self, protocol):
        state = super().__reduce_ex__(protocol)[2]
        kept = {name: value for name, value in state.items() if not name.startswith(STATE)}
        return copyreg._reconstructor, (self.plain, object, None), kept  # type: ignore[attr-defined]


def switch(module: nn.Module, roles: tuple[type, ...], state: Any, key: str = STATE) -> None:
    """Put roles, which are subclasses of `Switched`, before a module's class.

    Args:
        state: what the roles find as `vars(module)[key]`.
        key: begins with `STATE`; roles that are put before others have one of their own.
    """
    module.__class__ = _subclass(type(module), roles)
    vars(module)[key] = state
    _renew_put_aside(module)


def unswitch(module: nn.Module, key: str) -> None:
    """Take back the last `switch` of a module, which had this key."""
    module.__class__ = type(module).before
    del vars(module)[key]
    _renew_put_aside(module)


def restore(model: nn.Module) -> None:
    """Give all modules their own class again."""
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
    """accelerate's hooks, which bring weights to the device, call the forward that they have put aside."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the text model, as they are called; none where they are not found."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    found = next((each for each in lists if len(each) >= count and any(map(mixers_of, map(unwrapped, each)))), ())
    return list(found)[:count]


def unwrapped(layer: nn.Module) -> nn.Module:
    """A layer without PyTorch's wrapper for activation checkpointing."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def mixers_of(layer: nn.Module) -> list[nn.Module]:
    """The token mixers of a decoder layer, as far as they are modules of their own."""
    return list(outermost(layer, lambda module: not _OF_MIXERS.isdisjoint(parameters_of(module))))


def outermost(module: nn.Module, is_it: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Of the modules inside a module those, and none inside them."""
    for child in module.children():
        if is_it(child):
            yield child
        else:
            yield from outermost(child, is_it)


def parameters_of(module: nn.Module) -> list[str]:
    """The names of what a module's forward takes."""
    return list(inspect.signature(type(module).forward).parameters)


def first_parameter(layer: nn.Module) -> str:
    """The name of the hidden states that a layer's forward takes."""
    return next(name for name in parameters_of(layer) if name != "self")
