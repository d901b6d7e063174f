"""Modifiers of token log-probs: a loss gets sums over modified token log-probs instead of the plain sums.

Up to three steps modify the token log-probs, in this order: humanline clamps each log-ratio to the reference, the token
weights of the dataset are applied, and LD-DPO weights the tokens by which one response is longer than the other. Losses
that divide by a length still divide by the number of scored tokens.

In shapes, B is the number of examples, and T the number of tokens of the longest response. Padding is 0 and stays 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_prefopt.kinds import PAIRS, ExampleKind
from hf_prefopt.losses.base import check_range
from hf_prefopt.objective.term import Inputs, Modifier, Names, Term, is_sum, policy_and_reference


class TokenStep(ABC):
    """A modification of token log-probs `[B, T]` before they are summed.

    Attributes:
        clamps_ratios: True if the step clamps the log-ratios of policy to reference. False if it weights tokens.
    """

    clamps_ratios: ClassVar[bool] = False

    @property
    @abstractmethod
    def setting(self) -> str:
        """The setting that enables the step, as error messages show it."""

    def reads(self, model: str, response: str) -> Names:
        """Return the inputs that the step needs in addition to the token log-probs of a response.

        Args:
            model: "policy" or "ref".
            response: "chosen_", "rejected_", or "" for a single response.
        """
        return ()

    @abstractmethod
    def __call__(self, tokens: Tensor, model: str, response: str, inputs: Inputs) -> Tensor:
        """Return the modified token log-probs, `[B, T]`.

        Args:
            tokens: `[B, T]`. The token log-probs of a response.
            model, response: which log-probs these are, as in `reads`.
            inputs: all inputs of the objective, keyed by name.
        """


@dataclass(frozen=True)
class Humanline(TokenStep):
    """A step that clamps each token's log-ratio to [low, high]: log π := log π_ref + clamp(log π − log π_ref).

    The step follows the code of HALOs. A clamped token has no gradient. HALOs also copies the policy into the reference
    at every optimizer step. To do this here, set `sync_ref_model=True`, `ref_model_sync_steps=1` and
    `ref_model_mixup_alpha=1.0` (see `reference.moving`).

    Attributes:
        low, high: the bounds in nats.
    """

    low: float = -1.0
    high: float = 1.5
    clamps_ratios: ClassVar[bool] = True

    @property
    def setting(self) -> str:
        return "humanline=True"

    def __post_init__(self):
        check_range("humanline_log_eps_p", self.low, float("-inf"), 0.0, open_low=True, closed_high=True)
        check_range("humanline_log_eps_r", self.high, 0.0)

    def reads(self, model: str, response: str) -> Names:
        return (f"ref_{response}token_logps",) if model == "policy" else ()

    def __call__(self, tokens: Tensor, model: str, response: str, inputs: Inputs) -> Tensor:
        if model == "ref":
            return tokens
        reference = inputs[f"ref_{response}token_logps"]
        return reference + (tokens - reference).clamp(self.low, self.high)


@dataclass(frozen=True)
class ColumnWeights(TokenStep):
    """A step that weights each token by the columns `chosen_token_weights` and `rejected_token_weights`."""

    @property
    def setting(self) -> str:
        return "use_token_weights=True"

    def reads(self, model: str, response: str) -> Names:
        return (f"{response}token_weights",)

    def __call__(self, tokens: Tensor, model: str, response: str, inputs: Inputs) -> Tensor:
        return tokens * inputs[f"{response}token_weights"].to(tokens)


@dataclass(frozen=True)
class LengthDesensitized(TokenStep):
    """A step that multiplies token log-probs by α if they are beyond the length of the pair's shorter response.

    This is LD-DPO (2409.06411). α = 1 changes nothing, and α = 0 removes these tokens. A response that occurs in
    several pairs may have different weights in each of them, because the shorter length depends on the pair.

    Attributes:
        alpha: α in [0, 1].
        policy_only: whether to leave the reference's token log-probs unchanged.
    """

    alpha: float
    policy_only: bool = False

    def __post_init__(self):
        check_range("ld_alpha", self.alpha, 0.0, 1.0, closed_high=True)

    @property
    def setting(self) -> str:
        return f"ld_alpha={self.alpha!r}"

    def reads(self, model: str, response: str) -> Names:
        return ("chosen_lengths", "rejected_lengths")

    def __call__(self, tokens: Tensor, model: str, response: str, inputs: Inputs) -> Tensor:
        if model == "ref" and self.policy_only:
            return tokens
        shorter = torch.minimum(inputs["chosen_lengths"], inputs["rejected_lengths"])
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where(places < shorter[:, None], tokens, self.alpha * tokens)


@dataclass(frozen=True)
class TokenSums(Modifier):
    """A modifier that replaces the plain sums by sums over the token log-probs that the steps have modified."""

    steps: Sequence[TokenStep]

    @property
    def setting(self) -> str:
        return ", ".join(step.setting for step in self.steps)

    def refusal(self, term: Term) -> str | None:
        if any("token_" in name for name in term.names):
            return "it weights tokens itself"
        if any("prompt" in name for name in term.names):
            return "it also reads log-probs of prompts, which would stay unchanged"
        if any(name.endswith("_kl") for name in term.names):
            return "it also reads a KL for every token, which would stay unchanged"
        sums = [name for name in term.names if is_sum(name)]
        paired = {name for pair in policy_and_reference(term.names) for name in pair}
        if any(step.clamps_ratios for step in self.steps) and not paired.issuperset(sums):
            return "it reads log-probs without a reference, but clamping needs log-ratios to a reference"
        return self._refusal_of(term.spec.kind)

    def _refusal_of(self, kind: ExampleKind) -> str | None:
        if not kind.has_token_inputs:
            return f"it compares {kind.name}, for which token log-probs are not available"
        if kind is not PAIRS and not all(step.clamps_ratios for step in self.steps):
            return f"it compares {kind.name}, but these weights apply to the tokens of pairs"
        return None

    def reads(self, names: Names) -> Names:
        needed = [name for name in names if not is_sum(name)]
        of_tokens: list[str] = []
        for name in filter(is_sum, names):
            model, response = _model_and_response(name)
            of_tokens.append(f"{model}_{response}token_logps")
            needed += [further for step in self.steps for further in step.reads(model, response)]
        return tuple(dict.fromkeys((*of_tokens, *needed)))

    def __call__(self, inputs: Inputs, names: Names) -> Inputs:
        return {**inputs, **{name: self._sum(name, inputs) for name in filter(is_sum, names)}}

    def _sum(self, name: str, inputs: Inputs) -> Tensor:
        model, response = _model_and_response(name)
        tokens = inputs[f"{model}_{response}token_logps"]
        for step in self.steps:
            tokens = step(tokens, model, response, inputs)
        # Sum in float64, like the plain sums, because log-ratios are small differences between large sums.
        wide = tokens.dtype if tokens.device.type == "mps" else torch.float64
        return tokens.sum(-1, dtype=wide).to(tokens.dtype)


def _model_and_response(name: str) -> tuple[str, str]:
    """Return ("policy", "chosen_") for "policy_chosen_logps", and ("ref", "") for "ref_logps"."""
    model, response = name.removesuffix("logps").split("_", 1)
    return model, response
