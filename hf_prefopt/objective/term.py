"""One loss of the objective, with its weight and hyperparameters, and the modifiers of its inputs.

A modifier changes the inputs of a loss before the loss is computed, and works for many losses. It names the inputs that
it reads. If it cannot modify a loss, it gives the reason. The modifier in `objective.token_sums` changes the sums over
tokens, and the one in `objective.divergences` changes the divergence from which the rewards follow. Losses without
rewards, such as the NLL that `sft_weight` adds, are not modified.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.registry import LossSpec

Inputs = dict[str, Tensor]
Names = tuple[str, ...]
State = dict[str, Tensor]


class Modifier(ABC):
    """A function that changes the inputs of a loss before the loss is computed."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """The setting that enables the modifier, as error messages show it."""

    @abstractmethod
    def refusal(self, term: Term) -> str | None:
        """Return the reason why the modifier cannot be applied to a loss, or `None` if it can."""

    @abstractmethod
    def reads(self, names: Names) -> Names:
        """Return the names of the inputs from which the modifier computes the inputs `names`."""

    @abstractmethod
    def __call__(self, inputs: Inputs, names: Names) -> Inputs:
        """Return the inputs, with the log-probs among `names` modified."""


@dataclass(frozen=True)
class Term:
    """One loss of the objective: its weight, its hyperparameters, and its inputs.

    Attributes:
        spec: the loss.
        weight: the factor of the loss in the objective.
        params: hyperparameters that override the loss's defaults.
        reference_free: whether the loss is called without its reference inputs.
        absent: the names of optional inputs that the data do not have. The loss is called without them.
        modifiers: the modifiers of the inputs, which are applied in this order.
    """

    spec: LossSpec
    weight: float
    params: dict[str, Any] = field(default_factory=dict)
    reference_free: bool = False
    absent: tuple[str, ...] = ()
    modifiers: tuple[Modifier, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that are passed to the loss."""
        left_out = (*self.absent, *(self.spec.reference_inputs if self.reference_free else ()))
        return tuple(name for name in self.spec.inputs if name not in left_out)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that a batch must provide.

        Without modifiers, these are `names`. Otherwise, they are the tensors from which the modifiers compute `names`.
        """
        return functools.reduce(lambda names, modifier: modifier.reads(names), reversed(self.modifiers), self.names)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters of the loss: its defaults, overridden by `params`."""
        return {**self.spec.defaults, **self.params}

    @property
    def initial_state(self) -> Mapping[str, float]:
        """The state of the loss before the first batch."""
        return {} if self.spec.state is None else self.spec.state.initial

    def __call__(self, inputs: dict[str, Tensor], run_inputs: Mapping[str, Any]) -> LossOutput:
        """Return the loss, without its weight in the objective.

        Args:
            inputs: tensors, keyed by the names in the property `inputs`.
            run_inputs: values of `state`, `progress`, `epoch` and `training`. The loss gets those for which it has a
                parameter.
        """
        asked = {name: run_inputs[name] for name in self.spec.run_inputs if name in run_inputs}
        return self.spec(**self._modified(inputs), **self.params, **asked)

    def updated(self, state: State, inputs: dict[str, Tensor]) -> State:
        """Return the loss's state after a global batch with these inputs. Without a state, return `state` itself."""
        if self.spec.state is None:
            return state
        with torch.no_grad():
            return self.spec.state.update(state, **self._modified(inputs), **self.params)

    def _modified(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply the modifiers, and return the tensors that are passed to the loss."""
        for modifier in self.modifiers:
            inputs = modifier(inputs, self.names)
        return {name: inputs[name] for name in self.names}


def policy_and_reference(names: Names) -> list[tuple[str, str]]:
    """Return pairs of names, such as ("policy_chosen_logps", "ref_chosen_logps").

    Both names of a pair are in `names`. They hold the summed log-probs of one response under policy and reference.
    """
    sums = [name for name in names if is_sum(name) and name.startswith("policy_")]
    pairs = [(name, "ref_" + name.removeprefix("policy_")) for name in sums]
    return [(policy, reference) for policy, reference in pairs if reference in names]


def is_sum(name: str) -> bool:
    """Return whether an input holds summed log-probs of responses."""
    return name.endswith("logps") and not name.endswith("token_logps")
