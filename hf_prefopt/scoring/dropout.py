"""Dropout of a policy: what is switched off, and what is said about it.

A reference is scored without dropout. A policy with dropout differs from it before the first step, so a model's own
dropout, which pretraining left in its config, is off by default; the dropout that somebody chose for an adapter stays.
"""

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig

from hf_prefopt.scoring.forward import base_causal_lm


def switch_off_dropout(model: nn.Module, setting: bool | None) -> list[str]:
    """Switch dropout off in place: `nn.Dropout`, the rates of functional dropout, and those read from the config.

    The config itself keeps its rates, so a saved model has them.

    Args:
        setting: `None` switches off the model's own dropout and leaves that of adapters, `True` switches off both,
            `False` neither.

    Returns:
        What was switched off and what stays, a phrase each; nothing for a model without dropout.
    """
    off, on = {}, {}
    for place in _places(model):
        is_off = not place.in_adapter if setting is None else setting
        if is_off:
            place.holder[place.key] = place.without
        chosen = off if is_off else on
        for name, rate in place.rates.items():
            chosen[name] = max(rate, chosen.get(name, 0.0))
    return [f"{word}: {_listed(rates)}" for word, rates in (("dropout off", off), ("dropout on", on)) if rates]


@dataclass(frozen=True)
class _Place:
    """Where dropout rates are held: `holder[key]`, to be replaced by `without`."""

    holder: dict[str, Any]
    key: str
    without: Any
    rates: dict[str, float]
    in_adapter: bool


def _places(model: nn.Module) -> Iterator[_Place]:
    causal_lm, seen = base_causal_lm(model), set()
    waiting = [("", model, False)]
    while waiting:
        name, module, in_adapter = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield from _own_places(name, module, in_adapter or isinstance(module, BaseTunerLayer))
        config = vars(module).get("config")
        is_read = module is not causal_lm and isinstance(config, PreTrainedConfig)
        if is_read and (rates := _floats_about_dropout(config)):
            yield _Place(vars(module), "config", ConfigWithoutDropout(config), rates, in_adapter)
        for child_name, child in module.named_children():
            # A child of a dictionary of modules has the name of an adapter.
            known_as = name if isinstance(module, nn.ModuleDict) else child_name
            waiting.append((known_as, child, _is_adapters(module, child_name, in_adapter)))


def _own_places(name: str, module: nn.Module, in_adapter: bool) -> Iterator[_Place]:
    """The rates that a module holds itself."""
    state = vars(module)
    if "Dropout" in type(module).__name__ and isinstance(state.get("p"), float) and state["p"]:
        yield _Place(state, "p", 0.0, {name: state["p"]}, in_adapter)
    for key, rate in _floats_about_dropout(module).items():
        yield _Place(state, key, 0.0, {key: rate}, in_adapter)
    for key, rates in state.items():
        if "dropout" in key and type(rates) is dict:  # by adapter
            for adapter, rate in rates.items():
                if type(rate) is float and rate:
                    yield _Place(rates, adapter, 0.0, {key: rate}, in_adapter)


def _floats_about_dropout(owner: Any) -> dict[str, float]:
    return {key: value for key, value in vars(owner).items() if "drop" in key and type(value) is float and value}


def _is_adapters(parent: nn.Module, child: str, in_adapter: bool) -> bool:
    """Whether a child belongs to an adapter and not to the model beneath it."""
    if isinstance(parent, PeftModel):
        return child != "base_model"
    return child != "base_layer" if isinstance(parent, BaseTunerLayer) else in_adapter


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in sorted(rates.items()))


class ConfigWithoutDropout:
    """A model's config for one of its modules, with dropout rates of zero; all else is read from and set on the config.

    Some modules read their rates from the config in each forward. Pickled, it is the config.
    """

    def __init__(self, config: PreTrainedConfig):
        object.__setattr__(self, "_config", config)

    @property
    def __class__(self):
        """The config's, so that `isinstance` says what it says of the config."""
        return type(self._config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._config, name)
        return 0.0 if "drop" in name and type(value) is float else value

    def __reduce__(self):
        return operator.itemgetter(0), ((self._config,),)

    def __copy__(self):
        return ConfigWithoutDropout(copy.copy(self._config))

    def __deepcopy__(self, memo: dict):
        return ConfigWithoutDropout(copy.deepcopy(self._config, memo))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)
