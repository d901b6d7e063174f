"""f-DPO: replaces the reverse KL between policy and reference by another f-divergence, which changes the rewards.

DPO's reward βr = β log(π/π_ref) follows from the reverse KL. With another f-divergence, the reward is β f′(π/π_ref),
where f′ is the derivative of f (2309.16240, theorem 1). A modified loss gets f′ instead of r, and logs β f′ as its
implicit reward.
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
    """Return (e^{(α−1)r} − 1)/(α − 1) for the log-ratio r, or the limit r at α = 1."""
    return ratio if alpha == 1 else expm1_to_tangent((alpha - 1) * ratio) / (alpha - 1)


# f′(e^r) of each divergence as a function of r and α, shifted so that it is 0 at r = 0. For exponents x above 20, e^x
# is replaced by its tangent.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, _: ratio,
    "forward_kl": lambda ratio, _: -expm1_to_tangent(-ratio),
    "js_divergence": lambda ratio, _: math.log(2) + F.logsigmoid(ratio),
    "alpha_divergence": _alpha,
}
ALIASES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def f_prime(ratio: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Return f′(π/π_ref), computed from r = log(π/π_ref). f′ is the derivative of the f-divergence's function f.

    f′ is r for reverse_kl, 1 − e^{−r} for forward_kl, log 2 + log σ(r) for js_divergence, and (e^{(α−1)r} − 1)/(α − 1)
    for alpha_divergence. alpha_divergence equals forward_kl at α = 0 and reverse_kl at α = 1. For exponents above 20,
    exponentials are replaced by their tangents.

    Args:
        ratio: the log-ratios r (nats), of any shape.
        divergence: one of the four names above, or "js" or "alpha".
        alpha: α of alpha_divergence. The other divergences do not use it.

    Raises:
        ValueError: the divergence is unknown, or α is not finite.
    """
    name = ALIASES.get(divergence, divergence)
    if name not in DIVERGENCES:
        known = ", ".join((*DIVERGENCES, *ALIASES))
        raise ValueError(f"f_divergence_type={divergence!r} must be one of {known}")
    check_range("f_alpha_divergence_coef", alpha, float("-inf"), open_low=True)
    return DIVERGENCES[name](ratio, alpha)


@dataclass(frozen=True)
class FDivergence(Modifier):
    """A modifier that replaces each log-ratio r of policy to reference by f′(e^r); see `f_prime`.

    A loss must meet two conditions. `refusal` tests both with synthetic log-probs, so that users need not declare
    anything for their own losses.

    1. The loss depends on log-probs only through log-ratios. It must not change if the log-probs of policy and
       reference are shifted together.
    2. The loss depends only on differences between the responses to a prompt. It must not change if the log-ratios of
       all responses to the prompt are shifted equally, in sums or per token. The reason is that the reward equals β f′
       only up to a constant for each prompt, the divergence's normalizer, which cancels in differences. Losses that
       judge each response on its own are therefore rejected, as in TRL.

    Attributes:
        divergence, alpha: the arguments of `f_prime`.
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
            return "it compares log-ratios of tokens, but the divergence is defined for whole responses"
        if not policy_and_reference(term.names):
            return "it does not compare log-ratios to a reference"
        if term.spec.has_own_divergence:
            return "it has a divergence of its own"
        if not _is_of_log_ratios(term):
            return "it also depends on log-probs outside the log-ratios that the divergence replaces"
        if not _is_of_differences(term):
            return "it judges each response on its own, but the divergence's normalizer cancels only in differences"
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
    """Return whether the losses of synthetic examples stay the same if policy and reference log-probs shift equally."""
    inputs, noise = _varied_examples(term)
    moved = dict(inputs)
    for policy, reference in policy_and_reference(term.names):
        shift = noise(inputs[policy].shape)
        moved |= {policy: inputs[policy] + shift, reference: inputs[reference] + shift}
    return _gives_the_same(term, inputs, moved)


def _is_of_differences(term: Term) -> bool:
    """Return whether the losses of synthetic examples stay the same if all log-ratios of an example shift equally.

    The sums of all responses shift by the same amount, or by the same amount per token. One of the two must hold.
    """
    inputs, noise = _varied_examples(term)
    of_example = noise((len(next(iter(inputs.values()))),))
    policies = [policy for policy, _ in policy_and_reference(term.names)]

    def moved(per_token: bool) -> Inputs:
        shifts = {name: of_example.view(-1, *[1] * (inputs[name].dim() - 1)) for name in policies}
        lengths = {name: inputs.get(_lengths_of(name), torch.tensor(1.0)) if per_token else 1.0 for name in policies}
        return {**inputs, **{name: inputs[name] + shifts[name] * lengths[name] for name in policies}}

    return any(_gives_the_same(term, inputs, moved(per_token)) for per_token in (False, True))


def _lengths_of(policy: str) -> str:
    return policy.removeprefix("policy_").removesuffix("logps") + "lengths"


def _varied_examples(term: Term) -> tuple[Inputs, Callable[[torch.Size | tuple[int, ...]], Tensor]]:
    """Return reproducible synthetic inputs whose sums all differ, and a function that draws random numbers in [0, 3).

    The function takes a shape.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return 3 * torch.rand(shape, generator=generator, dtype=torch.float64)

    inputs = made_up_examples(term.names, count=8, dtype=torch.float64)
    return {**inputs, **{name: x - noise(x.shape) for name, x in inputs.items() if is_sum(name)}}, noise


def _gives_the_same(term: Term, inputs: Inputs, moved: Inputs) -> bool:
    state = {name: torch.tensor(x, dtype=torch.float64) for name, x in term.initial_state.items()}
    before, after = (term(given, {"state": state}).losses for given in (inputs, moved))
    return torch.allclose(before, after, rtol=1e-9, atol=1e-9)
