"""Modifiers: what a loss is given is changed before it sees it, so that one modifier serves many losses.

A modifier says which inputs it makes the loss's own out of, and refuses the losses that it has no meaning for. Those
that change the sums over tokens are in `losses.token_sums`, the divergence of the reward in `losses.divergences`.
Losses without rewards (an NLL beside another loss) are left alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hf_prefopt.losses.objective import Term

Inputs = dict[str, Tensor]
Names = tuple[str, ...]


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


def policy_and_reference(names: Names) -> list[tuple[str, str]]:
    """The summed log-probs among the names, policy's and reference's, of responses that both are asked for."""
    sums = [name for name in names if is_sum(name) and name.startswith("policy_")]
    pairs = [(name, "ref_" + name.removeprefix("policy_")) for name in sums]
    return [(policy, reference) for policy, reference in pairs if reference in names]


def is_sum(name: str) -> bool:
    """Whether an input is the summed log-prob of responses."""
    return name.endswith("logps") and not name.endswith("token_logps")
