"""What preference losses share: the output record, checks of the inputs, and numerically stable building blocks.

In shapes, B is the number of examples (pairs, rows or lists) and K the number of responses of one example.
Log-probabilities are natural logarithms (nats) over the scored response tokens.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class LossOutput:
    """The output of a preference loss.

    Attributes:
        losses: `[B]`. The loss of each example. Gradients flow through it.
        rewards: `[B, K]`. The implicit reward of each response, as this loss defines it, without gradients. Pairs have
            two columns, chosen and rejected. Single responses have one column. Lists have one column per response, and
            shorter lists are padded. `None` if the loss has no implicit reward, as in supervised fine-tuning.
        components: further values for the logs, keyed by name, such as the preference term and the NLL of a loss. Each
            is `[B]` and has no gradient.
    """

    losses: Tensor
    rewards: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The mean over the examples, a scalar."""
        return self.losses.mean()

    @property
    def chosen_rewards(self) -> Tensor:
        """The implicit rewards of the chosen responses of pairs, `[B]`."""
        return self._reward_column(0)

    @property
    def rejected_rewards(self) -> Tensor:
        """The implicit rewards of the rejected responses of pairs, `[B]`."""
        return self._reward_column(1)

    def rows(self, place: slice) -> "LossOutput":
        """Return the output for the examples in the slice `place`."""
        rewards = None if self.rewards is None else self.rewards[place]
        return LossOutput(self.losses[place], rewards, {name: part[place] for name, part in self.components.items()})

    def _reward_column(self, column: int) -> Tensor:
        if self.rewards is None:
            raise ValueError("this loss has no implicit rewards")
        return self.rewards[:, column]


class UnsuitableExamples(ValueError):
    """Raised if a loss cannot compare some examples of a dataset.

    Attributes:
        which: `[N]` bool, where N is the number of examples in the dataset. True for the examples that the loss cannot
            compare.
    """

    def __init__(self, which: Tensor, reason: str):
        super().__init__(reason)
        self.which = which


def advise_on_labels(labels: Tensor) -> str | None:
    """Return advice for the user if all examples have the same label, or `None` if both labels occur.

    Losses that compare desirable with undesirable examples need both.

    Args:
        labels: `[N]` bool. True for desirable examples.
    """
    desirable = int(labels.sum())
    if 0 < desirable < len(labels):
        return None
    one, other, learned = ("", "un", "likelier") if desirable else ("un", "", "less likely")
    return (
        f"{len(labels):,} of {len(labels):,} examples are {one}desirable: without {other}desirable ones, training only "
        f"makes responses {learned}, and an evaluation has no rewards/margins; check the labels, or add "
        f"{other}desirable examples"
    )


def pair_rewards(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Stack the rewards `[B]` of the chosen and of the rejected responses into a detached tensor `[B, 2]`."""
    return torch.stack([chosen_rewards, rejected_rewards], dim=-1).detach()


def check_same_shape(**tensors: Tensor | None) -> None:
    """Check that all tensors that are not `None` are vectors `[B]` of the same length.

    Raises:
        ValueError: the shapes are wrong; the message names the tensors and their shapes.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"a loss takes one number per example: expected vectors [B] of the same length, got {listing}")


def check_lists(**tensors: Tensor | None) -> None:
    """Check that all tensors that are not `None` are matrices `[B, K]` of the same shape.

    Raises:
        ValueError: the shapes are wrong; the message names the tensors and their shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"a loss of lists takes matrices [B, K] of the same shape, got {listing}")


def check_tokens(tokens: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    """Check that the tensors in `tokens` are matrices `[B, T]` of the same shape, and those in `vectors` are `[B]`.

    Raises:
        ValueError: the shapes are wrong; the message names the tensors and their shapes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in (tokens | vectors).items()}
    first = next(iter(tokens.values())).shape
    fitting = len(first) == 2 and all(tensor.shape == first for tensor in tokens.values())
    if not fitting or any(tensor.shape != first[:1] for tensor in vectors.values()):
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"a loss of tokens takes matrices [B, T] of the same shape, and vectors [B], got {listing}")


def check_range(
    name: str,
    value: float,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    closed_high: bool = False,
) -> None:
    """Check that `low <= value < high`; `open_low` excludes `low`, and `closed_high` includes `high`.

    Raises:
        ValueError: the value is out of range; the message names the parameter, the value and the range.
    """
    above = value > low if open_low else value >= low
    below = value <= high if closed_high else value < high
    if not (above and below):
        least = f"{'above' if open_low else 'at least'} {low:g}"
        most = f"{'at most' if closed_high else 'below'} {high:g}" if math.isfinite(high) else "finite"
        raise ValueError(f"{name}={value!r} must be {least}" + (f" and {most}" if math.isfinite(high) or above else ""))


def check_positive(**values: float) -> None:
    """Check that every named value is finite and above zero.

    Raises:
        ValueError: a value is not finite or not above zero; the message names the first such value.
    """
    for name, value in values.items():
        check_range(name, value, 0.0, open_low=True)


def check_both_or_neither(**tensors: Tensor | None) -> bool:
    """Return True if all the reference log-probs `tensors` are given, and False if all are `None`.

    Raises:
        ValueError: some of the reference log-probs are given, and others are not.
    """
    given = [name for name, tensor in tensors.items() if tensor is not None]
    if given and len(given) < len(tensors):
        missing = ", ".join(name for name in tensors if name not in given)
        raise ValueError(f"{', '.join(given)} given without {missing}: pass all of them, or none of them")
    return bool(given)


def log_ratios(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    **others: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (r_w, r_l), the log-ratios (nats) of the chosen and of the rejected responses, each `[B]`.

    r = s − s_ref, where s and s_ref are a response's summed log-probs under the policy and under the reference. If no
    reference log-probs are given, return (s_w, s_l). This corresponds to a reference under which all responses are
    equally likely.

    Raises:
        ValueError: only one of the reference log-probs is given, or the tensors, including `others`, do not all have
            the same shape `[B]`.
    """
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    check_both_or_neither(**references)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps, **references, **others
    )
    if ref_chosen_logps is None or ref_rejected_logps is None:
        return policy_chosen_logps, policy_rejected_logps
    return policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps


_SUMS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def of_log_ratios(reference_free: bool = False) -> Callable[[Callable[..., Any]], Callable[..., LossOutput]]:
    """Turn a formula in the log-ratios r = s − s_ref (nats) of the chosen and rejected responses into a loss.

    The formula takes `chosen` and `rejected`, `[B]` each. It returns a `LossOutput`, or the losses `[B]` if the
    implicit rewards are βr. It must have a parameter `beta`. Instead of `chosen` and `rejected`, the decorated loss
    takes four summed log-probs (nats, `[B]`): `policy_chosen_logps`, `policy_rejected_logps`, `ref_chosen_logps` and
    `ref_rejected_logps`. The formula's other parameters follow. The decorated loss checks that all tensors are `[B]`
    and that β > 0.

    Args:
        reference_free: whether the decorated loss can be called without the reference log-probs. In such a call, r is
            s.

    Raises:
        ValueError: raised by the decorated loss if shapes differ, β is not above 0, or a required reference is missing.
    """

    def decorate(formula: Callable[..., Any]) -> Callable[..., LossOutput]:
        signature = _with_sums(formula, reference_free)
        tensors = [p.name for p in signature.parameters.values() if p.annotation in (Tensor, Tensor | None)]

        @functools.wraps(formula)
        def loss(*args: Any, **kwargs: Any) -> LossOutput:
            given = _arguments(formula.__name__, signature, args, kwargs)
            check_positive(beta=given["beta"])
            chosen, rejected = log_ratios(**{name: given[name] for name in tensors})
            if given["ref_chosen_logps"] is None and not reference_free:
                raise ValueError(f"{formula.__name__} needs a reference: pass ref_chosen_logps and ref_rejected_logps")
            others = {name: value for name, value in given.items() if name not in _SUMS}
            output = formula(chosen, rejected, **others)
            if isinstance(output, LossOutput):
                return output
            return LossOutput(output, pair_rewards(others["beta"] * chosen, others["beta"] * rejected))

        loss.__signature__ = signature  # type: ignore[attr-defined]
        return loss

    return decorate


def _arguments(name: str, signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, keyed by name, including defaults.

    If the arguments do not fit the signature, the `TypeError` names the function, as Python's own `TypeError` does.
    """
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None
    given.apply_defaults()
    return given.arguments


def _with_sums(formula: Callable[..., Any], reference_free: bool) -> inspect.Signature:
    """Return the formula's signature with the four summed log-probs in place of the two log-ratios.

    Parameters with defaults come last.
    """
    # Annotations identify the tensors among the parameters. Some modules store annotations as strings, so evaluate
    # them.
    _, _, *others = inspect.signature(formula, eval_str=True).parameters.values()
    of_reference = {"annotation": Tensor | None, "default": None} if reference_free else {"annotation": Tensor}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    sums = [
        inspect.Parameter(name, kind, **(of_reference if name.startswith("ref_") else {"annotation": Tensor}))
        for name in _SUMS
    ]
    parameters = sorted([*sums, *others], key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    return inspect.Signature(parameters, return_annotation=LossOutput)


def mean_logps(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (s̄_w, s̄_l), the mean log-probs per scored token, each `[B]`.

    Raises:
        ValueError: the tensors do not all have the same shape `[B]`.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return per_token(policy_chosen_logps, chosen_lengths), per_token(policy_rejected_logps, rejected_lengths)


def less_margins(rewards: Tensor, margins: Tensor | None) -> Tensor:
    """Return the reward margin `[B]`, minus each pair's target margin if target margins are given."""
    return rewards if margins is None else rewards - margins


def per_token(summed: Tensor, lengths: Tensor) -> Tensor:
    """Divide a quantity that is summed over a response by its number of scored tokens; a length of 0 counts as 1."""
    return summed / lengths.clamp(min=1)


def check_one_confidence(win_rates: Tensor | None, label_smoothing: float, margins: Tensor | None = None) -> None:
    """Raise `ValueError` if win rates are combined with label smoothing or with target margins.

    All three state how clear a preference is, so win rates together with one of the others would count this twice.
    """
    if win_rates is not None and label_smoothing != 0.0:
        raise ValueError(
            f"label_smoothing={label_smoothing!r} applies to all pairs, but the column `win_rate` already gives a soft "
            "label for each pair: remove label_smoothing, or set use_win_rates=False"
        )
    if win_rates is not None and margins is not None:
        raise ValueError(
            "the columns `win_rate` and `margin` both state how much better a response is: remove one of them "
            "(remove_columns), or set use_win_rates=False"
        )


def logistic(margin: Tensor, label_smoothing: float = 0.0, win_rates: Tensor | None = None) -> Tensor:
    """Return (1 − ε)·ℓ(z) + ε·ℓ(−z), ℓ(z) = −log σ(z): the conservative logistic loss (cDPO), or ℓ(z) if ε = 0.

    Here, z is `margin`, and ε is `label_smoothing`. If `win_rates` p are given (`[B]`, in [0, 1]), return
    p·ℓ(z) + (1 − p)·ℓ(−z) instead, the cross-entropy to the soft labels (p, 1 − p).
    """
    if win_rates is not None:
        return -win_rates * F.logsigmoid(margin) - (1 - win_rates) * F.logsigmoid(-margin)
    if label_smoothing == 0.0:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


# For larger exponents x, eˣ is replaced by its tangent at 20. Gradient norms contain the square of e²⁰ = 5e8, and this
# square does not overflow in fp32.
MAX_EXPONENT = 20.0


def exp_to_tangent(x: Tensor) -> Tensor:
    """Return eˣ for x ≤ 20, and the tangent of eˣ at 20 for larger x, so that values and gradients stay finite."""
    capped = x.clamp(max=MAX_EXPONENT)
    return capped.exp() * (1 + x - capped)


def expm1_to_tangent(x: Tensor) -> Tensor:
    """Return eˣ − 1 for x ≤ 20, and its tangent at 20 for larger x. The result is accurate near x = 0.

    See `exp_to_tangent` for the reason.
    """
    capped = x.clamp(max=MAX_EXPONENT)
    return torch.expm1(capped) + capped.exp() * (x - capped)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) for x ≤ 0, accurately both near zero and far from zero (Mächler 2012).

    It is computed with expm1 near zero, and with log1p far from zero. x is clamped to a value just below zero, because
    at zero the result would be −inf and the gradient undefined.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near_zero = x > -0.6931471805599453
    # Values that the other branch handles are replaced by a safe constant, because `where` would pass on NaN gradients.
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)
