"""One loss of the objective, with its weight and hyperparameters, and what changes its inputs before it sees them.

A modifier says which inputs it makes the loss's own out of, and refuses the losses that it has no meaning for, so one
modifier serves many losses. Those that change the sums over tokens are in `objective.token_sums`, the divergence of the
reward in `objective.divergences`. A loss without rewards, such as an NLL beside another loss, is not modified.
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
    """A change of a loss's inputs."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """How a configuration asks for it, for error messages."""

    @abstractmethod
    def refusal(self, term: Term) -> str | None:
        """Why it has no meaning for a loss, or `None` where it has."""

    @abstractmethod
    def reads(self, names: Names) -> Names:
        """The inputs that it takes to make those of these names."""

    @abstractmethod
    def __call__(self, inputs: Inputs, names: Names) -> Inputs:
        """The inputs of these names, modified, beside those given."""


@dataclass(frozen=True)
class Term:
    """One loss of the objective: its weight, its hyperparameters, and the inputs it is given.

    `absent` are the inputs that it can do without and that the data do not have.
    """

    spec: LossSpec
    weight: float
    params: dict[str, Any] = field(default_factory=dict)
    reference_free: bool = False
    absent: tuple[str, ...] = ()
    modifiers: tuple[Modifier, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that the loss is called with."""
        left_out = (*self.absent, *(self.spec.reference_inputs if self.reference_free else ()))
        return tuple(name for name in self.spec.inputs if name not in left_out)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that the modifiers make `names` from; without modifiers they are `names`."""
        return functools.reduce(lambda names, modifier: modifier.reads(names), reversed(self.modifiers), self.names)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter of the loss, with its default where nothing else was asked for."""
        return {**self.spec.defaults, **self.params}

    @property
    def initial_state(self) -> Mapping[str, float]:
        """What the loss keeps before the first batch."""
        return {} if self.spec.state is None else self.spec.state.initial

    def __call__(self, inputs: dict[str, Tensor], run_inputs: Mapping[str, Any]) -> LossOutput:
        """The loss on the inputs it asks for, not weighted, and on what is known of what it asks of the run."""
        asked = {name: run_inputs[name] for name in self.spec.run_inputs if name in run_inputs}
        return self.spec(**self._modified(inputs), **self.params, **asked)

    def updated(self, state: State, inputs: dict[str, Tensor]) -> State:
        """The loss's state after the global batch of these inputs; what it was, of a loss that keeps none."""
        if self.spec.state is None:
            return state
        with torch.no_grad():
            return self.spec.state.update(state, **self._modified(inputs), **self.params)

    def _modified(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the loss is called with."""
        for modifier in self.modifiers:
            inputs = modifier(inputs, self.names)
        return {name: inputs[name] for name in self.names}


def policy_and_reference(names: Names) -> list[tuple[str, str]]:
    """The summed log-probs among the names, policy's and reference's, of responses that both are asked for."""
    sums = [name for name in names if is_sum(name) and name.startswith("policy_")]
    pairs = [(name, "ref_" + name.removeprefix("policy_")) for name in sums]
    return [(policy, reference) for policy, reference in pairs if reference in names]


def is_sum(name: str) -> bool:
    """Whether an input is the summed log-prob of responses."""
    return name.endswith("logps") and not name.endswith("token_logps")
