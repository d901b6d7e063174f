"""Disable the policy's dropout, and report the rates.

The reference is scored without dropout, so a policy with dropout differs from the reference before the first step.
Therefore the model's own dropout, which its config keeps from pretraining, is disabled by default. The dropout of an
adapter stays on, because the user has chosen it.
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
    """Disable dropout in place.

    This covers `nn.Dropout` modules, modules with a rate for functional dropout, and modules that read a rate from the
    config. The config itself is unchanged, so a saved model keeps its rates.

    Args:
        setting: `None` disables the model's own dropout but not the dropout of adapters; `True` disables both; `False`
            disables neither.

    Returns:
        One phrase that lists the disabled rates, and one that lists the remaining rates. A phrase without rates is left
        out, so the list is empty for a model without dropout.
    """
    off: dict[str, float] = {}
    on: dict[str, float] = {}
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
    """The place of one or several dropout rates, `holder[key]`. Assigning `without` to it disables this dropout."""

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
        config: Any = vars(module).get("config")
        if (
            module is not causal_lm
            and isinstance(config, PreTrainedConfig)
            and (rates := _floats_about_dropout(config))
        ):
            yield _Place(vars(module), "config", ConfigWithoutDropout(config), rates, in_adapter)
        for child_name, child in module.named_children():
            # A child of a ModuleDict is named after an adapter, so the parent's name is reported.
            known_as = name if isinstance(module, nn.ModuleDict) else child_name
            waiting.append((known_as, child, _is_adapters(module, child_name, in_adapter)))


def _own_places(name: str, module: nn.Module, in_adapter: bool) -> Iterator[_Place]:
    """Yield the places of the dropout rates that a module itself stores, without those of its submodules."""
    state = vars(module)
    if "Dropout" in type(module).__name__ and isinstance(state.get("p"), float) and state["p"]:
        yield _Place(state, "p", 0.0, {name: state["p"]}, in_adapter)
    for key, rate in _floats_about_dropout(module).items():
        yield _Place(state, key, 0.0, {key: rate}, in_adapter)
    for key, rates in state.items():
        if "dropout" in key and type(rates) is dict:  # keyed by adapter
            for adapter, rate in rates.items():
                if type(rate) is float and rate:
                    yield _Place(rates, adapter, 0.0, {key: rate}, in_adapter)


def _floats_about_dropout(owner: Any) -> dict[str, float]:
    return {key: value for key, value in vars(owner).items() if "drop" in key and type(value) is float and value}


def _is_adapters(parent: nn.Module, child: str, in_adapter: bool) -> bool:
    """Return True if a child belongs to an adapter, not to the base model."""
    if isinstance(parent, PeftModel):
        return child != "base_model"
    return child != "base_layer" if isinstance(parent, BaseTunerLayer) else in_adapter


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in sorted(rates.items()))


class ConfigWithoutDropout:
    """A proxy of a model's config in which all dropout rates are zero.

    Some modules read their dropout rates from the config in each forward pass, so they get this proxy in place of the
    config. All other attributes are read from the config, and all attributes are written to it. Pickling the proxy
    pickles the config.
    """

    def __init__(self, config: PreTrainedConfig):
        object.__setattr__(self, "_config", config)

    @property  # type: ignore[misc]
    def __class__(self):
        """The class of the config, so that `isinstance` gives the same result as for the config."""
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
