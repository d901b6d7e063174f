"""f-DPO: the divergence that holds the policy to the reference, and with it the reward that a loss compares.

DPO's reward βr = β log π/π_ref is that of a reverse KL. Another f-divergence has β f′(π/π_ref) in its place
(2309.16240, theorem 1), which is what a modified loss gets for r, and what is logged as its implicit reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.base import check_range, expm1_to_tangent
from hf_prefopt.objective.term import Inputs, Modifier, Names, Term, is_sum, policy_and_reference


def _alpha(ratio: Tensor, alpha: float) -> Tensor:
    """(e^{(α−1)r} − 1)/(α − 1), and its limit r at α = 1."""
    return ratio if alpha == 1 else expm1_to_tangent((alpha - 1) * ratio) / (alpha - 1)


# f′(e^r) of each divergence, up to a constant that is 0 at r = 0; e^x goes on as its tangent past x = 20.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, _: ratio,
    "forward_kl": lambda ratio, _: -expm1_to_tangent(-ratio),
    "js_divergence": lambda ratio, _: math.log(2) + F.logsigmoid(ratio),
    "alpha_divergence": _alpha,
}
ALIASES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def f_prime(ratio: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """f′(π/π_ref) from r = log π/π_ref: what takes the place of r in a loss under an f-divergence.

    reverse_kl r; forward_kl 1 − e^{−r}; js_divergence log 2 + log σ(r); alpha_divergence (e^{(α−1)r} − 1)/(α − 1),
    which is forward_kl at α = 0 and reverse_kl at α = 1. Exponentials go on as their tangent past an exponent of 20.

    Args:
        ratio: r, any shape, nats.
        divergence: one of these names, or "js", "alpha".

    Raises:
        ValueError: there is no such divergence, or α is not finite.
    """
    name = ALIASES.get(divergence, divergence)
    if name not in DIVERGENCES:
        known = ", ".join((*DIVERGENCES, *ALIASES))
        raise ValueError(f"f_divergence_type={divergence!r} is none of {known}")
    check_range("f_alpha_divergence_coef", alpha, float("-inf"), open_low=True)
    return DIVERGENCES[name](ratio, alpha)


@dataclass(frozen=True)
class FDivergence(Modifier):
    """Every log-ratio r of a loss replaced by f′, the loss being a function of them alone.

    Whether it is one is found out by trying: then policy and reference may move together, by another amount for every
    response, and its value stays. The divergence's normalizer, a constant of the prompt, cancels in a difference of two
    responses; losses of each response by itself leave it out, as they do under the reverse KL.
    """

    divergence: str
    alpha: float = 0.5

    def __post_init__(self):
        f_prime(torch.zeros(()), self.divergence, self.alpha)

    @property
    def setting(self) -> str:
        return f"f_divergence_type={self.divergence!r}"

    def refusal(self, term: Term) -> str | None:
        if any(name.endswith("token_logps") for name in term.names):
            return "it compares log-ratios of tokens, and the divergence is one of sequences"
        if not policy_and_reference(term.names):
            return "it compares no log-ratios to a reference"
        if term.spec.has_own_divergence:
            return "it has a divergence of its own"
        if not _is_of_log_ratios(term):
            return "it is no function of the log-ratios alone, for which the divergence could stand"
        return None

    def reads(self, names: Names) -> Names:
        return names

    def __call__(self, inputs: Inputs, names: Names) -> Inputs:
        modified = dict(inputs)
        for policy, reference in policy_and_reference(names):
            modified[policy] = f_prime(inputs[policy] - inputs[reference], self.divergence, self.alpha)
            modified[reference] = torch.zeros_like(inputs[reference])
        return modified


def _is_of_log_ratios(term: Term) -> bool:
    """Whether the losses of made-up examples stay as policy and reference move together."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return 3 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)

    inputs = made_up_examples(term.names, count=8, dtype=torch.float64)
    inputs |= {name: x - noise(x) for name, x in inputs.items() if is_sum(name)}
    moved = dict(inputs)
    for policy, reference in policy_and_reference(term.names):
        shift = noise(inputs[policy])
        moved |= {policy: inputs[policy] + shift, reference: inputs[reference] + shift}
    state = {name: torch.tensor(x, dtype=torch.float64) for name, x in term.initial_state.items()}
    before, after = (term(given, {"state": state}).losses for given in (inputs, moved))
    return torch.allclose(before, after, rtol=1e-9, atol=1e-9)
